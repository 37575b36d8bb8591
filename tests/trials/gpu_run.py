"""Everything that needs a GPU, in order of worth, within a budget of time: `make gpu-run` and `make gpu-rehearse`.

    python tests/trials/gpu_run.py --out FOLDER [--device cpu] [--wheels FOLDER] [--earlier FOLDER] [--only PART ...]

A GPU is lent for minutes, so nothing here can end the others: each part (gpu_parts.py) is a process group of its own
with its own limit, and what it found is written as soon as it has found it. On a CPU each part takes its small form, or
is compiled only. The folder then holds at most six files, of 16 MiB at most:

    results.json         written anew after every part: what was found, what failed and why
    summary.txt          the same for a reader, at most 100 lines; also printed
    logs.tar.gz          all that the parts printed
    reports.tar.gz       reports of `ecgscale bench`, events and configs of runs
    traces.tar.gz        of the profiler
    triton-cache.tar.gz  compiled kernels; found below --earlier, they are not compiled again

What is done below --earlier is not done again, but told again; --only does these parts, whatever was done. Exit code 0
where every part that was tried is good.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILE_LIMIT_BYTES = 16 << 20
SUMMARY_LINES = 100
LEAST_S = 10.0  # a part that has less is not begun
AT_THE_END_S = 15.0  # for packing and the summary
GRACE_S = 6.0  # between asking a part to end and ending it
LOG_LINES = 25  # of a part that failed, in results.json


@dataclass(frozen=True)
class Part:
    """One entry of the list."""

    name: str
    limit_s: float


# In order of worth. The limits add up to more than the budget: they are for a part that hangs.
PARTS = (
    Part("device", 40),
    Part("kernel_tests", 150),
    Part("losses", 60),
    Part("kernels", 90),
    Part("pretrain", 150),
    Part("batches", 60),
    Part("ways", 80),
    Part("waits", 80),
    Part("plan", 80),
    Part("sanitizer", 80),
    Part("kernels_compiled", 120),
    Part("cuda_tests", 120),
)
BUDGET_S = 540.0  # a rehearsal on two quiet cores takes 157
GOOD = ("ok", "earlier")


class Asked(Exception):  # noqa: N818 - no error: someone asks for the end
    """SIGTERM or Ctrl-C."""


@dataclass
class Run:
    """Where things lie, and what has been found."""

    out: Path
    scratch: Path
    device: str
    ends_at: float  # by the monotonic clock
    environment: dict[str, str]
    results: dict[str, dict[str, Any]]

    def left_s(self) -> float:
        return self.ends_at - AT_THE_END_S - time.monotonic()

    def write(self) -> None:
        """results.json, complete at any time."""
        beside = self.out / ".results.json"
        beside.write_text(json.dumps({"device": self.device, "parts": self.results}, indent=1))
        beside.replace(self.out / "results.json")


# -- parts -----------------------------------------------------------------------------------------------------------


def do(run: Run, name: str, limit_s: float, command: list[str]) -> None:
    """One part, from its begin to its entry in the results."""
    folder = run.scratch / name
    folder.mkdir()
    began = time.monotonic()
    asked = False
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, str(folder)], stdout=log, stderr=log, cwd=ROOT, env=run.environment, start_new_session=True
        )
        try:
            status = ended(process.wait(limit_s))
        except subprocess.TimeoutExpired:
            status = f"not done within {limit_s:.0f} s"
        except Asked:
            status, asked = "broken off", True
        finally:
            end_group(process)
    run.results[name] = entry(folder, status) | {"seconds": round(time.monotonic() - began, 1), "device": run.device}
    run.write()
    if asked:
        raise Asked


def ended(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return "ok" if code == 0 else f"exit code {code}"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the part to end, so that what it has is written, then end it and all that it left running."""
    for sign, wait_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 5.0)):
        if sign == signal.SIGINT and process.poll() is not None:
            continue
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def entry(folder: Path, status: str) -> dict[str, Any]:
    """Of the results: what the part told, and where it failed the end of what it printed."""
    try:
        told = json.loads((folder / "told.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        told = {"lines": [], "numbers": {}}
    found: dict[str, Any] = {"status": status, **told}
    if status != "ok":
        found["log"] = (folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:]
    return found


# -- before and after ------------------------------------------------------------------------------------------------


def environment(device: str, scratch: Path, wheels: Path | None, earlier: Path | None) -> dict[str, str]:
    """Of the parts: our packages first, then those of the wheels that this Python does not have."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launch")]
    if wheels is not None and (missing := [wheel for wheel in sorted(wheels.glob("*.whl")) if not there(wheel)]):
        site = scratch / "site"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*install, "--target", str(site), *map(str, missing)], check=True)
        paths.append(str(site))
    cache = scratch / "triton"
    cache.mkdir()
    if earlier is not None and (carried := earlier / "triton-cache.tar.gz").exists():
        with tarfile.open(carried) as tar:
            tar.extractall(scratch, filter="data")
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in paths]
    known = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    known |= {"TRITON_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    return os.environ | known | ({"ECGSCALE_GPU": "1"} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})


def there(wheel: Path) -> bool:
    """Whether this Python has the package already, in whatever version."""
    try:
        distribution(wheel.name.split("-")[0])
    except PackageNotFoundError:
        return False
    return True


def done_before(earlier: Path | None, device: str) -> dict[str, dict[str, Any]]:
    """Parts that are good below ``earlier`` and ran on such a device."""
    if earlier is None or not (earlier / "results.json").exists():
        return {}
    parts: dict[str, dict[str, Any]] = json.loads((earlier / "results.json").read_text())["parts"]
    good = {name: one for name, one in parts.items() if one["status"] in GOOD and one["device"] == device}
    return {name: one | {"status": "earlier"} for name, one in good.items()}


def pack(target: Path, folder: Path, files: Iterable[Path], limit_bytes: int = FILE_LIMIT_BYTES) -> list[str]:
    """A tar of files, the small ones first; names of those that no longer fit into it."""
    left_out, size = [], 64 << 10
    with tarfile.open(target, "w:gz", compresslevel=6) as tar:
        for file in sorted(files, key=lambda file: (file.stat().st_size, file)):
            size += 1024 + len(zlib.compress(file.read_bytes(), 6))
            if size > limit_bytes:
                left_out.append(str(file.relative_to(folder)))
            else:
                tar.add(file, file.relative_to(folder))
    return left_out


def pack_all(run: Run) -> None:
    kinds = {
        "logs": [*run.scratch.glob("*/log.txt"), *run.scratch.glob("*/*.xml")],
        "traces": [*run.scratch.glob("**/profile/*")],
        "reports": [
            file
            for pattern in ("**/bench/*.json", "**/bench/*.md", "**/events.jsonl", "**/run*/config.yaml", "*/told.json")
            for file in run.scratch.glob(pattern)
        ],
        "triton-cache": [file for file in (run.scratch / "triton").glob("**/*") if file.is_file()],
    }
    for name, files in kinds.items():
        left_out = pack(run.out / f"{name}.tar.gz", run.scratch, [file for file in files if file.is_file()])
        if left_out:
            print(f"{name}.tar.gz: {len(left_out)} files no longer fit, the first is {left_out[0]}")


def summary(run: Run, whole_s: float) -> list[str]:
    """At most SUMMARY_LINES: the state of every part first, then what each found, shared out evenly."""
    lines = [f"{run.device}: {whole_s:.0f} s"]
    for name, one in run.results.items():
        lines.append(f"{name:18}{one['status']:24}{one.get('seconds', 0):7.1f} s")
    parts = {name: one["lines"] or one.get("log", [])[-3:] for name, one in run.results.items()}
    parts = {name: told for name, told in parts.items() if told}
    room = SUMMARY_LINES - len(lines) - len(parts)
    for name, share in shares([len(told) for told in parts.values()], room, list(parts)).items():
        lines += [f"-- {name}", *(line[:200] for line in parts[name][:share])]
    return lines[:SUMMARY_LINES]


def shares(wanted: list[int], room: int, names: list[str]) -> dict[str, int]:
    """Lines for each: as many as it wants where there is room, else as many as all others get."""
    given = dict.fromkeys(names, 0)
    while room > 0 and (hungry := [name for name, want in zip(names, wanted, strict=True) if given[name] < want]):
        for name in hungry[:room]:
            given[name] += 1
            room -= 1
    return given


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the six files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse (default cuda)")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels; those that this Python lacks are put on its path"
    )
    parser.add_argument("--earlier", type=Path, help="what an earlier run left: its good parts are not done again")
    parser.add_argument("--only", nargs="+", metavar="PART", help="do these parts, whatever was done")
    parser.add_argument("--budget-s", type=float, help="seconds in all (default 540)")
    parser.add_argument("--parts", type=Path, default=HERE / "gpu_parts.py", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    known = [part.name for part in PARTS]
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only {unknown[0]}: parts are {', '.join(known)}")

    def ask(*_: object) -> None:
        raise Asked

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-run-"))
    budget_s = options.budget_s or BUDGET_S
    run = Run(options.out, scratch, options.device, began + budget_s, {}, done_before(options.earlier, options.device))
    try:
        run.environment = environment(options.device, scratch, options.wheels, options.earlier)
        for part in PARTS:
            if part.name not in options.only if options.only else part.name in run.results:
                continue
            limit_s = min(part.limit_s, run.left_s())
            if limit_s < LEAST_S:
                run.results[part.name] = {"status": "no time left", "lines": [], "numbers": {}, "device": run.device}
                continue
            print(f"{part.name} ...", end=" ", flush=True)
            do(run, part.name, limit_s, [sys.executable, str(options.parts), part.name, options.device])
            print(f"{run.results[part.name]['status']}, {run.results[part.name]['seconds']:.0f} s", flush=True)
    except Asked:
        print("broken off", flush=True)
    finally:
        run.write()
        pack_all(run)
        lines = summary(run, time.monotonic() - began)
        (options.out / "summary.txt").write_text("\n".join(lines) + "\n")
        shutil.rmtree(scratch, ignore_errors=True)
    print("\n".join(lines))
    tried = [one["status"] for one in run.results.values()]
    return 0 if tried and all(status in GOOD for status in tried) else 1


if __name__ == "__main__":
    sys.exit(main())
