"""What benches have written, read again: runs, grouped by machine, and two commits held against each other."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ecgscale.bench.measure import Check, Meaning
from ecgscale.errors import InputError, file_error
from ecgscale.files import parse_json_value


class Value(NamedTuple):
    """A scalar with its quartiles where they are known."""

    median: float
    quartiles: tuple[float, float] | None
    meaning: Meaning

    def text(self) -> str:
        said = _digits(self.median)
        return said if self.quartiles is None else f"{said} ({' – '.join(map(_digits, self.quartiles))})"


@dataclass(frozen=True)
class Run:
    """One file of results."""

    path: Path
    name: str  # step, scaling, stream, kernel …
    machine: dict[str, Any]
    sections: list[dict[str, Any]]

    @property
    def where(self) -> str:
        """The machine, in words: results of one are never mixed with those of another."""
        known = self.machine
        gpus = ", ".join(known["gpus"])
        return f"{known['cpu']}, {known['cores']} cores, {known['memory_gb']:.0f} GB" + (f", {gpus}" if gpus else "")

    @property
    def commit(self) -> str:
        """Shortened; with a plus where the tree had changes of its own."""
        commit = self.machine["commit"] or "unknown"
        return commit[:9] + ("+" if commit.endswith("+") else "")

    @property
    def quick(self) -> bool:
        """Whether it only shows that its bench runs. Earlier versions wrote down no more than the command."""
        return bool(self.machine.get("quick", "--quick" in self.machine.get("command", "").split()))

    @property
    def label(self) -> str:
        """The commit, for tables."""
        return f"{self.commit} (quick)" if self.quick else self.commit

    @property
    def versions(self) -> str:
        """Of what a step is made of."""
        return ", ".join(f"{name} {self.machine['versions'][name]}" for name in ("torch", "deepspeed"))

    @property
    def checks(self) -> list[tuple[str, Check]]:
        """What the project must reach, with the title of its section."""
        found = []
        for section in self.sections:
            for check in section.get("checks", []):
                known = {name: value for name, value in check.items() if name != "passed"}
                found.append((section["title"], Check(**known)))
        return found

    @property
    def date(self) -> datetime:
        return datetime.fromisoformat(self.machine["date"])

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every scalar, by its name below the bench's."""
        found = {}
        for section in self.sections:
            spreads, meanings = section.get("spreads", {}), section.get("meanings", {})
            for name, median in section["scalars"].items():
                quartiles = spreads.get(name)
                # Earlier versions wrote no meaning down: what they measured is shown, and not compared.
                meaning = Meaning(**meanings[name]) if name in meanings else Meaning("", ours=False)
                found[name] = Value(median, None if quartiles is None else (quartiles[0], quartiles[1]), meaning)
        return found

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What was measured, by the begin of its scalars' names."""
        return {label: each for section in self.sections for label, each in section.get("settings", {}).items()}


class Change(NamedTuple):
    """A scalar before and after."""

    machine: str
    name: str  # with the bench's before it
    before: Value
    after: Value | None  # None: not measured any more
    commits: tuple[str, str]
    worse_by: float  # relative to before; negative: better; infinite: not measured any more

    @property
    def overlap(self) -> bool:
        """Whether the quartiles of both meet, so that the machine's unrest may be the cause."""
        if self.before.quartiles is None or self.after is None or self.after.quartiles is None:
            return False
        (low, high), (other_low, other_high) = self.before.quartiles, self.after.quartiles
        return low <= other_high and other_low <= high

    def text(self) -> str:
        before = f"{self.name}: {self.before.text()} at {self.commits[0]}"
        if self.after is None:
            return f"{before}, no longer measured at {self.commits[1]}"
        unsure = "; the quartiles overlap" if self.overlap else ""
        return f"{before}, {self.after.text()} at {self.commits[1]}, worse by {self.worse_by:.1%}{unsure}"


def read_runs(places: Iterable[Path]) -> list[Run]:
    """All results in folders and files, the oldest first; a file that is given twice counts once.

    Raises InputError where a place is missing, a file that was named is no result of a bench, or nothing is found.
    """
    places, runs = list(places), {}
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: no such folder or file of results")
        for path in sorted(place.glob("*.json")) if place.is_dir() else [place]:
            run = _read(path)
            if run is not None:
                runs[path.resolve()] = run
            elif place.is_dir():
                print(f"ecgscale: bench report: {path} is no result of a bench and left out", file=sys.stderr)
            else:
                raise InputError(f"{path}: no result of a bench; `ecgscale bench step` writes some")
    if not runs:
        raise InputError(f"{', '.join(map(str, places))}: no results; `ecgscale bench step --out FOLDER` writes some")
    return sorted(runs.values(), key=lambda run: run.date)


def _read(path: Path) -> Run | None:
    """None for JSON of something else."""
    try:
        content = parse_json_value(path.read_bytes())
    except OSError as error:
        raise file_error(path, "cannot read", error) from error
    except InputError as error:
        raise InputError(f"{path}: damaged, {error}; remove it, or measure again") from error
    if not isinstance(content, dict) or not {"machine", "sections"} <= content.keys():
        return None
    try:
        run = Run(path, content.get("name", path.stem.split("-")[0]), content["machine"], content["sections"])
        _ = run.where, run.commit, run.date, run.versions, run.settings
        _ = [value.text() for value in run.values.values()], [check.text() for _, check in run.checks]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        said = f"{type(error).__name__} {error}"
        raise InputError(f"{path}: a damaged result of a bench ({said}); remove it, or measure again") from error
    return run


def by_machine(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each machine, in the order of their first ones."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.where, []).append(run)
    return groups


def sides(runs: Sequence[Run], against: str) -> tuple[list[Run], list[Run]]:
    """Runs before and after: ``against`` is a folder or file of results, or the begin of a commit's name.

    Raises InputError where there are none on a side, or a commit's name fits several.
    """
    if Path(against).exists():
        before = read_runs([Path(against)])
        known = {run.path.resolve() for run in before}
        after = [run for run in runs if run.path.resolve() not in known]
    else:
        fits = {run.commit for run in runs if (run.machine["commit"] or "unknown").startswith(against)}
        if len(fits) > 1 and against not in fits:
            raise InputError(f"--against {against}: fits {' and '.join(sorted(fits))}; give more of it")
        chosen = against if against in fits else next(iter(fits), None)
        before = [run for run in runs if run.commit == chosen]
        after = [run for run in runs if run.commit != chosen]
    if not before:
        commits = dict.fromkeys(run.commit for run in runs)
        raise InputError(f"--against {against}: neither a folder nor a commit of these results ({', '.join(commits)})")
    if not after:
        raise InputError(f"--against {against}: all results are of it; give the folder of others beside it")
    return before, after


def changes(before: Sequence[Run], after: Sequence[Run]) -> list[Change]:
    """Every scalar of ours that was measured before on a machine of both sides; for one that is no longer measured
    `Change.after` is None, unless its bench was not run again. After, the newest commit counts that has run any of
    these benches. Quick runs are left out.

    Raises InputError where nothing of ours was measured before, no bench again, or no machine is on both sides.
    """
    before, after = ([run for run in runs if not run.quick] for runs in (before, after))
    if not (before and after):
        raise InputError("nothing to compare: --quick only shows that a bench runs; measure both sides without it")
    machines = by_machine(after)
    common = [where for where in by_machine(before) if where in machines]
    if not common:
        raise InputError(
            f"nothing to compare: {before[-1].commit} was measured on {before[-1].where}, {after[-1].commit} on "
            f"{after[-1].where}; measure both on one machine"
        )
    found = []
    for where in common:
        olds = _newest(by_machine(before)[where])
        benches = {name.split("/")[0] for name in olds}
        # What only an older commit of those after has would tell of a time before ``before``.
        last = next((run.commit for run in reversed(machines[where]) if run.values and run.name in benches), None)
        newest = [run for run in machines[where] if run.commit == last]
        news, again = _newest(newest), {run.name for run in newest if run.values}
        for name, (old, old_commit) in olds.items():
            if old.median <= 0 or name.split("/")[0] not in again:
                continue
            new, worse_by = None, math.inf
            if name in news:
                new = news[name][0]
                lost = (old.median - new.median) / old.median
                worse_by = lost if old.meaning.better == "higher" else -lost
            found.append(Change(where, name, old, new, (old_commit, newest[0].commit), worse_by))
    if not found:
        raise InputError(
            f"nothing to compare: {before[-1].commit} and {after[-1].commit} have no bench of ecgscale in common; run "
            "the same at both"
        )
    return found


def _newest(runs: Sequence[Run]) -> dict[str, tuple[Value, str]]:
    """Of each scalar that is compared the newest value and its commit; none if its case was measured again without."""
    found: dict[str, tuple[Value, str]] = {}
    for run in runs:  # the oldest first
        named = {f"{run.name}/{name}": value for name, value in run.values.items()}
        again = {_case_of(name, value) for name, value in named.items()}
        found = {name: known for name, known in found.items() if _case_of(name, known[0]) not in again}
        compared = {name: value for name, value in named.items() if value.meaning.better and value.meaning.ours}
        found |= {name: (value, run.commit) for name, value in compared.items()}
    return found


def _case_of(name: str, value: Value) -> str:
    """With the bench's name before it, as the scalar's name has it."""
    return f"{name.partition('/')[0]}/{value.meaning.case}" if value.meaning.case else name


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
