"""tests/trials/gpu_run.py: no part ends the others, a second run does what is left, the files stay small."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trials import gpu_parts, gpu_run

PARTS = """
import json, os, pathlib, signal, subprocess, sys, time
name, device, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
with open(os.environ["DONE"], "a") as done:
    print(name, file=done)
print("this is", name)
(folder / "told.json").write_text(json.dumps({"lines": [f"{name} found 7"] * 90, "numbers": {"seven": 7}}))
if name == "fails":
    sys.exit("nothing goes")
if name == "is_killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "hangs":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    left = subprocess.Popen(["sleep", "600"])
    pathlib.Path(os.environ["DONE"]).with_name("sleeper").write_text(str(left.pid))
    time.sleep(600)
if name == "compiles":
    cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"]) / "abc" / "kernel.cubin"
    print("compiled before:", cache.exists())
    cache.parent.mkdir(exist_ok=True)
    cache.write_bytes(b"code")
if name == "needs_a_wheel":
    import ecgscale_carried
    assert ecgscale_carried.__file__ != "" and "json" in sys.modules
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Iterator[Callable[..., tuple[int, dict]]]:
    """(parts, words) -> exit code and results.json of a run of fake parts."""
    script = tmp_path / "parts.py"
    script.write_text(PARTS)
    monkeypatch.setenv("DONE", str(tmp_path / "done"))
    monkeypatch.setattr(gpu_run, "LEAST_S", 0.5)
    monkeypatch.setattr(gpu_run, "AT_THE_END_S", 0.0)
    monkeypatch.setattr(gpu_run, "GRACE_S", 0.3)
    handlers = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}

    def start(parts: str, *words: object, limit_s: float = 60.0) -> tuple[int, dict]:
        listed = tuple(gpu_run.Part(name, 3.0 if name == "hangs" else limit_s) for name in parts.split())
        monkeypatch.setattr(gpu_run, "PARTS", listed)
        command = ["--out", tmp_path / "out", "--device", "cpu", "--parts", script, *words]
        code = gpu_run.main([str(word) for word in command])
        return code, json.loads((tmp_path / "out" / "results.json").read_text())["parts"]

    yield start
    for sign, handler in handlers.items():
        signal.signal(sign, handler)


def done(folder: Path) -> list[str]:
    return (folder / "done").read_text().split()


def test_no_part_ends_the_others(run, tmp_path) -> None:
    code, parts = run("good fails is_killed hangs last")
    assert code == 1
    status = {name: one["status"] for name, one in parts.items()}
    assert status == {
        "good": "ok",
        "fails": "exit code 1",
        "is_killed": "ended by SIGKILL",
        "hangs": "not done within 3 s",
        "last": "ok",
    }
    assert all(one["numbers"] == {"seven": 7} for one in parts.values()), "what was told before the end is kept"
    assert parts["fails"]["log"] == ["this is fails", "nothing goes"]
    sleeper = int((tmp_path / "sleeper").read_text())
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert not [file for file in files if file.stat().st_size > 16 << 20]
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(lines) <= 100
    assert sum("found 7" in line for line in lines) >= 5 * 15, "every part has its share of the summary"
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as tar:
        assert "last/log.txt" in tar.getnames()


def test_a_second_run_does_what_is_left(run, tmp_path) -> None:
    assert run("good compiles fails")[0] == 1
    (tmp_path / "done").unlink()
    (tmp_path / "out").rename(tmp_path / "earlier")
    code, parts = run("good compiles fails new", "--earlier", tmp_path / "earlier")
    assert code == 1
    assert done(tmp_path) == ["fails", "new"]
    assert {name: one["status"] for name, one in parts.items()} == {
        "good": "earlier",
        "compiles": "earlier",
        "fails": "exit code 1",
        "new": "ok",
    }
    assert parts["good"]["lines"][0] == "good found 7", "what is not done again is told again"


def test_only_does_what_was_done_too_and_compiled_kernels_travel(run, tmp_path) -> None:
    run("good compiles")
    (tmp_path / "out").rename(tmp_path / "earlier")
    code, _ = run("good compiles", "--earlier", tmp_path / "earlier", "--only", "compiles")
    assert code == 0
    assert done(tmp_path) == ["good", "compiles", "compiles"]
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as tar:
        log = tar.extractfile("compiles/log.txt")
        assert log is not None
        assert b"compiled before: True" in log.read()


def test_what_an_earlier_run_did_on_a_cpu_is_not_done_on_a_gpu(tmp_path) -> None:
    one = {"status": "ok", "lines": [], "numbers": {}, "device": "cpu"}
    (tmp_path / "results.json").write_text(json.dumps({"parts": {"good": one, "bad": one | {"status": "exit code 1"}}}))
    assert list(gpu_run.done_before(tmp_path, "cpu")) == ["good"]
    assert gpu_run.done_before(tmp_path, "cuda") == {}


def test_the_budget_holds(run) -> None:
    began = time.monotonic()
    code, parts = run("good hangs last", "--budget-s", 1.5)
    assert code == 1
    assert parts["last"]["status"] == "no time left"
    assert time.monotonic() - began < 15, "a busy machine is slow, and 600 s are no such time"


def test_an_unknown_part_is_refused(run, capsys) -> None:
    with pytest.raises(SystemExit):
        run("good", "--only", "bad")
    assert "--only bad: parts are good" in capsys.readouterr().err


def test_a_wheel_that_this_python_lacks_is_on_its_path(run, tmp_path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("ecgscale_carried", "pytest"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                f"{name}.py", "# carried\n" if name != "pytest" else "raise ImportError('the carried one')\n"
            )
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    code, parts = run("needs_a_wheel", "--wheels", wheels)
    assert code == 0, parts
    assert [gpu_run.there(wheel) for wheel in sorted(wheels.iterdir())] == [False, True]


def test_packed_files_stay_below_the_limit(tmp_path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(os.urandom(100_000 + number))
    left_out = gpu_run.pack(tmp_path / "all.tar.gz", tmp_path, files, limit_bytes=400_000)
    assert left_out == ["3.bin", "4.bin", "5.bin"]
    assert (tmp_path / "all.tar.gz").stat().st_size <= 400_000
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        assert tar.getnames() == ["0.bin", "1.bin", "2.bin"]


def test_every_part_of_the_list_is_there() -> None:
    assert {part.name for part in gpu_run.PARTS} == set(gpu_parts.PARTS)
    assert gpu_run.BUDGET_S < 600, "the longest command that a lent machine takes"


def test_tests_of_a_part_are_told_one_by_one(tmp_path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip('no GPU')\ndef test_skipped(): pass\n"
    )
    place = gpu_parts.Place("cpu", tmp_path)
    with pytest.raises(Exception, match="returned non-zero exit status 1"):
        gpu_parts.pytest(place, "--rootdir", tmp_path, "-c", os.devnull, tmp_path / "test_some.py", workers=1)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["numbers"] == {"tests": 3, "failed": 1, "skipped": 1}
    assert told["lines"][:2] == ["3 tests, 1 failed, 1 skipped", "1 skipped: no GPU"]
    assert told["lines"][2].startswith("FAILED test_some::test_bad: assert 1 == 2")
