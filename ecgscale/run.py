"""Which run a folder holds: its config, and what may differ when the run goes on."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from ecgscale import yaml_text
from ecgscale.choices import choices_of, current, dotted
from ecgscale.config import dump
from ecgscale.data.shards import MANIFEST
from ecgscale.errors import InputError, naming_file
from ecgscale.files import write_whole
from ecgscale.run_folder import CONFIG, RUN_ID, lock_run, newest_checkpoint
from ecgscale.settings import resumable_keys
from ecgscale.training.ranks import Ranks, first_rank
from ecgscale.training.state import STATE, read_state


@dataclass(frozen=True)
class Allowance:
    """Which keys may differ between two configs of one run: those with which a run goes on, as their fields say."""

    strict: frozenset[str] = frozenset()
    """Not these, though."""
    free: frozenset[str] = frozenset()
    """These too."""

    def keys(self, config: Any) -> set[str]:
        return resumable_keys(config) - self.strict | self.free


RESUMING = Allowance()


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
        if not (run / RUN_ID).exists() and newest_checkpoint(run) is None:
            write_whole(run / RUN_ID, uuid4().hex.encode())

    first_rank(ranks, claim)
    return run


def refuse_other_run(run: Path, config: Any, may: Allowance = RESUMING) -> None:
    """Raises InputError where a run folder holds a run that differs from ``config`` in a key that makes another run.

    Its newest checkpoint is asked too: config.yaml can be edited or removed.
    """
    refuse_other_config(run / CONFIG, config, may)
    if saved := newest_checkpoint(run):
        state = read_state(saved)
        since = replace(may, strict=frozenset())  # the run may have been started again with others since it was saved
        _refuse_difference(saved / STATE, state.get("config", {}), config, since)


def refuse_other_config(path: Path, config: Any, may: Allowance = RESUMING) -> None:
    """Raises InputError where a run's config file differs from ``config`` in a key that makes another run."""
    if not path.exists():
        return
    try:
        before = yaml_text.read(path)
    except InputError as error:
        raise InputError(f"{path}: damaged ({error}); remove it or take another run.dir") from error
    if not isinstance(before, dict):
        raise InputError(f"{path}: damaged, not a mapping of keys; remove it or take another run.dir")
    _refuse_difference(path, before, config, may)


def _refuse_difference(path: Path, before: dict[str, Any], config: Any, may: Allowance) -> None:
    if differs := first_difference(before, config, may):
        key, was, now = differs
        raise InputError(
            f"{path}: the run has {key[:80]} {repr(was)[:200]}, now it is {repr(now)[:200]}; "
            "take another run.dir or the old value"
        )


def first_difference(before: Any, config: Any, may: Allowance = RESUMING) -> tuple[str, Any, Any] | None:
    """The first dotted key in which a saved config differs, what it was, and what it is now.

    A key that came later has its default: that is what the run was begun with. What chooses other keys is told first.
    """
    now = flat(asdict(config))
    saved = {key: _default(config, key) for key in now} | flat(current(type(config), before))
    choosing = dotted(type(config))
    by_name = sorted(saved.keys() | now.keys(), key=lambda key: (key not in choosing, key))
    free = may.keys(config)
    keys = (key for key in by_name if key not in free)
    return next(((key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)), None)


def _default(config: Any, key: str) -> Any:
    """What a dotted key of a config tree is where nothing is given; None of one that a user has named."""
    *groups, name = key.split(".")
    if (group := dotted(type(config)).get(key)) is not None:
        return choices_of(type(config))[group].usual
    for group in groups:
        config = getattr(config, group)
    if isinstance(config, dict):
        return None
    (member,) = (field for field in fields(config) if field.name == name)
    if member.default is MISSING and member.default_factory is MISSING:  # a key without a default has been given always
        return None
    return member.default if member.default_factory is MISSING else member.default_factory()


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys -> dotted keys."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, child in tree.items() for key, value in flat(child, f"{prefix}{name}.").items()}
