"""Whether two columns or keys of patients name the same persons: if not, somebody has to say which one counts."""

from __future__ import annotations

from collections.abc import Iterable

from ecgscale.data.cells import PATIENT_KEYS


def patient_keys_in(keys: Iterable[str]) -> list[str]:
    """Those that are one of PATIENT_KEYS in any case, the one that counts first."""
    listed = [*keys]
    return [key for known in PATIENT_KEYS for key in listed if key.strip().casefold() == known]


class Grouping:
    """Of two keys: whether each id of the one goes with one id of the other."""

    def __init__(self, key: str, other_key: str) -> None:
        self.key, self.other_key = key, other_key
        self.contradiction = ""
        """The first that was seen, for people."""
        self._other_of: dict[str, str] = {}
        self._one_of: dict[str, str | None] = {}

    def add(self, one: str | None, other: str | None) -> None:
        """The two ids of a record. None: unknown; a record without an id under ``key`` is a person of its own."""
        if other is None or self.contradiction:
            return
        if other in self._one_of and (one is None or self._one_of[other] != one):
            ones = " and ".join("unknown" if id_ is None else repr(id_) for id_ in (self._one_of[other], one))
            self.contradiction = f"{self.other_key} {other!r} is {self.key} {ones}"
        elif one is not None and self._other_of.setdefault(one, other) != other:
            self.contradiction = f"{self.key} {one!r} is {self.other_key} {self._other_of[one]!r} and {other!r}"
        self._one_of[other] = one

    def refusal(self) -> str:
        """What is wrong; "" where they name the same persons."""
        if not self.contradiction:
            return ""
        return (
            f"{self.key} and {self.other_key} name other patients ({self.contradiction}); say which one counts with "
            "--patient-key"
        )
