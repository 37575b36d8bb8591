"""From words to dataclasses: command lines and YAML files become checked trees that know where each value was written.

A dataclass says everything: its fields are the keys, the text under a field is its help, ``__post_init__`` its checks.
A field whose type is a dataclass is a group of keys, ``train.steps``. ``option`` adds what a command line has to know.
"""

from ecgscale.settings.build import build, from_tree, read_texts, refuse_unknown
from ecgscale.settings.given import Elsewhere, Given, read_file
from ecgscale.settings.options import (
    Option,
    all_keys,
    alternatives,
    field_types,
    is_group,
    metavar,
    option,
    option_of,
    places,
    resumable_keys,
)
from ecgscale.settings.words import from_words, take_known

__all__ = [
    "Elsewhere",
    "Given",
    "Option",
    "all_keys",
    "alternatives",
    "build",
    "field_types",
    "from_tree",
    "from_words",
    "is_group",
    "metavar",
    "option",
    "option_of",
    "places",
    "read_file",
    "read_texts",
    "refuse_unknown",
    "resumable_keys",
    "take_known",
]
