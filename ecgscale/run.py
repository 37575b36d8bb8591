"""Run folders: config.yaml, checkpoints/, tensorboard/, events.jsonl, export/."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Collection
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from ecgscale import yaml_text
from ecgscale.config import dump
from ecgscale.data.shards import MANIFEST
from ecgscale.errors import InputError, RankError, file_error, naming_file
from ecgscale.export import RUN_ID
from ecgscale.files import NO_LOCKS, write_whole
from ecgscale.training.ranks import Ranks, first_rank
from ecgscale.training.state import STATE, checkpoints, read_state

CONFIG = "config.yaml"

# What may change when a run continues: how it is computed and written down, how long it goes on (and with it the
# later part of a schedule that falls to the end of the run).
MAY_CHANGE = {
    "data.shards",  # may have moved; their identity is checked
    "data.workers",
    "data.unreadable",
    "data.cache.folder",
    "data.cache.limit_gb",
    "data.cache.attempts",
    "data.cache.timeout_s",
    "data.cache.downloads",
    "engine.zero_stage",
    "engine.whole_below",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.peak_tflops",
    "train.steps",
    "train.log_every",
    "train.validate_every",
    "train.validation_recordings",
    "train.projected_recordings",
    "train.checkpoint_every",
    "train.checkpoint_every_s",
    "train.keep_last",
    "train.keep_every",
    "train.max_skipped",
    "train.log_recordings",
    "train.profile_steps",
    "train.profile_step",
    "run.dir",
}


def claim_run(folder: str, config: Any, ranks: Ranks) -> Path:
    """The run folder with its config written, or found equal; raises InputError that names the key that differs."""
    if not folder:
        raise InputError("run.dir is missing; give --run.dir FOLDER")
    run = Path(folder)
    if (run / MANIFEST).exists():
        raise InputError(f"run.dir {run}: is a data set; give a folder of its own")

    def claim() -> None:
        refuse_other_run(run, config)
        with naming_file(run, "cannot make the run folder"):
            run.mkdir(parents=True, exist_ok=True)
        lock_run(run)
        refuse_other_run(run, config)  # again: another process may have had the folder until now
        write_whole(run / CONFIG, dump(config).encode())
        if not (run / RUN_ID).exists() and not checkpoints(run / "checkpoints"):
            write_whole(run / RUN_ID, uuid4().hex.encode())

    first_rank(ranks, claim)
    return run


_WRITER = ".writer"  # in the run folder; locked by the one process that writes there
_WAIT_S = 15.0  # for the process before, which may just be ending
_locked: dict[Path, IO[str]] = {}


def lock_run(run: Path) -> None:
    """Lock the run folder until `leave_run` or the end of this process; RankError where another one holds it."""
    path = run.resolve() / _WRITER
    if path in _locked:
        return
    with naming_file(path, "cannot write"):
        file = path.open("a+")
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                who = file.read() or "another process"
                file.close()
                raise RankError(f"run.dir {run}: {who} trains there; wait for its end") from None
            time.sleep(0.5)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise file_error(path, "cannot lock", error) from error
            break
    with naming_file(path, "cannot write"):
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
    _locked[path] = file


def leave_run(run: Path) -> None:
    """Another process may write into the run folder from now on."""
    if held := _locked.pop(run.resolve() / _WRITER, None):
        held.close()


def refuse_other_run(run: Path, config: Any, may_change: Collection[str] = MAY_CHANGE) -> None:
    """Raises InputError where a run folder holds a run that differs from ``config`` in a key that makes another run.

    Its newest checkpoint is asked too: config.yaml can be edited or removed.
    """
    refuse_other_config(run / CONFIG, config, may_change)
    if saved := checkpoints(run / "checkpoints"):
        state = read_state(saved[-1])
        lags = {*may_change, *MAY_CHANGE}  # the run may have been started again with others since it was saved
        _refuse_difference(saved[-1] / STATE, state.get("config", {}), config, lags)


def refuse_other_config(path: Path, config: Any, may_change: Collection[str] = MAY_CHANGE) -> None:
    """Raises InputError where a run's config file differs from ``config`` in a key that makes another run."""
    if not path.exists():
        return
    try:
        before = yaml_text.read(path)
    except InputError as error:
        raise InputError(f"{path}: damaged ({error}); remove it or take another run.dir") from error
    if not isinstance(before, dict):
        raise InputError(f"{path}: damaged, not a mapping of keys; remove it or take another run.dir")
    _refuse_difference(path, before, config, may_change)


def _refuse_difference(path: Path, before: dict[str, Any], config: Any, may_change: Collection[str]) -> None:
    if differs := first_difference(before, config, may_change):
        key, was, now = differs
        raise InputError(
            f"{path}: the run has {key[:80]} {repr(was)[:200]}, now it is {repr(now)[:200]}; "
            "take another run.dir or the old value"
        )


def first_difference(before: Any, config: Any, may_change: Collection[str] = MAY_CHANGE) -> tuple[str, Any, Any] | None:
    """The first dotted key in which a saved config differs, what it was, and what it is now.

    A key that came later has its default: that is what the run was begun with.
    """
    saved, now = {key: _default(config, key) for key in flat(asdict(config))} | flat(before), flat(asdict(config))
    keys = (key for key in sorted(saved.keys() | now.keys()) if key not in may_change)
    return next(((key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)), None)


def _default(config: Any, key: str) -> Any:
    """What a dotted key of a config tree is where nothing is given."""
    *groups, name = key.split(".")
    for group in groups:
        config = getattr(config, group)
    (one,) = (field for field in fields(config) if field.name == name)
    return one.default if one.default_factory is MISSING else one.default_factory()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys -> dotted keys."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}{name}.").items()}
