"""What a step is measured of: model, objective, engine, batch and ranks; and the synthetic batches that it gets."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import product
from typing import Any

import torch

from ecgscale.config import ENCODER, OBJECTIVE, load
from ecgscale.cost import step_flops
from ecgscale.data.batch import SYNTHETIC_RATE_HZ, ECGBatch, synthetic_batch
from ecgscale.data.selection import DataConfig, Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.source_options import listed
from ecgscale.data.stream import TrainStream
from ecgscale.errors import InputError
from ecgscale.model import EncoderConfig, build_encoder
from ecgscale.model.base import recomputed_layers
from ecgscale.model.encoder import ModelConfig
from ecgscale.objectives import DEFAULT, OBJECTIVES, ObjectiveConfig, build_objective
from ecgscale.objectives.objective import Objective
from ecgscale.training.engine import EngineConfig
from ecgscale.training.loop import TrainConfig

SEED = 0
_PEAK = "engine.peak_tflops"  # only tells of the device: it changes nothing of what is measured
_LONGEST_NAME = 40  # characters of what other keys add to a case's name

Settings = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class StepConfig:
    """The keys of `ecgscale pretrain` that a step depends on."""

    model: EncoderConfig = field(default_factory=ENCODER)
    objective: ObjectiveConfig = field(default_factory=OBJECTIVE)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Case:
    """One step. ``batch`` is recordings of a rank, each of two segments of ``samples`` samples."""

    config: StepConfig
    batch: int
    samples: int = 2500
    ranks: int = 1
    device: str = "cpu"
    threads: int = 1  # of each rank
    shards: str = ""  # data sets that are read beside synthetic batches
    overrides: str = ""  # other keys that were given, as they were given
    found: str = ""  # into what the batch is the largest that fits: largest_in_2gb, or largest, which is the GPU

    def __post_init__(self) -> None:
        for name in ("batch", "ranks", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"bench: --{name} {getattr(self, name)}: give 1 or more")
        if self.samples < self.config.model.patch_samples:
            raise InputError(f"bench: --samples {self.samples}: a token has {self.config.model.patch_samples}")
        _ = self.recomputed  # refuses too many
        config, data = self.config, DataConfig(segment_s=self.samples / SYNTHETIC_RATE_HZ)
        OBJECTIVES.find(config.objective.name).check(config.model, config.objective, data, SYNTHETIC_RATE_HZ)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("bench: --device cuda, but PyTorch sees no GPU; leave it out to measure on the CPU")
        if self.device == "cuda" and self.ranks > torch.cuda.device_count():
            raise InputError(f"bench: --ranks {self.ranks}, but this machine shows {torch.cuda.device_count()} GPUs")

    @property
    def rows(self) -> int:
        """Segments of a rank."""
        return OBJECTIVES.find(self.config.objective.name).segments * self.batch

    @property
    def recomputed(self) -> int:
        """Layers that are recomputed in the backward pass. Raises InputError for more than there are."""
        model, asked = self.config.model, self.config.engine.activation_checkpointing
        if isinstance(model, ModelConfig):
            return recomputed_layers(asked, model.depth)
        with torch.device("meta"):  # how many there are, an encoder of one's own says when it is built
            return build_encoder(model, asked).recomputed_layers

    def settings(self) -> Settings:
        """What tells cases apart, by stable names. An encoder without presets has its name there."""
        model, engine = self.config.model, self.config.engine
        preset, stem = (model.preset, model.stem) if isinstance(model, ModelConfig) else (model.encoder, "own")
        return {
            "preset": preset,
            "stem": stem,
            "objective": self.config.objective.name,
            "batch": self.batch,
            "samples": self.samples,
            "precision": engine.precision,
            "zero_stage": engine.zero_stage,
            "activation_checkpointing": self.recomputed,
            "compile": engine.compile,
            "ranks": self.ranks,
            "threads": self.threads,
            "device": self.device,
            "overrides": self.overrides,
        }

    @property
    def title(self) -> str:
        """base, batch 8, fp32, ZeRO-1: what a reader needs, and the rest only where it is not usual."""
        usual, own = Case(StepConfig(), self.batch).settings(), self.settings()
        parts = [str(own["preset"]), f"batch {self.batch}", str(own["precision"]), f"ZeRO-{own['zero_stage']}"]
        said = ("preset", "batch", "precision", "zero_stage", "threads", "device", "overrides")
        parts += [f"{name} {value}" for name, value in own.items() if name not in said and value != usual[name]]
        return ", ".join([*parts, *([self._overrides_in_short] if self.overrides else [])])

    @property
    def key(self) -> str:
        """The same as part of a scalar's name: base/conv/b8/fp32/zero1/r1/cpu2, with two threads of each rank."""
        own = self.settings()
        rest = [f"{name}_{own[name]}" for name in ("activation_checkpointing", "compile") if own[name]]
        rest += [f"samples_{self.samples}"] if self.samples != Case.samples else []
        rest += [str(own["objective"])] if own["objective"] != DEFAULT else []
        rest += [self._overrides_in_short] if self.overrides else []
        batch = self.found or f"b{self.batch}"
        first = [str(own["preset"]), str(own["stem"]), batch, str(own["precision"])]
        device = f"cpu{self.threads}" if self.device == "cpu" else self.device
        return "/".join([*first, f"zero{own['zero_stage']}", f"r{self.ranks}", device, *rest])

    @property
    def _overrides_in_short(self) -> str:
        """model.dropout_0; many of them become a number, which the settings explain."""
        said = re.sub(r"[^\w.]+", "_", self.overrides).strip("_")
        return said if len(said) <= _LONGEST_NAME else f"keys_{sha256(said.encode()).hexdigest()[:8]}"

    def flops(self) -> int:
        """Model FLOPs of a rank's forward and backward pass."""
        model, objective = self.config.model, self.config.objective
        return step_flops(model, objective, self.rows, self.samples, self.rows * self.ranks)

    def build(self) -> Objective:
        """The objective with its initial weights, the same in every process."""
        torch.manual_seed(SEED)
        config = self.config
        checkpointing = config.engine.activation_checkpointing
        return build_objective(config.model, config.objective, SEED, SYNTHETIC_RATE_HZ, checkpointing)

    def without_dropout(self) -> Case:
        model = self.config.model
        if isinstance(model, ModelConfig):
            model = replace(model, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0)
        return replace(self, config=replace(self.config, model=model))


@dataclass(frozen=True)
class Axes:
    """Values of each setting; every combination of them is a case."""

    preset: Sequence[str] = ("base",)
    stem: Sequence[str] = ("conv",)
    batch: Sequence[int] = (8,)
    precision: Sequence[str] = ("fp32",)
    zero_stage: Sequence[int] = (1,)
    checkpointing: Sequence[bool | int] = (0,)
    compile: Sequence[bool] = (False,)
    ranks: Sequence[int] = (1,)

    def cases(self, keys: Mapping[str, Any], device: str, threads: int, samples: int, shards: str = "") -> list[Case]:
        """``keys`` are `model.KEY` and the like with their values, of all cases; ``threads`` 0 shares the cores out.

        What does not go together is left out, which stderr says. Raises InputError where nothing remains.
        """
        overrides = " ".join(f"--{key} {_as_word(value)}" for key, value in keys.items() if key != _PEAK)
        cases: list[Case] = []
        refused: list[InputError] = []
        for preset, stem, precision, stage, checkpointing, compiled, batch, ranks in product(
            self.preset,
            self.stem,
            self.precision,
            self.zero_stage,
            self.checkpointing,
            self.compile,
            self.batch,
            self.ranks,
        ):
            shape = {"preset": preset, "stem": stem}
            # Usual ones are left out, since an encoder of one's own has neither key.
            values: dict[str, Any] = {
                f"model.{key}": value for key, value in shape.items() if value not in getattr(Axes, key)
            }
            values |= {
                "engine.precision": precision,
                "engine.zero_stage": stage,
                "engine.activation_checkpointing": checkpointing,
                "engine.compile": compiled,
            }
            usable = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
            try:
                config = load(StepConfig, [], values | dict(keys))
                cases.append(Case(config, batch, samples, ranks, device, usable, shards, overrides))
            except InputError as error:
                refused.append(error)
        if not cases:
            raise refused[0]
        for reason in dict.fromkeys(map(str, refused)):
            print(f"bench: left out: {reason}", file=sys.stderr, flush=True)
        return cases


def _as_word(value: Any) -> str:
    """A value as a command line gives it."""
    if isinstance(value, list):
        return ",".join(map(_as_word, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- batches ---------------------------------------------------------------------------------------------------------


def synthetic_batches(case: Case, rank: int) -> Iterator[ECGBatch]:
    """Without end, from a few that are made beforehand, as a loader that is never late."""
    torch.manual_seed(1 + rank)
    pool = [synthetic_batch(case.rows, case.samples, (4 * rank + i) * case.batch) for i in range(4)]
    if case.device == "cuda":
        pool = [batch.pin_memory() for batch in pool]
    while True:
        yield from pool


def shard_stream(case: Case, rank: int) -> TrainStream:
    """What `ecgscale pretrain` reads of the case's shards; raises InputError where they do not give such batches."""
    places = list(listed(case.shards))
    data = DataConfig(shards=places)
    shards = ShardSet.open(places, data.cache)
    segment_s, segments = case.samples / shards.rate_hz, OBJECTIVES.find(case.config.objective.name).segments
    data = DataConfig(shards=places, segment_s=segment_s, min_record_s=segments * segment_s)
    selection = Selection(shards, data, "train")
    order = TrainConfig(global_batch=case.batch * case.ranks).order(selection, case.ranks)
    return TrainStream(selection, order, rank, case.ranks, segments)
