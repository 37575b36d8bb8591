"""Windows -> ECGBatch, which travels to the device as int16.

Shape suffixes: B rows (segments), L the twelve leads, T samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ecgscale.lead_names import LEADS
from ecgscale_kernels import LeadDraw


@dataclass(frozen=True)
class ECGBatch:
    """Rows of counts with what they are worth: value = gain · (x − offset), in mV or in z-units.

    For pretraining the first half of the rows holds segment 0 of each position and the second half segment 1. Behind
    augmentations, on the device, the signal is float32 values with gain 1 or 0 and offset 0.
    """

    signal_BLT: Tensor  # int16 counts; zero where a lead is missing, the rounded offset behind the valid samples
    gain_BL: Tensor  # float32; zero for a missing lead
    offset_BL: Tensor  # float32 counts
    length_B: Tensor  # int64, valid samples
    patient_B: Tensor  # int64 codes
    segment_B: Tensor  # int64, 0 or 1
    position_B: Tensor  # int64
    record_B: Tensor  # int64, number of the recording in the data set
    padded: bool  # whether any row is shorter than T; known without asking the device
    target_BC: Tensor | None = None  # labels, for fine-tuning
    lead_draw: LeadDraw | None = None  # random lead masking, which the stem draws itself

    def to(self, device: torch.device) -> ECGBatch:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ECGBatch:
        return self.each(lambda tensor: tensor.pin_memory())

    def used_by(self, stream: torch.cuda.Stream) -> ECGBatch:
        """Its memory is not used again before ``stream`` is through with it, whatever stream it was made on."""

        def record(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return tensor

        return self.each(record)

    def each(self, change: Callable[[Tensor], Tensor]) -> ECGBatch:
        """The batch with every tensor of it changed."""
        lead_draw = self.lead_draw
        if lead_draw is not None:
            rows = change(lead_draw.segment_B), change(lead_draw.position_B)
            lead_draw = lead_draw._replace(segment_B=rows[0], position_B=rows[1])
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, lead_draw=lead_draw, **changed)

    def with_gain(self, gain_BL: Tensor) -> ECGBatch:
        return replace(self, gain_BL=gain_BL)

    def with_lead_draw(self, lead_draw: LeadDraw | None) -> ECGBatch:
        return replace(self, lead_draw=lead_draw)

    @property
    def rows(self) -> int:
        return self.signal_BLT.shape[0]


SYNTHETIC_RATE_HZ = 500.0
"""What the samples of synthetic batches are said to be; nothing that is timed depends on it."""


def synthetic_batch(rows: int, samples: int, first_position: int = 0) -> ECGBatch:
    """Random counts; the first half of the rows holds segment 0, the second segment 1 of the same positions."""
    position_B = first_position + torch.arange(rows // 2).repeat(2)
    signal_BLT = torch.randint(-2000, 2000, (rows, len(LEADS), samples), dtype=torch.int16)
    return ECGBatch(
        signal_BLT=signal_BLT,
        gain_BL=torch.full((rows, len(LEADS)), 1e-3),
        offset_BL=torch.zeros(rows, len(LEADS)),
        length_B=torch.full((rows,), samples),
        patient_B=position_B,
        segment_B=torch.arange(2).repeat_interleave(rows // 2),
        position_B=position_B,
        record_B=position_B,
        padded=False,
    )
