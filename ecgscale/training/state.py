"""``state.json`` of a checkpoint: scalars, configuration, versions, and size and sha256 of each file.

Its own sha256 shows damage, not who wrote it: it is read as a file that anybody may have written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ecgscale.errors import InputError, naming_file
from ecgscale.files import read_json, seal_holds, sealed, write_json

FORMAT = "ecgscale-checkpoint/1"
STATE = "state.json"

_OF_ALL: dict[str, type] = {"step": int, "files": dict, "about": dict}
# What a run needs to go on, beside them.
_OF_A_RUN: dict[str, type] = {
    "position": int,
    "skipped": int,
    "skipped_in_a_row": int,
    "optimizer_steps": int,
    "data": str,
    "config": dict,
}
_KINDS = _OF_ALL | _OF_A_RUN | {"validation_due": bool, "world_size": int, "versions": dict, "optimizer": dict}


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint folder. Raises InputError that names its file unless it is whole and plausible."""
    path = folder / STATE
    go_on = f"remove {folder} to go on from the one before"
    with naming_file(path, "cannot read"):
        if not path.is_file():
            raise InputError(f"{path}: missing, so {folder} is no complete checkpoint; remove the folder")
    try:
        state = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {go_on}") from error
    if state.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path}: format {str(state['format'])[:40]!r} is not {FORMAT!r}")
    if not seal_holds(state) or "format" not in state:
        raise InputError(f"{path}: damaged, its content differs from its own sha256; {go_on}")
    if wrong := _implausible(state):
        raise InputError(f"{path}: {wrong}; {go_on}")
    return state


def check_resumable(folder: Path, state: dict[str, Any]) -> None:
    """Raises InputError unless a state holds everything that a run needs to go on."""
    if missing := next((key for key in _OF_A_RUN if key not in state), None):
        raise InputError(f"{folder / STATE}: {missing} is missing; remove {folder} to go on from the one before")


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint's state with its own hash. Raises InputError or MachineError that names it."""
    write_json(folder / STATE, sealed(state | {"format": FORMAT}))


def _implausible(state: dict[str, Any]) -> str | None:
    """The first thing that no run of ours has written; None where there is none."""
    for key in _OF_ALL:
        if key not in state:
            return f"{key} is missing"
    for key, kind in _KINDS.items():
        value = state.get(key)
        if key in state and (type(value) is not kind or (kind is int and not 0 <= value < 1 << 63)):  # type: ignore[operator]
            return f"{key} is {str(value)[:80]!r}"
    if not state.get("skipped_in_a_row", 0) <= state.get("skipped", 0) <= state["step"]:
        return f"{str(state['skipped'])[:80]} steps of {state['step']} were skipped"
    if state.get("optimizer_steps", 0) > state["step"]:
        return f"optimizer_steps is {state['optimizer_steps']} at step {state['step']}"
    if "optimizer" in state and not _is_of_an_optimizer(state["optimizer"]):
        return f"optimizer is {str(state['optimizer'])[:80]!r}"
    for name, about in state["files"].items():
        if Path(name).name != name or name in ("", ".", "..", STATE) or not name.isprintable():
            return f"names the file {name[:80]!r}, which cannot stand beside it"
        if not _names_content(about):
            return f"says {str(about)[:80]!r} of {name[:80]}"
    return None


def _is_of_an_optimizer(state: dict[str, Any]) -> bool:
    """Whether something is what an optimizer has kept: names of slots, and numbers by name."""
    if state.keys() != {"slots", "scalars", "group"} or not isinstance(state["slots"], list):
        return False
    numbers = [state["scalars"], state["group"]]
    if not all(isinstance(number, dict) for number in numbers):
        return False
    values = [value for number in numbers for value in number.values()]
    plausible = all(isinstance(value, (int, float)) and abs(value) < 1 << 63 for value in values)  # NaN is not
    return plausible and all(isinstance(slot, str) for slot in state["slots"])


def _names_content(about: Any) -> bool:
    """Whether something is the size and the sha256 of a file."""
    if not isinstance(about, dict) or type(about.get("bytes")) is not int or not 0 <= about["bytes"] < 1 << 63:
        return False
    sha256 = about.get("sha256")
    return isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None
