"""The training data of the PhysioNet/CinC Challenge 2021: training/<database>/g<number>/<record>.hea and .mat.

Diagnoses, age and sex stand in the headers. No record names a patient.
"""

from __future__ import annotations

from ecgscale.data.description import Description
from ecgscale.data.sources.catalogued import Described, lies_in
from ecgscale.data.sources.tree import Tree

DESCRIPTION = "CinC 2021: {n} records, label Dx from the headers, metadata database from the folders; no patients known"
MARKS = "training/<database>/g1"
_DATABASES = {
    "chapman_shaoxing",
    "cpsc_2018",
    "cpsc_2018_extra",
    "georgia",
    "ningbo",
    "ptb",
    "ptb-xl",
    "st_petersburg_incart",
}


def is_here(tree: Tree) -> bool:
    """Whether folders of the challenge's databases stand in the tree or in its folder "training"."""
    for folder in ("", "training"):
        for database in tree.children(folder) & _DATABASES:
            if "g1" in tree.children(f"{folder}/{database}" if folder else database):
                return True
    return False


def has_part(name: str) -> bool:
    """Whether recordings lie in a folder of that name."""
    return name == "training" or name in _DATABASES


def described(tree: Tree, within: str) -> Described:
    """All records of the tree, or of a folder of it."""
    for item in tree.headers():
        if not lies_in(item, within):
            continue
        database = next((folder for folder in item.split("/")[:-1] if folder in _DATABASES), None)
        yield item, Description(None, {}, {"database": database} if database else {})
