"""Files of other formats are written whole or not at all, and over nothing but one of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ecgscale.errors import InputError
from ecgscale.files import whole_file


def write_over(out: Path, suffix: str, is_ours: Callable[[Path], bool], write: Callable[[Path], None]) -> None:
    """``write`` makes a file beside ``out``, which then takes its name.

    Raises InputError for another suffix and where something stands there that ``is_ours`` does not know as written by
    ecgscale; MachineError where the disk does not take it.
    """
    refuse_foreign(out, suffix, is_ours)
    with whole_file(out) as partial:
        write(partial)


def refuse_foreign(out: Path, suffix: str, is_ours: Callable[[Path], bool]) -> None:
    """Raises InputError for another suffix and where something stands that ecgscale has not written."""
    if out.suffix != suffix:
        raise InputError(f"{out}: give a file that ends in {suffix}")
    if out.exists() and not (out.is_file() and is_ours(out)):
        raise InputError(f"{out}: exists and is no {suffix} file that ecgscale wrote; give a new name")
    if not out.parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}")
