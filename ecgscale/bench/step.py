"""`ecgscale bench step`: ecgscale's training step beside a plain DDP loop and beside straightforward PyTorch; and
`ecgscale bench scaling`: the same step on 1, 2, 4 … ranks of this machine.

A step is one micro-step of all ranks with its update, on synthetic batches that are ready in time. ECG are recordings,
of two segments each; FLOPs are those of the model (ecgscale/cost.py), the same for every way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ecgscale.bench.measure import Check, Meaning, Report, Section, ratios, reporting, spread
from ecgscale.bench.step_case import Case, StepConfig, shard_stream
from ecgscale.bench.step_ranks import Effort, FailedError, Group, Taken, TooLargeError, equality_of, take_turns
from ecgscale.bench.step_ways import DDP, OURS, PRODUCT, PRODUCT_SIDE, SHARDS, STRAIGHTFORWARD, TITLES, possible
from ecgscale.errors import InputError
from ecgscale.training.metrics import device_peak

# In fp32, relative: of the loss and of the gradients. A GPU's kernels add up in their own order.
_MOST_ERROR = {"cpu": (1e-5, 1e-4), "cuda": (1e-4, 1e-3)}
_HEADER = ("way", "ECG/s", "step, ms", "TFLOP/s per rank", "of a large product", "MFU", "peak, GB per rank")
_FEW = 2  # recordings with which ways are held against each other


def bench_step(
    out: Path,
    cases: Sequence[Case],
    baselines: Sequence[str],
    effort: Effort,
    find_within_gb: float | None = None,
) -> Report:
    """Measure every case and write to ``out``; what was measured before an error is written too.

    Args:
        baselines: what stands beside ecgscale where it is possible: ddp, straightforward.
        find_within_gb: measure each case with the largest batch that fits into so many GB; 0: into the GPU. On a GPU
            ecgscale is then measured alone, as in the trials: others would hold memory that the batch needs.

    Raises InputError where no case could be measured at all, and for shards that do not give its batches.
    """
    for case in cases:
        if case.shards:
            shard_stream(case, rank=0)
    held: dict[str, list[Check] | str] = {}  # by model and objective
    with reporting("step", "A training step", out, effort.quick) as report:
        for case in cases:
            chosen = case
            if find_within_gb is not None:
                try:
                    within = f"largest_in_{find_within_gb:g}gb" if find_within_gb else "largest"
                    chosen = replace(case, batch=largest_batch(case, find_within_gb), found=within)
                except (NothingFitsError, FailedError) as error:
                    report.sections.append(Section(case.title, _HEADER[:2], [(TITLES[OURS], str(error))]))
                    continue
            section = measure_case(chosen, baselines, effort, find_within_gb is not None and case.device == "cuda")
            if f"{chosen.key}/{STRAIGHTFORWARD}/ecg_per_s" in section.scalars:
                known_as = repr((case.config.model, case.config.objective, case.samples))
                if known_as not in held:
                    held[known_as] = equal_checks(chosen)
                _add_equal(section, held[known_as])
            if find_within_gb is not None:
                name = f"{chosen.key}/ecgscale/largest_batch"
                section.scalar(name, chosen.batch, Meaning("recordings", "higher", case=chosen.key))
                where = f"{find_within_gb:g} GB" if find_within_gb else "the GPU"
                section.notes.insert(0, f"{chosen.batch} recordings per rank are the most that fit into {where}.")
            report.sections.append(section)
    return report


def measure_case(case: Case, baselines: Sequence[str], effort: Effort, alone: bool = False) -> Section:
    """One case: ecgscale, the baselines that are possible, and what the device multiplies at most.

    Args:
        alone: only ecgscale, with all of the device's memory.
    """
    ways = [OURS] if alone else [way for way in possible(case) if way in (OURS, SHARDS, *baselines)]
    wanted = {way: (case, way) for way in (ways if alone else [*ways, PRODUCT])}
    taken = take_turns(wanted, effort, case.title)
    section = Section(case.title, _HEADER)
    peak = device_peak(case.config.engine, torch.device(case.device)) or 0.0
    product_flops = _product_flops(case, taken)
    for way in ways:
        section.rows.append(_row(section, case, way, taken, product_flops, peak))
    section.keep(taken.rounds)
    _compare(section, case, taken, effort)
    if product_flops and section.scalars:
        section.notes.append(
            f"A product of {PRODUCT_SIDE[case.device]:,}² matrices in {case.config.engine.precision} took turns with "
            f"the steps: {product_flops / 1e12:.3g} TFLOP/s per rank."
        )
        meaning = Meaning("TFLOP/s", "higher", ours=False, case=case.key)
        section.scalar(f"{case.key}/product/tflops", product_flops / 1e12, meaning)
    if case.overrides:
        section.notes.append(f"With {case.overrides}.")
    left_out = [TITLES[way] for way in baselines if way not in ways]
    if alone:
        section.notes.append("Alone on the GPU: whatever took turns with it would hold memory that this batch needs.")
    elif left_out:
        section.notes.append(f"Not written for this model or objective: {', '.join(left_out)}.")
    return section


def _row(section: Section, case: Case, way: str, taken: Taken, product_flops: float, peak: float) -> tuple[str, ...]:
    """Of the table; its numbers become scalars too."""
    if way in taken.failed:
        return (TITLES[way], taken.failed[way], *[""] * (len(section.header) - 2))
    rounds, label = taken.rounds[way], f"{case.key}/{way}"
    per_s, step_ms = (
        spread(values)
        for values in (
            [one.per_s for one in rounds],
            [1e3 * one.wall_s * case.batch * case.ranks / one.units for one in rounds],
        )
    )
    flop_per_s = case.flops() / (step_ms.median / 1e3)
    # The straightforward way computes in fp32 whatever the case's precision is.
    comparable = way != STRAIGHTFORWARD or case.config.engine.precision == "fp32"
    section.settings[label] = case.settings() | {"way": way}
    means = partial(Meaning, ours=way in (OURS, SHARDS), case=case.key)
    # A step with a larger batch takes longer and more memory, which is no loss where it is the largest that fits.
    less: Literal["lower", ""] = "" if case.found else "lower"
    section.scalar(f"{label}/ecg_per_s", per_s, means("recordings/s", "higher"))
    section.scalar(f"{label}/step_ms", step_ms, means("ms", less))
    section.scalar(f"{label}/tflops", flop_per_s / 1e12, means("TFLOP/s of a rank", "higher"))
    section.scalar(f"{label}/peak_gb", taken.peak_bytes[way] / 1e9, means("GB of a rank", less))
    shares = []
    for name, most in (("of_product", product_flops), ("mfu", peak)):
        shares.append(f"{flop_per_s / most:.1%}" if most and comparable else "unknown")
        if most and comparable:
            section.scalar(f"{label}/{name}", flop_per_s / most, means("share", "higher"))
    peak_gb = f"{taken.peak_bytes[way] / 1e9:.2f}"
    return TITLES[way], per_s.text(2), step_ms.text(1), f"{flop_per_s / 1e12:.3g}", *shares, peak_gb


def _compare(section: Section, case: Case, taken: Taken, effort: Effort) -> None:
    """How many times as fast ecgscale is, round by round, and whether the project's bounds are reached."""
    if OURS not in taken.rounds:
        return
    times = Meaning("times as fast", "higher", case=case.key)
    for way in (DDP, STRAIGHTFORWARD):
        if way not in taken.rounds:
            continue
        faster = ratios(taken.rounds[OURS], taken.rounds[way])
        section.scalar(f"{case.key}/ecgscale_over_{way}", faster, times)
        said = f"ecgscale is {faster.text(2)} times as fast as {TITLES[way]}"
        if case.device == "cpu":
            by_cpu = ratios(taken.rounds[OURS], taken.rounds[way], cpu=True)
            section.scalar(f"{case.key}/ecgscale_over_{way}_cpu", by_cpu, times)
            said += f"; by CPU time {by_cpu.text(2)}"
        section.notes.append(f"{said}.")
        bound = None if effort.quick else bound_of(case, way)
        if bound is not None:
            section.checks.append(Check(f"times as fast as {TITLES[way]}", faster.median, bound))
    if SHARDS in taken.rounds:
        kept = ratios(taken.rounds[SHARDS], taken.rounds[OURS])
        section.scalar(f"{case.key}/shards_over_ecgscale", kept, times)
        section.notes.append(f"Reading {case.shards} it is {kept.text(3)} times as fast as with synthetic batches.")
        if not effort.quick and _is_h100(case):
            section.checks.append(Check("times as fast from shards as from synthetic batches", kept.median, 0.97))
    mfu, bound = section.scalars.get(f"{case.key}/{OURS}/mfu"), mfu_bound(case)
    if mfu is not None and bound is not None and not effort.quick:
        section.checks.append(Check("MFU", mfu, bound))


def bound_of(case: Case, way: str) -> float | None:
    """How many times as fast as a way ecgscale must be; None where nothing is demanded."""
    said, engine = case.settings(), case.config.engine
    if case.overrides or said["preset"] != "base" or said["stem"] != "conv" or case.samples != Case.samples:
        return None
    if engine.activation_checkpointing or engine.compile:
        return None
    if case.device == "cpu":
        asked = way == STRAIGHTFORWARD and case.batch == 8 and case.threads == 2 and case.ranks == 1
        return {"fp32": 1.4, "bf16": 2.2}[engine.precision] if asked else None
    if not _is_h100(case):
        return None
    if way == DDP:
        return 0.98 if engine.zero_stage == 1 else None
    return 5.0 if engine.precision == "bf16" else None


def mfu_bound(case: Case) -> float | None:
    """Demanded of an H100; None elsewhere."""
    if case.overrides or not _is_h100(case):
        return None
    asked = {"base": 0.45, "large": 0.5}
    return asked.get(str(case.settings()["preset"])) if case.config.engine.precision == "bf16" else None


def _is_h100(case: Case) -> bool:
    """Whether the project's bounds for GPUs are meant for this one."""
    return case.device == "cuda" and "H100" in torch.cuda.get_device_name()


def equal_checks(case: Case) -> list[Check] | str:
    """Whether ecgscale and the straightforward way give the same loss and gradients; why not where they cannot run."""
    engine = StepConfig().engine
    small = replace(case, batch=min(case.batch, _FEW), ranks=1, config=replace(case.config, engine=engine))
    try:
        found = equality_of(small)
    except FailedError as error:
        return str(error)
    return [
        Check(f"{what}, relative difference from {TITLES[STRAIGHTFORWARD]}", error, bound, at_least=False)
        for what, error, bound in zip(("loss", "gradients"), found, _MOST_ERROR[case.device], strict=True)
    ]


def _add_equal(section: Section, held: list[Check] | str) -> None:
    if isinstance(held, str):
        section.notes.append(f"Losses were not held against {TITLES[STRAIGHTFORWARD]}: {held}.")
    else:
        section.checks += held


def _product_flops(case: Case, taken: Taken) -> float:
    """FLOP/s of a large product on each rank; 0 where it did not run. A product counts as a step of the case."""
    rounds = taken.rounds.get(PRODUCT)
    if rounds is None:
        return 0.0
    products_per_s = spread([one.per_s for one in rounds]).median / (case.batch * case.ranks)
    return 2.0 * PRODUCT_SIDE[case.device] ** 3 * products_per_s


# -- the largest batch -----------------------------------------------------------------------------------------------

_MOST = 1 << 16  # recordings of a rank; nothing is gained beyond


class NothingFitsError(Exception):
    """Not even one recording."""


def largest_batch(case: Case, within_gb: float) -> int:
    """Recordings of a rank with which ecgscale's step fits; the batch that the case has does not matter.

    Args:
        within_gb: what all ranks' processes may hold on a CPU, or each rank on its GPU; 0: what the GPU has.

    Raises NothingFitsError where not even one recording fits, InputError on a CPU where no limit is given.
    """
    if case.device == "cpu" and within_gb <= 0:
        raise InputError("bench: --find-batch on a CPU needs --memory-gb, what all ranks together may hold")

    def fits(batch: int) -> bool:
        tried = replace(case, batch=batch)
        print(f"trying {tried.title}: ", end="", file=sys.stderr, flush=True)
        fitting = _fits(tried, round(within_gb * 1e9))
        print("fits" if fitting else "does not fit", file=sys.stderr, flush=True)
        return fitting

    found = largest(fits, _MOST)
    if not found:
        raise NothingFitsError(
            f"not even a batch of 1 fits{f' into {within_gb:g} GB' if within_gb else ''}; "
            "give more memory, a smaller model or --checkpointing"
        )
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that fits, where all smaller ones fit too; 0 where none does.

    None is tried that is more than twice as large as one that fits: what is far too large takes longest to fail.
    """
    good, bad = 0, most + 1
    trial = 1
    while bad - good > 1:
        if fits(trial):
            good = trial
        else:
            bad = trial
        trial = min(2 * good, most) if bad > most else (good + bad) // 2
    return good


def _fits(case: Case, within_bytes: int) -> bool:
    """Two steps: the first makes the optimizer's state, the second has it beside the activations."""
    try:
        with Group(case, OURS, limit_bytes=within_bytes) as group:
            group.take(2)
            needed = sum(group.peak_bytes) if case.device == "cpu" else max(group.peak_bytes)
    except TooLargeError:
        return False
    return not within_bytes or needed <= within_bytes


# -- scaling over ranks ----------------------------------------------------------------------------------------------

WEAK, STRONG = "weak", "strong"


def bench_scaling(out: Path, case: Case, worlds: Sequence[int], kinds: Sequence[str], effort: Effort) -> Report:
    """Measure ``case`` on each number of ranks and write to ``out``.

    The batch of the case is that of a rank in weak scaling; in strong scaling it is that of a rank on the most ranks.
    Raises InputError where numbers of ranks do not go together, or nothing could be measured.
    """
    worlds = sorted(set(worlds))
    if worlds[0] != 1:
        raise InputError(f"bench scaling: --ranks {' '.join(map(str, worlds))}: 1 must be among them")
    cases = {kind: scaled(case, worlds, kind) for kind in kinds}
    with reporting("scaling", "Scaling over ranks of one machine", out, effort.quick) as report:
        for kind, each in cases.items():
            report.sections.append(_scaling_section(kind, each, effort))
    return report


def scaled(case: Case, worlds: Sequence[int], kind: str) -> list[Case]:
    """The case on each number of ranks; raises InputError where a batch cannot be shared out."""
    if kind == WEAK:
        return [replace(case, ranks=world) for world in worlds]
    whole = case.batch * worlds[-1]
    for world in worlds:
        if whole % world:
            raise InputError(f"bench scaling: --ranks {world} cannot share {whole} recordings (--batch × most ranks)")
    return [replace(case, ranks=world, batch=whole // world) for world in worlds]


def _scaling_section(kind: str, cases: Sequence[Case], effort: Effort) -> Section:
    first, by_name = cases[0], {str(case.ranks): case for case in cases}
    batch = f"batch {first.batch}" if kind == STRONG else f"batch {first.batch} per rank"
    title = f"{kind.capitalize()} scaling, {first.title.replace(f'batch {first.batch}', batch)}"
    taken = take_turns({name: (case, OURS) for name, case in by_name.items()}, effort, title)
    header = ("ranks", "batch of a rank", "threads of a rank", "ECG/s", "step, ms", "efficiency", "peak, GB per rank")
    section = Section(title, header)
    for name, case in by_name.items():
        start = (name, str(case.batch), str(case.threads))
        if name in taken.failed:
            section.rows.append((*start, taken.failed[name], "", "", ""))
            continue
        rounds = taken.rounds[name]
        per_s = spread([one.per_s for one in rounds])
        step_ms = spread([1e3 * one.wall_s / effort.steps for one in rounds])
        label, efficient = f"{kind}/{case.key}/ecgscale", "unknown"
        section.settings[label] = case.settings() | {"way": OURS, "scaling": kind}
        section.scalar(f"{label}/ecg_per_s", per_s, Meaning("recordings/s", "higher"))
        section.scalar(f"{label}/step_ms", step_ms, Meaning("ms", "lower"))
        if "1" in taken.rounds:
            faster = ratios(rounds, taken.rounds["1"])
            efficiency = type(faster)(*(part / case.ranks for part in faster))
            section.scalar(f"{label}/efficiency", efficiency, Meaning("share", "higher"))
            efficient = efficiency.text(3)
        peak_gb = taken.peak_bytes[name] / 1e9
        section.rows.append((*start, per_s.text(2), step_ms.text(1), efficient, f"{peak_gb:.2f}"))
    section.keep(taken.rounds, "ranks ")
    return section
