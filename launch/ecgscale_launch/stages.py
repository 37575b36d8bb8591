"""From commands to stages: what is run in which folder, side by side or one after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ecgscale.data.shards import MANIFEST
from ecgscale.errors import InputError
from ecgscale_launch.commands import OF_RANKS
from ecgscale_launch.job_record import load_command
from ecgscale_launch.launch_config import LaunchConfig

if TYPE_CHECKING:
    from ecgscale.config import PretrainConfig
    from ecgscale.downstream.finetune_config import FinetuneConfig

_IN_PARTS = ("ingest", "reproduce", "scaling-law")  # the commands that know --part I/N and --merge


@dataclass(frozen=True)
class Piece:
    """One job: a command of ecgscale and its run folder."""

    run: Path
    command: list[str]
    config: PretrainConfig | FinetuneConfig | None = None  # that the command amounts to
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
        config = load_command(command)
        run = _run_folder(command, config, wanted.run)
        if wanted.parts:
            if command[0] not in _IN_PARTS:
                raise InputError(f"--parts splits {', '.join(_IN_PARTS)}, not {command[0]}")
            parts = [f"{part}/{wanted.parts}" for part in range(1, wanted.parts + 1)]
            pieces = [Piece(run / f"part-{i:04d}", [*command, "--part", part]) for i, part in enumerate(parts, 1)]
            found += [Stage(run, pieces), Stage(run / "merge", [Piece(run / "merge", [*command, "--merge"])])]
        elif wanted.sweeps:
            if command[0] not in OF_RANKS:
                raise InputError(f"--sweep varies keys of {' or '.join(OF_RANKS)}, not of {command[0]}")
            found.append(Stage(run, list(_swept(run, command, wanted.sweeps))))
        else:
            found.append(Stage(run, [Piece(run, command, config)]))
    runs = [piece.run for stage in found for piece in stage.pieces]
    if again := next((run for run in runs if runs.count(run) > 1), None):
        raise InputError(f"{again}: two jobs would share this run folder; give each its own run.dir")
    return found


def _run_folder(command: list[str], config: PretrainConfig | FinetuneConfig | None, given: str) -> Path:
    if config is None:
        return Path(given or f"runs/{command[0]}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not (config.run.dir or given):
        raise InputError("run.dir is missing; give --run.dir FOLDER")
    return Path(config.run.dir or given)


def _swept(run: Path, command: list[str], sweeps: tuple[tuple[str, tuple[str, ...]], ...]) -> Iterator[Piece]:
    keys = [key for key, _ in sweeps]
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}
    for values in product(*(values for _, values in sweeps)):
        swept = dict(zip(keys, values, strict=True))
        name = "_".join(f"{short[key]}={value}" for key, value in swept.items())
        varied = [*command, *(f"--{key}={value}" for key, value in swept.items())]
        folder = run / re.sub(r"[^A-Za-z0-9_.,+=-]", "-", name)
        yield Piece(folder, varied, load_command(varied), swept)


def check_ranks(stage: Stage, cluster: LaunchConfig) -> None:
    """Raises InputError where a command knows no ranks, or cannot be shared by as many as the cluster config asks."""
    for piece in stage.pieces:
        if piece.config is not None:
            piece.config.train.lanes_for(cluster.world_size)
        elif cluster.world_size > 1:
            raise InputError(
                f"{piece.command[0]} does not run as several processes under ecgscale-launch: give nodes 1 and "
                f"tasks_per_node 1 (only {' and '.join(OF_RANKS)} do)"
            )


def check_data(stage: Stage) -> None:
    """Raises InputError where a data set that is to be here already is not."""
    for piece in stage.pieces:
        for place in piece.config.data.shards if piece.config is not None else ():
            if "://" not in place and not (Path(place) / MANIFEST).exists():
                raise InputError(f"data.shards: {place} is no data set: see `ecgscale ingest`")
