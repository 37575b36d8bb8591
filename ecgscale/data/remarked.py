"""How many records of a set have a remark of each kind, and which come first: for the manifest and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ecgscale.data.plausibility import questions
from ecgscale.errors import one_line

_NAMED = 3  # records that are named to people


@dataclass(frozen=True)
class Remarked:
    """Of one kind of remark."""

    records: int
    first: list[str]
    """Names of the first of them."""

    def plus(self, name: str) -> Remarked:
        """One more."""
        return Remarked(self.records + 1, self.first if len(self.first) == _NAMED else [*self.first, name])

    def joined(self, later: Remarked) -> Remarked:
        """With those that come behind."""
        return Remarked(self.records + later.records, [*self.first, *later.first][:_NAMED])


NONE = Remarked(0, [])


def lines(remarked: Mapping[str, Remarked], records: int | None, listed_in: str = "") -> list[str]:
    """A line for each kind, and what to ask where it is that of most of all records; None: nothing is asked."""
    told = []
    for kind, one in remarked.items():
        more = one.records - len(one.first)
        names = ", ".join(one.first) + (f" and {more} more" if more else "")
        told.append(f"{one.records} records: {kind}; {one_line(names)}{listed_in}")
    if records is None:
        return told
    counts = {kind: one.records for kind, one in remarked.items()}
    return told + [f"most records: {question}" for question in questions(counts, records)]
