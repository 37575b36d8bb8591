"""3KG: the heart turned and stretched in space, two such views of one segment (Gopal et al. 2021).

Eight leads give a vectorcardiogram; it is rotated, scaled along its axes and mapped back. Then half of each lead's
samples are zeroed.

Shape suffixes: B rows, L the twelve leads, E the eight independent leads, T samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import pi

import torch
from torch import Tensor

from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import DataConfig
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS
from ecgscale.model import EncoderConfig
from ecgscale.objectives.augmentation import EIGHT, EIGHT_LEADS, as_values, twelve_leads, uniform, with_values
from ecgscale.objectives.gather import gather_rows
from ecgscale.objectives.keys import GlobalContrast, LeadMasking, Noise, ObjectiveConfig
from ecgscale.objectives.objective import Draws, Encoded, Objective
from ecgscale.objectives.simclr import nt_xent_loss, two_views
from ecgscale.rng import Purpose

LARGEST_ANGLE = pi / 4
LARGEST_SCALE = 1.5
# x, y and z from I, II, V1..V6: the inverse of Dower's transformation.
_INVERSE_DOWER = (
    (0.156, -0.009, -0.172, -0.073, 0.122, 0.231, 0.239, 0.193),
    (-0.227, 0.886, 0.057, -0.019, -0.106, -0.022, 0.040, 0.048),
    (0.021, 0.102, -0.228, -0.310, -0.245, -0.063, 0.054, 0.108),
)


class ThreeKG(Objective):
    """Tells the views of a patient's segments from those of other patients."""

    @dataclass(frozen=True)
    class Config(GlobalContrast, Noise, LeadMasking):
        """3kg: two views of a turned and stretched heart, told from those of other patients."""

        name: str = "3kg"

    named_losses = ("3kg",)
    config: Config

    @classmethod
    def check(cls, model: EncoderConfig, config: ObjectiveConfig, data: DataConfig, rate_hz: float) -> None:
        """Raises InputError where no vectorcardiogram can be made of the leads."""
        super().check(model, config, data, rate_hz)
        missing = [LEADS[i] for i in EIGHT if i not in data.lead_positions]
        if missing:
            raise InputError(
                f"data.leads {','.join(data.leads)} lacks {', '.join(missing)}, but objective.name 3kg needs "
                f"{', '.join(EIGHT_LEADS)}; leave data.leads empty or choose another objective"
            )
        if data.normalisation != "mv":
            raise InputError(
                f"data.normalisation {data.normalisation}: objective.name 3kg needs mv, since leads that are scaled "
                "each by itself are no projections of one vector"
            )

    def view(self, batch: ECGBatch) -> ECGBatch:
        """Two views of each first segment."""
        return super().view(another_heart(two_views(batch), self.seed))

    def loss(
        self, encoded: Encoded, batch: ECGBatch, draws: Draws, step: int, share: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent over the rows of all ranks; rows of one patient belong together."""
        embedding_BD, patient_B = (gather_rows(rows, share) for rows in (encoded.embedding_BD, batch.patient_B))
        loss = nt_xent_loss(embedding_BD, patient_B, self.config.global_temperature)
        return loss, {"3kg": loss}


@torch.no_grad()
def another_heart(batch: ECGBatch, seed: int) -> ECGBatch:
    """Each row as if its heart lay otherwise in the chest, with half of each lead's samples zeroed in a circular span.

    Missing leads stay missing. A row that lacks one of the eight leads has no vectorcardiogram and keeps its samples,
    but for the zeroed half.
    """
    batch = as_values(batch)
    drawn_BK = uniform(batch, seed, Purpose.VECTORCARDIOGRAM, 6 + len(LEADS))
    turn_B33 = rotation((2 * drawn_BK[:, :3] - 1) * LARGEST_ANGLE)
    scale_B31 = 1 + (LARGEST_SCALE - 1) * drawn_BK[:, 3:6, None]
    to_vector_3E, back_E3 = _dower(batch.signal_BLT.device)
    map_BEE = back_E3 @ (scale_B31 * turn_B33) @ to_vector_3E
    whole_B11 = batch.gain_BL[:, EIGHT].all(dim=1)[:, None, None]
    seen_BLT = torch.where(whole_B11, twelve_leads(map_BEE @ batch.signal_BLT[:, EIGHT]), batch.signal_BLT)
    return with_values(batch, seen_BLT.masked_fill(_half(drawn_BK[:, 6:], batch), 0))


def rotation(angle_B3: Tensor) -> Tensor:
    """(B, 3, 3): a turn about the z axis, then y, then x, by angles in that order, in radians."""
    (cz, cy, cx), (sz, sy, sx) = angle_B3.cos().unbind(dim=1), angle_B3.sin().unbind(dim=1)
    rows = (
        (cy * cz, -cy * sz, sy),
        (cx * sz + sx * sy * cz, cx * cz - sx * sy * sz, -sx * cy),
        (sx * sz - cx * sy * cz, sx * cz + cx * sy * sz, cx * cy),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _half(start_BL: Tensor, batch: ECGBatch) -> Tensor:
    """(B, L, T) bool: half of the valid samples, from a start in (0, 1) of them on and round to the begin."""
    length_B11 = batch.length_B[:, None, None]
    start_BL1 = (start_BL[..., None] * length_B11).long()
    sample_T = torch.arange(batch.signal_BLT.shape[-1], device=start_BL.device)
    return torch.remainder(sample_T - start_BL1, length_B11.clamp(min=1)) < length_B11 // 2


@cache
def _dower(device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, E) leads -> vector, and (E, 3) its pseudo-inverse; kept, since each copy to a device would wait for it."""
    to_vector_3E = torch.tensor(_INVERSE_DOWER, dtype=torch.float64)
    return to_vector_3E.float().to(device), torch.linalg.pinv(to_vector_3E).float().to(device)
