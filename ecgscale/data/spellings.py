"""Labels, and classes of one label, that may be one but for how they are written, which no program can know.

Each ingest keeps the classes of its records in the manifest's ``sources``, so that those of several can be compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from ecgscale.errors import one_line

_MOST = 1000  # classes of a label that are kept: with more it is no list of classes
_LONGEST = 100  # characters: what is longer is a report, or the like
_BETWEEN_WORDS = re.compile(r"(?<=\w)[\W_]+(?=\w)")
_FULL_STOPS = " .,;:"
_YES_OR_NO = {"yes": "1", "true": "1", "no": "0", "false": "0"}


def alike(name: str) -> str:
    """What a name is but for capitals, what stands between its words, full stops, and yes and no for 1 and 0."""
    folded = unicodedata.normalize("NFKC", name).casefold().strip(_FULL_STOPS)
    folded = _BETWEEN_WORDS.sub(" ", folded)
    return _YES_OR_NO.get(folded, folded)


class Spellings:
    """Labels and their classes, as records are added."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, None]] = {}

    def add(self, labels: Mapping[str, Iterable[str]]) -> None:
        """Those of a record, or of what another has kept."""
        for label, names in labels.items():
            classes = self._classes.setdefault(label, {})
            for name in names:
                if len(classes) < _MOST and len(name) <= _LONGEST:
                    classes[name] = None

    def kept(self) -> dict[str, list[str]]:
        """Label -> classes, sorted."""
        return {label: sorted(classes) for label, classes in sorted(self._classes.items())}

    def lines(self) -> list[str]:
        """For people: one on labels, and one for each label with such classes."""
        told = [_told(self._classes, "labels", "labels")]
        told += [_told(classes, f"classes of {label}", "classes") for label, classes in sorted(self._classes.items())]
        return [line for line in told if line]


def _told(names: Iterable[str], what: str, kind: str) -> str:
    """A line on names that are alike; "" where there are none."""
    first: dict[str, str] = {}
    pairs = []
    for name in sorted(names):
        if (other := first.setdefault(alike(name), name)) != name:
            pairs.append(f"{other!r} and {name!r}")
    if not pairs:
        return ""
    return one_line(
        f"{len(pairs)} {what} may be another that is written otherwise, such as {pairs[0]}; they count as {kind} of "
        "their own: if they are the same, write them alike"
    )


def odd_labels(sources: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines on labels and classes of manifests' ``sources`` that may be one; those of earlier versions have none."""
    spellings = Spellings()
    for source in sources:
        spellings.add(source.get("classes", {}))
    return spellings.lines()
