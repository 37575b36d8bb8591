"""`ecgscale bench PART`: the options of each part, and what it does with them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ecgscale.commands.command import Command
from ecgscale.data.source_options import listed
from ecgscale.errors import InputError
from ecgscale.settings import option

if TYPE_CHECKING:
    from ecgscale.bench.step_case import Case
    from ecgscale.bench.step_ranks import Effort

_OUT = Path("runs/bench")

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Measuring(Command):
    """How much is measured, and where the results go."""

    quick: bool = False
    """Only show that it runs."""
    out: Path = _OUT
    """Folder for the results."""


@dataclass(frozen=True, kw_only=True)
class Steps(Measuring):
    """Steps of which models, and how often."""

    preset: list[str] = option(default_factory=lambda: ["base"], several=True, metavar="NAME")
    """Of the model."""
    stem: list[Literal["conv", "patch"]] = option(default_factory=lambda: ["conv"], several=True)
    """Of the model."""
    batch: list[int] = option(default_factory=lambda: [8], several=True, metavar="N")
    """Recordings of a rank, two segments each."""
    precision: list[Literal["fp32", "bf16"]] = option(default_factory=lambda: ["fp32"], several=True)
    """In which a step is computed."""
    zero_stage: list[Literal[0, 1, 2, 3]] = option(default_factory=lambda: [1], several=True)
    """DeepSpeed ZeRO."""
    checkpointing: list[bool | int] = option(default_factory=lambda: [0], several=True, metavar="N")
    """Transformer layers whose activations are recomputed."""
    compile: list[bool] = option(default_factory=lambda: [False], several=True, metavar="off|on")
    """Whether torch.compile is used."""
    samples: int = 2500
    """Of a segment."""
    device: Device | None = None
    """Where; by default a GPU where there is one."""
    threads: int = 0
    """Of each rank; by default the cores are shared out."""
    rounds: int | None = None
    """Of every way; by default 7, on a GPU 9."""
    steps: int | None = None
    """Of a way in a round; by default 1, on a GPU 10."""
    keys: dict[str, Any] = option(default_factory=dict, name="model.KEY", metavar="VALUE")
    """And --objective.KEY, --engine.KEY: keys of `ecgscale pretrain`, which hold for all cases."""

    def __post_init__(self) -> None:
        _refuse_less_than_one("batch", self.batch)
        _refuse_less_than_one("rounds", [] if self.rounds is None else [self.rounds])
        _refuse_less_than_one("steps", [] if self.steps is None else [self.steps])

    def cases(self, ranks: list[int], threads: int, shards: str = "") -> list[Case]:
        """Every combination of the values."""
        from ecgscale.bench.step_case import Axes

        names = ("preset", "stem", "batch", "precision", "zero_stage", "compile")
        axes = Axes(**{name: getattr(self, name) for name in names}, checkpointing=self.checkpointing, ranks=ranks)
        return axes.cases(self.keys, _device(self.device), threads, self.samples, shards)

    def effort(self) -> Effort:
        from ecgscale.bench.step_ranks import Effort

        usual = Effort.least() if self.quick else Effort.usual(_device(self.device) == "cuda")
        return replace(usual, rounds=self.rounds or usual.rounds, steps=self.steps or usual.steps)


@dataclass(frozen=True, kw_only=True)
class Step(Steps):
    """A training step beside plain PyTorch. With several values of an option every combination is measured."""

    ranks: list[int] = option(default_factory=lambda: [1], several=True, metavar="N")
    """Processes."""
    against: list[Literal["ddp", "straightforward", "none"]] = option(
        default_factory=lambda: ["ddp", "straightforward"], several=True, without_value="none"
    )
    """What stands beside: the same model in a plain DDP loop, the method in straightforward PyTorch; --against alone:
    nothing."""
    shards: str = option("", metavar="A,B")
    """Data sets that ecgscale's step reads too, beside."""
    find_batch: bool = False
    """Take the largest batch that fits, not --batch."""
    memory_gb: float | None = None
    """Into which --find-batch fits; by default the GPU's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_less_than_one("ranks", self.ranks)
        if self.memory_gb is not None and not self.find_batch:
            raise InputError(f"--memory-gb {self.memory_gb:g} is for --find-batch, which was not given")
        if self.find_batch and len(self.batch) > 1:
            several = " ".join(map(str, self.batch))
            raise InputError(f"--batch {several} with --find-batch, which finds the batch; leave one of them out")

    def run(self) -> None:
        from ecgscale.bench.step import bench_step

        within_gb = (self.memory_gb or 0.0) if self.find_batch else None
        beside = [name for name in self.against if name != "none"]
        cases = self.cases(self.ranks, self.threads, self.shards)
        print(bench_step(self.out, cases, beside, self.effort(), within_gb).markdown())


@dataclass(frozen=True, kw_only=True)
class Scaling(Steps):
    """A step on 1, 2, 4 ... ranks."""

    ranks: list[int] = option(default_factory=list, several=True, metavar="N")
    """Processes; by default 1, 2, 4 ... to all GPUs or cores."""
    kind: list[Literal["weak", "strong"]] = option(default_factory=lambda: ["weak", "strong"], several=True)
    """The same batch for each rank, or for all together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_less_than_one("ranks", self.ranks)
        for name in ("preset", "stem", "batch", "precision", "zero_stage", "checkpointing", "compile"):
            if len(values := getattr(self, name)) != 1:
                raise InputError(f"--{name.replace('_', '-')} {' '.join(map(str, values))}: give one value")

    def run(self) -> None:
        import torch

        from ecgscale.bench.step import bench_scaling

        cores = len(os.sched_getaffinity(0))
        most = torch.cuda.device_count() if _device(self.device) == "cuda" else cores
        worlds = self.ranks or [1 << power for power in range(most.bit_length())]
        threads = self.threads or max(1, cores // max(worlds))
        [case] = self.cases([1], threads)
        print(bench_scaling(self.out, case, worlds, self.kind, self.effort()).markdown())


@dataclass(frozen=True, kw_only=True)
class Stream(Measuring):
    """The stream beside a bare loop and the webdataset library."""

    shards: str = option("", metavar="A,B")
    """Data sets whose recordings are read; by default simulated ones."""
    seconds: float = 0.5
    """Of each candidate in each round."""

    def run(self) -> None:
        from ecgscale.bench.stream import Effort, bench_stream

        effort = Effort.least() if self.quick else replace(Effort(), seconds=self.seconds)
        print(bench_stream(list(listed(self.shards)), self.out, effort).markdown())


@dataclass(frozen=True, kw_only=True)
class Kernel(Measuring):
    """The fused ops beside eager and compiled PyTorch."""

    device: Device | None = None
    """Where; by default a GPU where there is one."""
    seconds: float | None = None
    """Of each way in each round; by default 0.03 on a GPU, else 0.15."""
    only: list[Literal["patches", "stems", "steps"]] = option(default_factory=list, several=True)
    """Measure only these."""
    no_compile: bool = False
    """Leave out torch.compile, which takes minutes."""

    def run(self) -> None:
        from ecgscale.bench.kernel import Effort, bench_kernel

        device = _device(self.device)
        effort = Effort.least() if self.quick else Effort.usual(device == "cuda")
        if self.no_compile:
            effort = replace(effort, compiled=0)
        if self.seconds is not None:
            effort = replace(effort, seconds=self.seconds)
        chosen = effort.only(self.only) if self.only else effort
        print(bench_kernel(self.out, device, chosen).markdown())


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Tables, plots and comparisons of results. Exit code 1 where something has become worse."""

    results: list[Path] = option(positional=True, several=True, default_factory=lambda: [_OUT])
    """Folders or files of results; by default runs/bench."""
    against: str = option("", metavar="COMMIT|FOLDER")
    """Name what has become worse since then."""
    threshold: str = "5%"
    """Of it, what is named."""
    out: Path | None = None
    """Folder for tables and plots; by default report in the first folder."""

    def __post_init__(self) -> None:
        _ = self.share

    @property
    def share(self) -> float:
        """The threshold, 5% or 0.05. Raises InputError."""
        text = self.threshold
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise InputError(f"--threshold {text!r} is no share such as 5% or 0.05")
        return share

    def run(self) -> None:
        from ecgscale.bench.report import report

        first = self.results[0]
        out = self.out or (first if first.is_dir() else first.parent) / "report"
        text, worse = report(self.results, out, self.against, self.share)
        print(text)
        if worse:
            counted = f"{len(worse)} numbers are worse than at {self.against}, or no longer measured"
            print(f"ecgscale: bench report: {counted}", file=sys.stderr)
            sys.exit(1)


PARTS: dict[str, type[Command]] = {
    "step": Step,
    "scaling": Scaling,
    "stream": Stream,
    "kernel": Kernel,
    "report": Report,
}


def _refuse_less_than_one(name: str, values: list[int]) -> None:
    for value in values:
        if value < 1:
            raise InputError(f"--{name} {value}: give 1 or more")


def _device(chosen: Device | None) -> str:
    import torch

    return chosen or ("cuda" if torch.cuda.is_available() else "cpu")
