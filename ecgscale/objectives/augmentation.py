"""Noise as recorders meet it: mains, muscle, shifting and wandering baselines (Oh et al. 2022, for SimCLR).

It is made on the device in float32, and drawn by (seed, purpose, segment, position): the same for a row in whatever
batch and on whatever rank. It obeys Einthoven: it is drawn for I, II and V1..V6, and III, aVR, aVL and aVF follow.
Amplitudes are in mV; with data.normalisation zscore they count as z-units, standard deviations of the lead.

Shape suffixes: B rows, L the twelve leads, E the eight independent leads, T samples, C cosines, K numbers drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.rng import Purpose
from ecgscale_kernels import philox

EIGHT_LEADS = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
EIGHT = [LEADS.index(lead) for lead in EIGHT_LEADS]

_MAINS_HZ = (50.0, 60.0)
_LARGEST_MAINS = 0.5  # amplitudes in mV or z-units
_LARGEST_EMG = 0.5
_LARGEST_SHIFT = 0.25
_LARGEST_WANDER = 0.5
_SHIFTED_SHARE = 0.2  # of the valid samples
_WANDER_HZ = (0.01, 0.2)
_WANDER_COSINES = 3


class _Rows(NamedTuple):
    """What the noise of a batch is made from."""

    uniform: Callable[[int], Tensor]  # so many numbers in (0, 1) for each row
    length_B: Tensor  # valid samples
    samples: int  # T
    rate_hz: float

    @property
    def sample_T(self) -> Tensor:
        return torch.arange(self.samples, device=self.length_B.device)


def _power_line(rows: _Rows) -> Tensor:
    """A cosine of 50 or 60 Hz, of one amplitude up to 0.5 mV and one phase in all eight leads."""
    amplitude_B1, which_B1, phase_B1 = rows.uniform(3)[..., None].unbind(dim=1)
    rate_hz_B1 = torch.where(which_B1 < 0.5, *_MAINS_HZ)
    wave_BT = torch.cos(2 * pi * (rate_hz_B1 * (rows.sample_T / rows.rate_hz) + phase_B1))
    return (_LARGEST_MAINS * amplitude_B1 * wave_BT)[:, None].expand(-1, len(EIGHT), -1)


def _emg(rows: _Rows) -> Tensor:
    """White noise, of a standard deviation up to 0.5 mV in each lead."""
    drawn_BK = rows.uniform(len(EIGHT) * (1 + rows.samples))
    deviation_BE1 = _LARGEST_EMG * drawn_BK[:, : len(EIGHT), None]
    return deviation_BE1 * normal(drawn_BK[:, len(EIGHT) :]).view(-1, len(EIGHT), rows.samples)


def _baseline_shift(rows: _Rows) -> Tensor:
    """A step of up to 0.25 mV up or down in each lead, over one span of a fifth of the samples."""
    drawn_BK = rows.uniform(1 + len(EIGHT))
    step_BE1 = _LARGEST_SHIFT * (2 * drawn_BK[:, 1:, None] - 1)
    span_B1 = torch.round(_SHIFTED_SHARE * rows.length_B.double()).long()[:, None]
    since_BT = rows.sample_T - (drawn_BK[:, :1] * (rows.length_B[:, None] - span_B1 + 1)).long()
    return step_BE1 * ((since_BT >= 0) & (since_BT < span_B1))[:, None]


def _baseline_wander(rows: _Rows) -> Tensor:
    """Three slow cosines of 0.01 to 0.2 Hz, the same ones in all leads, of up to 0.5 mV together in each lead."""
    drawn_BK = rows.uniform(3 * _WANDER_COSINES + len(EIGHT))
    share_BC1, place_BC1, phase_BC1 = drawn_BK[:, : 3 * _WANDER_COSINES, None].chunk(3, dim=1)
    low_hz, high_hz = _WANDER_HZ
    rate_hz_BC1 = low_hz + (high_hz - low_hz) * place_BC1
    wave_BCT = torch.cos(2 * pi * (rate_hz_BC1 * (rows.sample_T / rows.rate_hz) + phase_BC1))
    wander_B1T = (share_BC1 / share_BC1.sum(dim=1, keepdim=True) * wave_BCT).sum(dim=1, keepdim=True)
    return _LARGEST_WANDER * drawn_BK[:, 3 * _WANDER_COSINES :, None] * wander_B1T


NOISE: dict[str, tuple[Purpose, Callable[[_Rows], Tensor]]] = {
    "power_line": (Purpose.POWER_LINE, _power_line),
    "emg": (Purpose.EMG, _emg),
    "baseline_shift": (Purpose.BASELINE_SHIFT, _baseline_shift),
    "baseline_wander": (Purpose.BASELINE_WANDER, _baseline_wander),
}


NO_NOISE = ["none"]  # instead of augmentations: none, where the objective has some of its own


def check_noise(names: Sequence[str]) -> None:
    """Raises InputError for an unknown or repeated augmentation."""
    for name in names:
        if name not in NOISE:
            near = get_close_matches(name, NOISE, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NOISE)}, or none alone"
            raise InputError(f"objective.augmentations {name!r} is unknown; {hint}")
        if names.count(name) > 1:
            raise InputError(f"objective.augmentations: {name} stands {names.count(name)} times; give it once")


def check_rate(names: Sequence[str], rate_hz: float) -> None:
    """Raises InputError where signals are sampled too slowly to hold an augmentation."""
    if "power_line" in names and rate_hz <= 2 * max(_MAINS_HZ):
        others = ",".join(name for name in NOISE if name != "power_line")
        raise InputError(
            f"objective.augmentations power_line needs more than {2 * max(_MAINS_HZ):g} Hz, the data has {rate_hz:g} "
            f"Hz; give others, such as {others}"
        )


def add_noise(batch: ECGBatch, names: Sequence[str], seed: int, probability: float, rate_hz: float) -> ECGBatch:
    """A float batch with each of the augmentations added to each row with ``probability``.

    Nothing is added to missing leads and behind the valid samples.
    """
    batch = as_values(batch)
    samples = batch.signal_BLT.shape[-1]
    value_BLT = batch.signal_BLT
    for name in names:
        purpose, make = NOISE[name]

        def drawn(count: int, purpose: Purpose = purpose) -> Tensor:
            return uniform(batch, seed, purpose, 1 + count)[:, 1:]  # the first one decides whether it is added

        noise_BET = make(_Rows(drawn, batch.length_B, samples, rate_hz))
        added_B11 = (uniform(batch, seed, purpose, 1) < probability)[..., None]
        value_BLT = value_BLT + twelve_leads(noise_BET) * added_B11
    return with_values(batch, value_BLT)


# -- signals in floats -----------------------------------------------------------------------------------------------


def as_values(batch: ECGBatch) -> ECGBatch:
    """The same rows as float32 values in mV or z-units: gain 1 or, for a missing lead, 0, and no offset.

    Zero in missing leads and behind the valid samples.
    """
    value_BLT = (batch.signal_BLT - batch.offset_BL[..., None]) * batch.gain_BL[..., None]
    keep_BL = batch.gain_BL.ne(0).float()
    return with_values(replace(batch, gain_BL=keep_BL, offset_BL=torch.zeros_like(keep_BL)), value_BLT)


def with_values(batch: ECGBatch, value_BLT: Tensor) -> ECGBatch:
    """A float batch with other values; what they are in missing leads and behind the end does not matter."""
    sample_T = torch.arange(value_BLT.shape[-1], device=value_BLT.device)
    real_BLT = (sample_T < batch.length_B[:, None, None]) & batch.gain_BL.ne(0)[..., None]
    return replace(batch, signal_BLT=torch.where(real_BLT, value_BLT, 0.0))


def twelve_leads(eight_BET: Tensor) -> Tensor:
    """(B, E, T) of I, II, V1..V6 -> (B, L, T): the other limb leads follow from I and II."""
    one_B1T, two_B1T, chest_B6T = eight_BET[:, :1], eight_BET[:, 1:2], eight_BET[:, 2:]
    derived = (two_B1T - one_B1T, -(one_B1T + two_B1T) / 2, one_B1T - two_B1T / 2, two_B1T - one_B1T / 2)
    return torch.cat([one_B1T, two_B1T, *derived, chest_B6T], dim=1)


# -- numbers ---------------------------------------------------------------------------------------------------------


def uniform(batch: ECGBatch, seed: int, purpose: int, count: int) -> Tensor:
    """(B, count) float32 in (0, 1), each row's own."""
    return philox.uniform(philox.random_words(seed, purpose, batch.segment_B, batch.position_B, count))


def normal(uniform_BK: Tensor) -> Tensor:
    """Pairs of uniform numbers, one of each half -> as many standard normal ones (Box and Muller 1958)."""
    first, second = uniform_BK.chunk(2, dim=1)
    radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * pi * second
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
