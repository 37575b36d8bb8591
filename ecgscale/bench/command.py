"""The options of `ecgscale bench PART`, and what each part does with them."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecgscale.data.source_options import listed
from ecgscale.errors import InputError

if TYPE_CHECKING:
    from ecgscale.bench.step_case import Case
    from ecgscale.bench.step_ranks import Effort

_OUT = Path("runs/bench")
_KEYS = "--model.KEY, --objective.KEY and --engine.KEY VALUE, as of `ecgscale pretrain`, hold for all cases"


def add_parts(parts: Any) -> None:
    """A parser for each part, whose ``run`` takes the options and what is left of the command line."""
    _add_step(parts)
    _add_scaling(parts)
    _add_stream(parts)
    _add_kernel(parts)
    _add_report(parts)


def refuse_keys(part: str, keys: list[str]) -> None:
    """Raises InputError for options that a part does not know."""
    if keys:
        raise InputError(f"bench {part}: unrecognized arguments: {' '.join(keys)}; see `ecgscale bench {part} --help`")


# -- step and scaling ------------------------------------------------------------------------------------------------


def _add_step(parts: Any) -> None:
    step = parts.add_parser("step", help="a training step beside plain PyTorch", allow_abbrev=False, epilog=_KEYS)
    step.set_defaults(run=_step)
    _add_case(step, several="+")
    step.add_argument("--ranks", type=_count, nargs="+", default=[1], metavar="N", help="processes (default 1)")
    step.add_argument(
        "--against",
        nargs="*",
        choices=("ddp", "straightforward"),
        default=["ddp", "straightforward"],
        help="what stands beside: the same model in a plain DDP loop, the method in straightforward PyTorch "
        "(default: both; --against alone: none)",
    )
    step.add_argument("--shards", default="", metavar="A,B", help="data sets that ecgscale's step reads too, beside")
    step.add_argument("--find-batch", action="store_true", help="take the largest batch that fits, not --batch")
    step.add_argument("--memory-gb", type=float, help="into which --find-batch fits (default: the GPU's)")


def _add_scaling(parts: Any) -> None:
    scaling = parts.add_parser("scaling", help="a step on 1, 2, 4 ... ranks", allow_abbrev=False, epilog=_KEYS)
    scaling.set_defaults(run=_scaling)
    _add_case(scaling, several=None)
    scaling.add_argument(
        "--ranks", type=_count, nargs="+", metavar="N", help="processes (default: 1, 2, 4 ... to all GPUs or cores)"
    )
    scaling.add_argument(
        "--kind", nargs="+", choices=("weak", "strong"), default=["weak", "strong"], help="default: both"
    )


def _add_case(parser: argparse.ArgumentParser, several: str | None) -> None:
    """Options that make cases; with ``several`` values of each, every combination is one."""

    def add(name: str, what: str, default: Any, **more: Any) -> None:
        parser.add_argument(name, nargs=several, default=[default] if several else default, help=what, **more)

    add("--preset", "of the model (default base)", "base", metavar="NAME")
    add("--stem", "default conv", "conv", choices=("conv", "patch"))
    add("--batch", "recordings of a rank, two segments each (default 8)", 8, type=_count, metavar="N")
    add("--precision", "default fp32", "fp32", choices=("fp32", "bf16"))
    add("--zero-stage", "DeepSpeed ZeRO (default 1)", 1, type=int, choices=(0, 1, 2, 3))
    add("--checkpointing", "transformer layers whose activations are recomputed (default 0)", "0", metavar="N")
    add("--compile", "torch.compile (default off)", "off", choices=("off", "on"))
    parser.add_argument("--samples", type=int, default=2500, help="of a segment (default 2500)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: a GPU where there is one)")
    parser.add_argument("--threads", type=int, default=0, help="of each rank (default: the cores shared out)")
    parser.add_argument("--rounds", type=_count, help="of every way (default 7; on a GPU 9)")
    parser.add_argument("--steps", type=_count, help="of a way in a round (default 1; on a GPU 10)")
    _add_quick(parser)
    _add_out(parser)


def _step(options: argparse.Namespace, keys: list[str]) -> None:
    from ecgscale.bench.step import bench_step

    if options.memory_gb is not None and not options.find_batch:
        raise InputError(f"bench step: --memory-gb {options.memory_gb:g} is for --find-batch, which was not given")
    if options.find_batch and len(options.batch) > 1:
        said = " ".join(map(str, options.batch))
        raise InputError(f"bench step: --batch {said} with --find-batch, which finds the batch; leave one of them out")
    device = _device(options)
    cases = _cases(options, keys, device, options.ranks, options.shards)
    within_gb = (options.memory_gb or 0.0) if options.find_batch else None
    print(bench_step(options.out, cases, options.against, _effort(options, device), within_gb).markdown())


def _scaling(options: argparse.Namespace, keys: list[str]) -> None:
    import torch

    from ecgscale.bench.step import bench_scaling

    device = _device(options)
    most = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    worlds = options.ranks or [1 << power for power in range(most.bit_length())]
    if not options.threads:
        options.threads = max(1, len(os.sched_getaffinity(0)) // max(worlds))
    cases = _cases(options, keys, device, [1])
    print(bench_scaling(options.out, cases[0], worlds, options.kind, _effort(options, device)).markdown())


def _cases(options: argparse.Namespace, keys: list[str], device: str, ranks: list[int], shards: str = "") -> list[Case]:
    from ecgscale.bench.step_case import Axes

    names = ("preset", "stem", "batch", "precision", "zero_stage", "compile")
    values = {name: getattr(options, name) for name in names} | {"activation_checkpointing": options.checkpointing}
    several = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return Axes(**several, ranks=ranks).cases(keys, device, options.threads, options.samples, shards)


def _effort(options: argparse.Namespace, device: str) -> Effort:
    from ecgscale.bench.step_ranks import Effort

    effort = Effort.least() if options.quick else Effort.usual(device == "cuda")
    for name in ("rounds", "steps"):
        effort = replace(effort, **{name: getattr(options, name) or getattr(effort, name)})
    return effort


def _device(options: argparse.Namespace) -> str:
    import torch

    chosen: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return chosen


# -- stream and kernel -----------------------------------------------------------------------------------------------


def _add_stream(parts: Any) -> None:
    stream = parts.add_parser(
        "stream", help="the stream beside a bare loop and the webdataset library", allow_abbrev=False
    )
    stream.set_defaults(run=_stream)
    stream.add_argument(
        "--shards", default="", metavar="A,B", help="data sets whose recordings are read (default: simulated ones)"
    )
    stream.add_argument("--seconds", type=float, default=0.5, help="of each candidate in each round (default 0.5)")
    _add_quick(stream)
    _add_out(stream)


def _add_kernel(parts: Any) -> None:
    kernel = parts.add_parser("kernel", help="the fused ops beside eager and compiled PyTorch", allow_abbrev=False)
    kernel.set_defaults(run=_kernel)
    kernel.add_argument("--device", choices=("cpu", "cuda"), help="where (default: a GPU where there is one)")
    kernel.add_argument("--seconds", type=float, help="of each way in each round (default 0.03 on a GPU, else 0.15)")
    kernel.add_argument("--only", choices=("patches", "stems", "steps"), nargs="+", help="measure only these")
    kernel.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    _add_quick(kernel)
    _add_out(kernel)


def _stream(options: argparse.Namespace, keys: list[str]) -> None:
    refuse_keys("stream", keys)
    from ecgscale.bench.stream import Effort, bench_stream

    effort = Effort.least() if options.quick else replace(Effort(), seconds=options.seconds)
    print(bench_stream(list(listed(options.shards)), options.out, effort).markdown())


def _kernel(options: argparse.Namespace, keys: list[str]) -> None:
    refuse_keys("kernel", keys)
    from ecgscale.bench.kernel import Effort, bench_kernel

    device = _device(options)
    effort = Effort.least() if options.quick else Effort.usual(device == "cuda")
    if options.no_compile:
        effort = replace(effort, compiled=0)
    if options.seconds is not None:
        effort = replace(effort, seconds=options.seconds)
    chosen = effort.only(options.only) if options.only else effort
    print(bench_kernel(options.out, device, chosen).markdown())


# -- report ----------------------------------------------------------------------------------------------------------


def _add_report(parts: Any) -> None:
    report = parts.add_parser("report", help="tables, plots and comparisons of results", allow_abbrev=False)
    report.set_defaults(run=_report)
    report.add_argument(
        "results", type=Path, nargs="*", default=[_OUT], help=f"folders or files of results (default {_OUT})"
    )
    report.add_argument("--against", default="", metavar="COMMIT|FOLDER", help="name what has become worse since then")
    report.add_argument("--threshold", type=_share, default=0.05, metavar="5%", help="that is named (default 5%%)")
    report.add_argument("--out", type=Path, help="folder for tables and plots (default: report in the first folder)")


def _report(options: argparse.Namespace, keys: list[str]) -> None:
    """Exit code 1 where something has become worse."""
    refuse_keys("report", keys)
    from ecgscale.bench.report import report

    first: Path = options.results[0]
    out = options.out or (first if first.is_dir() else first.parent) / "report"
    text, worse = report(options.results, out, options.against, options.threshold)
    print(text)
    if worse:
        said = f"{len(worse)} numbers are worse than at {options.against}, or no longer measured"
        print(f"ecgscale: bench report: {said}", file=sys.stderr)
        sys.exit(1)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give 1 or more")
    return int(text)


def _share(text: str) -> float:
    """5% or 0.05."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 5% or 0.05")
    return share


def _add_quick(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="only show that it runs")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=_OUT, help=f"folder for the results (default {_OUT})")
