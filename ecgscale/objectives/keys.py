"""The keys of ``objective.*``: what every objective has, and groups of keys that several objectives share.

Each objective's own ``Config`` stands beside its class and joins the groups that it has a use for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ecgscale.errors import InputError
from ecgscale.objectives.augmentation import NO_NOISE, check_noise

# Keys that earlier versions wrote into the config of each run, whatever its objective.
WRITTEN_BEFORE = {
    *("name", "lead_mask_probability", "augmentations", "augmentation_probability"),
    *("time_mask_share", "time_mask_span", "time_mask_rule", "negatives", "local_temperature"),
    *("global_temperature", "global_form", "code_groups", "codes", "code_width"),
    *("gumbel_start", "gumbel_end", "gumbel_factor", "diversity_weight", "feature_weight"),
}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The pretraining objective; ``name`` chooses it, and the other keys are those of the chosen one."""

    name: str
    """wav2vec2 (local), cmsc (global), wav2vec2+cmsc, simclr, 3kg, or package.module:Class for one of your own."""

    def __post_init__(self) -> None:
        """Raises InputError for a value out of range."""


@dataclass(frozen=True)
class LeadMasking(ObjectiveConfig):
    """Random lead masking."""

    lead_mask_probability: float = 0.5
    """Random lead masking: each lead of each segment is dropped with this probability; 0 turns it off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_share(self, "lead_mask_probability")


@dataclass(frozen=True)
class Noise(ObjectiveConfig):
    """Noise that is added to the signal."""

    augmentations: list[str] = field(default_factory=list)
    """Noise that is added before leads are masked: any of power_line, emg, baseline_shift, baseline_wander. Empty: the
    objective's own, which is all four for simclr and none for the others. none alone: none for simclr either."""
    augmentation_probability: float = 1.0
    """Each augmentation is added to each segment with this probability."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.augmentation_probability <= 1:
            raise InputError(
                f"objective.augmentation_probability {self.augmentation_probability}: give a probability from 0 to 1"
            )
        if self.augmentations != NO_NOISE:
            check_noise(self.augmentations)


@dataclass(frozen=True)
class TimeMasking(ObjectiveConfig):
    """Masked spans of tokens."""

    time_mask_share: float = 0.35
    """Share of the tokens that are masked."""
    time_mask_span: int = 10
    """Tokens of one masked span."""
    time_mask_rule: Literal["fixed", "reference"] = "fixed"
    """fixed: the same number of masked tokens in each row. reference: spans for 0.65 of the tokens before overlap, then
    every row of the contrast batch is trimmed to the least covered one; the number differs from step to step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_no_share(self, "time_mask_share")
        refuse_below_one(self, "time_mask_span")


@dataclass(frozen=True)
class Quantizing(ObjectiveConfig):
    """The product quantizer, whose codes are the targets."""

    code_groups: int = 2
    """Codebooks of the quantizer."""
    codes: int = 320
    """Codes of each codebook."""
    code_width: int = 256
    """Width of the quantised targets and of the predictions."""
    gumbel_start: float = 2.0
    """Gumbel temperature at the first step."""
    gumbel_end: float = 0.5
    """Lowest Gumbel temperature."""
    gumbel_factor: float = 0.999995
    """Factor on the Gumbel temperature per step."""
    diversity_weight: float = 0.1
    """Weight of the code diversity penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below_one(self, "code_groups", "codes", "code_width")
        refuse_nonpositive(self, "gumbel_start", "gumbel_end", "gumbel_factor")
        refuse_negative(self, "diversity_weight")
        if self.code_width % self.code_groups:
            raise InputError(f"objective.code_width {self.code_width} is no multiple of code_groups {self.code_groups}")


@dataclass(frozen=True)
class GlobalContrast(ObjectiveConfig):
    """Contrast of whole segments."""

    global_temperature: float = 0.1
    """Temperature of the global contrast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_nonpositive(self, "global_temperature")


def refuse_no_share(config: ObjectiveConfig, *names: str) -> None:
    """Raises InputError for keys that are not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"objective.{name} {getattr(config, name)}: give a probability below 1")


def refuse_below_one(config: ObjectiveConfig, *names: str) -> None:
    """Raises InputError for counts below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"objective.{name} {getattr(config, name)}: give 1 or more")


def refuse_nonpositive(config: ObjectiveConfig, *names: str) -> None:
    """Raises InputError for keys that are not above 0."""
    for name in names:
        if getattr(config, name) <= 0:
            raise InputError(f"objective.{name} {getattr(config, name):g}: give a positive number")


def refuse_negative(config: ObjectiveConfig, *names: str) -> None:
    """Raises InputError for keys below 0."""
    for name in names:
        if getattr(config, name) < 0:
            raise InputError(f"objective.{name} {getattr(config, name):g}: give 0 or more")
