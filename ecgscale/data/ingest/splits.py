"""Which split a record belongs to: by a hash of its patient, or by a value that its source gives it.

Shape suffix: B records of a shard, V different values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ecgscale.data.cells import Cells
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.shards import SPLITS
from ecgscale.errors import InputError

Splits = npt.NDArray[np.uint8]  # places in SPLITS


def split_value(labels: Mapping[str, list[str]], metadata: Mapping[str, str], key: str) -> str:
    """What a record says under that label or metadata key, "" for nothing."""
    values = labels.get(key) or [metadata.get(key, "")]
    return values[0]


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


def check_not_empty(known: set[str], options: IngestOptions) -> None:
    """Raises InputError where no record has a value that makes it a validation, or a test, record."""
    for code, values in ((1, options.validation_values), (2, options.test_values)):
        if values and known.isdisjoint(_as_read(values)):
            seen = sorted(known - {""})
            hint = f"the records have {', '.join(seen[:10])}" if seen else "no record has that key at all"
            raise InputError(
                f"no record has {options.split_by} in {list(values)}, so {SPLITS[code]} would be empty; {hint}"
            )


def _as_read(values: Sequence[str]) -> list[str]:
    """The values as they were given and as labels are read: 8.0 is 8, True is 1."""
    return [spelling for value in values for spelling in (value, *(Cells().classes(value, "") or ())[:1])]
