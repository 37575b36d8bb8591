"""Which split a record belongs to: by a hash of its patient, or by a value that its source gives it.

Exact copies lie in one split: the hash of one person decides for all whom equal records link.

Shape suffixes: B records of a shard, P persons, V different values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ecgscale.data.cells import Cells, find_key
from ecgscale.data.copies import Copies
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.shards import SPLITS
from ecgscale.errors import InputError

Splits = npt.NDArray[np.uint8]  # places in SPLITS


def split_value(places: Iterable[Mapping[str, object]], key: str) -> str:
    """What a record says under that key, upper or lower case alike, such as in its labels and its metadata.

    "" for nothing. Raises InputError for several values, be it in one place or in two.
    """
    cells = Cells()
    values: dict[str, None] = {}
    for place in places:
        for name, value in place.items():
            if find_key((name,), key) is not None:
                values |= dict.fromkeys(cells.classes(value, name) or ())
    if len(values) > 1:
        raise InputError(f"{key} has {len(values)} values, {', '.join(values)[:60]}; a record lies in one split")
    return next(iter(values), "")


def without_value(key: str) -> str:
    """The note of a record for which ``split_value`` finds nothing."""
    return f"a record that has no {key}, put into training"


def splits_by_value(values_V: Sequence[str], value_B: npt.NDArray[np.uint32], options: IngestOptions) -> Splits:
    """Records by the place of their value in ``values_V``; a value that no option names means train."""
    code_of_value = dict.fromkeys(_as_read(options.validation_values), 1)
    code_of_value |= dict.fromkeys(_as_read(options.test_values), 2)
    return np.array([code_of_value.get(value, 0) for value in values_V], np.uint8)[value_B]


def splits_by_hash(patient_B: npt.NDArray[np.int64], options: IngestOptions) -> Splits:
    """Depends on the patient alone, so that each lies in one split."""
    place_B = (patient_B % 1_000_003) / 1_000_003  # the code is a hash already
    validation_B = place_B < options.test_fraction + options.validation_fraction
    return np.where(place_B < options.test_fraction, 2, np.where(validation_B, 1, 0)).astype(np.uint8)


@dataclass(frozen=True)
class United:
    """Persons whose split others decide, since equal records link them: sorted codes, and places in SPLITS."""

    code_P: npt.NDArray[np.int64]
    split_P: Splits

    @staticmethod
    def none() -> United:
        return United(np.zeros(0, np.int64), np.zeros(0, np.uint8))

    @staticmethod
    def by_copies(
        copies: Copies,
        patient_R: npt.NDArray[np.int64],
        known_R: npt.NDArray[np.bool_],
        options: IngestOptions,
        known: Mapping[int, int] | None = None,
    ) -> United:
        """Those linked by ``copies``; ``known`` has the splits that persons of an older set stand in, which they keep.

        ``known_R``: whether the record names its patient. Copies under many known patients link nobody.
        All that are linked go where the hash of the least code says, or where the least that is known stands already:
        so it does not matter in which order records come, nor whether they come at once.
        """
        few = copies.of_few_persons(patient_R, known_R)
        code_P, least_P = few.linked_persons(patient_R[np.isin(copies.number_R, few.number_R)])
        split_P = splits_by_hash(least_P, options)
        keep = known or {}
        of_least = {
            least: keep[code]
            for code, least in zip(code_P.tolist()[::-1], least_P.tolist()[::-1], strict=True)
            if code in keep
        }
        for p, (code, least) in enumerate(zip(code_P.tolist(), least_P.tolist(), strict=True)):
            split_P[p] = keep.get(code, of_least.get(least, split_P[p]))
        return United(code_P, split_P)

    def applied(self, patient_B: npt.NDArray[np.int64], split_B: Splits) -> Splits:
        """The splits of some records, changed for these persons."""
        if not len(self.code_P):
            return split_B
        at_B = np.searchsorted(self.code_P, patient_B).clip(max=len(self.code_P) - 1)
        return np.where(self.code_P[at_B] == patient_B, self.split_P[at_B], split_B).astype(np.uint8)


def check_not_empty(known: set[str], options: IngestOptions) -> None:
    """Raises InputError where no record has a value that makes it a validation, or a test, record."""
    _check_spelling(known, options)
    for code, values in ((1, options.validation_values), (2, options.test_values)):
        if values and known.isdisjoint(_as_read(values)):
            seen = sorted(known - {""})
            hint = f"the records have {', '.join(seen[:10])}" if seen else "no record has that key at all"
            raise InputError(
                f"no record has {options.split_by} in {list(values)}, so {SPLITS[code]} would be empty; {hint}"
            )


def _check_spelling(known: set[str], options: IngestOptions) -> None:
    """Raises InputError where a value would go to training for a capital or a leading zero alone."""
    named = {_alike(value): value for value in (*options.validation_values, *options.test_values)}
    wanted = {*_as_read(options.validation_values), *_as_read(options.test_values)}
    for value in sorted(known - wanted):
        if _alike(value) in named:
            raise InputError(
                f"records have {options.split_by} {value!r}, the options say {named[_alike(value)]!r}: name both, or "
                "write them alike"
            )


def _alike(value: str) -> str:
    return value.casefold().lstrip("0")


def _as_read(values: Sequence[str]) -> list[str]:
    """The values as they were given and as labels are read: 8.0 is 8, True is 1."""
    return [spelling for value in values for spelling in (value, *(Cells().classes(value, "") or ())[:1])]
