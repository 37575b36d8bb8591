"""From commands to stages: what is run in which folder, side by side or one after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from ecgscale.data.shards import MANIFEST
from ecgscale.errors import InputError
from ecgscale_launch.commands import OF_RANKS
from ecgscale_launch.job_record import Work, read_work
from ecgscale_launch.launch_config import LaunchConfig

_IN_PARTS = ("ingest", "reproduce", "scaling-law")  # the commands that know --part I/N and --merge


@dataclass(frozen=True)
class Piece:
    """One job: what it does, and its run folder."""

    run: Path
    work: Work
    swept: dict[str, str] = field(default_factory=dict)  # what a sweep gave it


@dataclass(frozen=True)
class Stage:
    """Pieces that run side by side, as one job or as an array, after the stage before has succeeded."""

    run: Path
    pieces: list[Piece]


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for beside the cluster."""

    commands: list[list[str]]
    run: str = ""
    sweeps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    parts: int = 0
    after: tuple[str, ...] = ()
    at_once: int = 0


def stages(wanted: Wanted) -> list[Stage]:
    """The stages of a job or a chain. Raises InputError where something does not go together."""
    if len(wanted.commands) > 1 and (wanted.run or wanted.sweeps or wanted.parts):
        raise InputError("--run, --sweep and --parts are for one command, not for a chain; launch it with --after")
    found = []
    for command in wanted.commands:
        work = read_work(command)
        run = _run_folder(work, wanted.run)
        if wanted.parts:
            if work.command not in _IN_PARTS:
                raise InputError(f"--parts splits {', '.join(_IN_PARTS)}, not {work.command}")
            parts = [_with(work, part=f"{part}/{wanted.parts}") for part in range(1, wanted.parts + 1)]
            pieces = [Piece(run / f"part-{number:04d}", part) for number, part in enumerate(parts, 1)]
            found += [Stage(run, pieces), Stage(run / "merge", [Piece(run / "merge", _with(work, merge=True))])]
        elif wanted.sweeps:
            if work.config is None:
                raise InputError(f"--sweep varies keys of {' or '.join(OF_RANKS)}, not of {work.command}")
            found.append(Stage(run, list(_swept(run, command, wanted.sweeps))))
        else:
            found.append(Stage(run, [Piece(run, work)]))
    runs = [piece.run for stage in found for piece in stage.pieces]
    if again := next((run for run in runs if runs.count(run) > 1), None):
        raise InputError(f"{again}: two jobs would share this run folder; give each its own run.dir")
    return found


def _with(work: Work, **values: str | bool) -> Work:
    return replace(work, given=work.given | values)


def _run_folder(work: Work, given: str) -> Path:
    if work.config is None:
        return Path(given or f"runs/{work.command}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not (work.config.run.dir or given):
        raise InputError("run.dir is missing; give --run.dir FOLDER")
    return Path(work.config.run.dir or given)


def _swept(run: Path, command: list[str], sweeps: tuple[tuple[str, tuple[str, ...]], ...]) -> Iterator[Piece]:
    """A run for each combination of values, which are words of the user's as those of the command are."""
    keys = [key for key, _ in sweeps]
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}
    for values in product(*(values for _, values in sweeps)):
        swept = dict(zip(keys, values, strict=True))
        name = "_".join(f"{short[key]}={value}" for key, value in swept.items())
        work = read_work([*command, *(f"--{key}={value}" for key, value in swept.items())])
        yield Piece(run / re.sub(r"[^A-Za-z0-9_.,+=-]", "-", name), work, swept)


def check_ranks(stage: Stage, cluster: LaunchConfig) -> None:
    """Raises InputError where a command knows no ranks, or cannot be shared by as many as the cluster config asks."""
    for piece in stage.pieces:
        if piece.work.config is not None:
            piece.work.config.train.lanes_for(cluster.world_size)
        elif cluster.world_size > 1:
            raise InputError(
                f"{piece.work.command} does not run as several processes under ecgscale-launch: give nodes 1 and "
                f"tasks_per_node 1 (only {' and '.join(OF_RANKS)} do)"
            )


def check_data(stage: Stage) -> None:
    """Raises InputError where a data set that is to be here already is not."""
    for piece in stage.pieces:
        for place in piece.work.config.data.shards if piece.work.config is not None else ():
            if "://" not in place and not (Path(place) / MANIFEST).exists():
                raise InputError(f"data.shards: {place} is no data set: see `ecgscale ingest`")
