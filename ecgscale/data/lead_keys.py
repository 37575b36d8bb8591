"""What a recording is known by again, however it is stored: a hash of the beginning of lead I, and one of lead II.

It is taken of microvolts, so neither the payload nor the size of a count matters; of one lead at a time, so other leads
and their order do not either; behind a stretch that stands still and of no more than KEYED samples, so that zeros
around a recording, or an end that is cut off, change nothing.

Shape suffixes: K keys, L leads, T samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from ecgscale.lead_names import LEADS
from ecgscale.record import DEFAULT_SCALE_MV, Counts

KEYED = 512  # samples: a second at 500 Hz
SEARCHED = 1 << 19  # samples from the beginning, behind which nothing is looked at
_STILL = 16  # samples that are equal: a gap or padding, no ECG
_CHANGES = 32  # between samples: with fewer, recordings are alike by chance, such as steps of a calibration
_PIECE = 4096
_MOST_MICROVOLTS = 1 << 30  # of an int32; more is no ECG
_MICROVOLT = np.float64(np.float32(DEFAULT_SCALE_MV))  # as floats are rounded when they are ingested

Keys = npt.NDArray[np.uint64]


def lead_keys(signal_LT: Counts, scale_L: npt.ArrayLike, leads: Sequence[str]) -> Keys:
    """(2,): of leads I and II, or of the first that is there where both are absent; 0 for what tells too little."""
    chosen = [lead for lead in ("I", "II") if lead in leads] or [min(leads, key=LEADS.index)]
    scales_mv = np.asarray(scale_L, np.float32).astype(np.float64)
    key_K = np.zeros(2, np.uint64)
    for lead in chosen:
        row = leads.index(lead)
        key_K[int(lead == "II")] = _key(signal_LT[row, :SEARCHED], scales_mv[row], LEADS.index(lead))
    return key_K


def _key(count_T: Counts, scale_mv: np.float64, lead: int) -> int:
    first = 0
    while (still := _equal_from(count_T, first)) >= _STILL:
        first += still
    microvolt_T = np.rint(_without_still_end(count_T[first : first + KEYED]) * scale_mv / _MICROVOLT)
    if np.count_nonzero(microvolt_T[1:] != microvolt_T[:-1]) < _CHANGES or np.abs(microvolt_T).max() > _MOST_MICROVOLTS:
        return 0
    return xxh3_64_intdigest(microvolt_T.astype("<i4").data, seed=lead)


def _equal_from(count_T: Counts, first: int) -> int:
    """How many samples, from one on, are equal."""
    for start in range(first, len(count_T), _PIECE):
        differs_T = count_T[start : start + _PIECE] != count_T[first]
        if differs_T.any():
            return start + int(differs_T.argmax()) - first
    return len(count_T) - first


def _without_still_end(count_T: Counts) -> Counts:
    while (still := _equal_from(count_T[::-1], 0)) >= _STILL:
        count_T = count_T[:-still]
    return count_T
