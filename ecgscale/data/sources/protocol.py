"""What a source of recordings is."""

from __future__ import annotations

from typing import Protocol

from ecgscale.data.label_table import LabelTable
from ecgscale.record import Record


class Source(Protocol):
    """A data set of recordings. Instances travel to worker processes, so they must be picklable."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""

    def items(self) -> list[str]:
        """The names of the records, sorted."""

    def read(self, item: str) -> Record:
        """One record; raises InputError that names the file and the reason."""


class OpenedSource(Source, Protocol):
    """A source of files that were recognised."""

    @property
    def description(self) -> str:
        """One line for people: what was recognised, and what its labels are good for."""

    def fingerprint(self, item: str) -> bytes:
        """As in ``Fingerprinted`` of ingest."""

    def unlabelled(self) -> list[str]:
        """Names of the records without a row in the user's table of labels; all of them where there is none."""

    def left_out(self) -> list[str]:
        """Lines on what lies there and is not read, with the reason, and on what the source was not taken for."""

    @property
    def labels(self) -> LabelTable | None:
        """The user's table of labels; None where there is none."""
