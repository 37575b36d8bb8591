"""A source for tests of what comes after the sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ecgscale.record import Record


@dataclass(frozen=True)
class Records:
    """A source of records that lie in memory already."""

    records: Sequence[Record]
    dataset: str = "made"

    def items(self) -> list[str]:
        return [record.name for record in self.records]

    def read(self, item: str) -> Record:
        return next(record for record in self.records if record.name == item)
