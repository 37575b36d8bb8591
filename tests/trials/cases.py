"""Walk the shared cases and print a table: which are right today. Exit code 0 where all are.

    .venv/bin/python tests/trials/cases.py [NAME ...]

Cases of ``reliability`` are programs of their own (exit code 0: right); those of ``data`` are checked by the functions
in ``checks_*.py`` beside this file. A folder that nobody checks counts as wrong.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from case_check import CHECKS  # noqa: E402

LIMIT_S = 600


def cases(shared: Path) -> Iterator[tuple[str, Path]]:
    """(kind, folder) of every case."""
    for kind in ("data", "reliability"):
        for folder in sorted((shared / "cases" / kind).iterdir()):
            if folder.is_dir():
                yield kind, folder


def run_program(folder: Path) -> tuple[bool, str]:
    """A reliability case: whether it is right, and its last line."""
    program = [sys.executable, str(folder / "case.py")]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=LIMIT_S)
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    verdicts = [line for line in lines if line.startswith(("good:", "DEFECT:"))]
    return ended.returncode == 0, (verdicts or lines or [f"exit code {ended.returncode}"])[-1]


def run_check(folder: Path) -> tuple[bool, str]:
    """A data case: whether it is right, and what was seen."""
    check = CHECKS.get(folder.name)
    if check is None:
        return False, "nobody checks this case"
    with tempfile.TemporaryDirectory(prefix="case-") as scratch:
        try:
            return True, check(folder, Path(scratch))
        except Exception as error:  # whatever a check meets is what the table shows
            return False, f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(names: list[str]) -> int:
    shared = Path(os.environ.get("ECGSCALE_SHARED", Path(__file__).parents[3] / "shared"))
    if not (shared / "cases").is_dir():
        print(f"{shared}: no cases there; set ECGSCALE_SHARED")
        return 2
    for module in sorted(HERE.glob("checks_*.py")):
        importlib.import_module(module.stem)
    wrong = 0
    for kind, folder in cases(shared):
        if names and folder.name not in names:
            continue
        began = time.monotonic()
        right, seen = run_program(folder) if kind == "reliability" else run_check(folder)
        wrong += not right
        print(f"{'right' if right else 'WRONG':<6} {kind:<11} {folder.name:<36} "
              f"{time.monotonic() - began:5.0f} s  {seen[:200]}", flush=True)  # fmt: skip
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
