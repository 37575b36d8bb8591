"""`ecgscale bench scaling`: the same step on 1, 2, 4 … ranks of this machine.

Weak scaling keeps the batch of a rank, strong scaling that of all ranks. Efficiency is the rate of W ranks over W times
the rate of one. On a CPU every rank has the same number of threads, those that it has on the most ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ecgscale.bench.measure import Meaning, Report, Section, ratios, reporting, spread
from ecgscale.bench.step_case import Case
from ecgscale.bench.step_turns import Effort, take_turns
from ecgscale.bench.step_ways import OURS
from ecgscale.errors import InputError

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
            report.sections.append(_section(kind, each, effort))
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


def _section(kind: str, cases: Sequence[Case], effort: Effort) -> Section:
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
