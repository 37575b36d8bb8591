"""`ecgscale-launch status`, `logs`, `cancel` and `resume`, on made-up folders, real processes and a real SLURM."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.errors import InputError
from ecgscale.settings import Given
from ecgscale_launch import launching, slurm
from ecgscale_launch.cli import subcommand
from ecgscale_launch.devcluster import DevCluster
from ecgscale_launch.job_folder import JobFolder
from ecgscale_launch.listing import details, duration, screen, table
from ecgscale_launch.runs import estimated_end, find_runs, steps_to_do, tail_events
from ecgscale_launch.slurm import Known
from ecgscale_launch.standing import Standing, is_process, local_word, slurm_word, standings
from ecgscale_launch.watch import refuse_active
from small_jobs import put_checkpoint

NOW = time.time()


def put(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(tree))
    partial.replace(path)


def make_job(run: Path, where: str = "slurm", job_id: str | None = "7", submitted: float = NOW - 5000) -> JobFolder:
    folder = JobFolder.of(run)
    job = {"format": "ecgscale-job/1", "name": run.name, "run": str(run), "command": ["pretrain", "--config", "c.yaml"]}
    job |= {"cluster": {}, "where": where, "cwd": str(run.parent), "time": submitted, "python": sys.executable}
    put(folder.job, job | {"commit": None, "dirty": False, "versions": {}, "user": "me", "host": socket.gethostname()})
    folder.path.chmod(0o700)
    if job_id is not None and where == "slurm":
        put(folder.submitted, {"job_id": job_id, "time": submitted})
    return folder


def write_state(folder: JobFolder, phase: str, written: float = NOW, job_id: str | None = "7", **others: Any) -> None:
    state = {"job_id": job_id, "phase": phase, "nodes": ["n1", "n2"], "pid": os.getpid(), "host": socket.gethostname()}
    state |= {"time": written, "error": None, "attempts": [attempt()], "requeues": 1, "restarts": 2}
    put(folder.state, state | others)


def attempt(number: int = 1, began: float = NOW - 1000, **others: Any) -> dict[str, Any]:
    usual = {"number": number, "job_id": "7", "nodes": ["n1", "n2"], "began": began, "first_step": began + 10}
    return usual | {"ended": None, "outcome": None, "what": "", "step_from": 0, "step_to": 0} | others


def write_rank(folder: JobFolder, number: int = 1, rank: int = 0, log: str = "", **others: Any) -> Path:
    about = {"rank": rank, "host": "n1", "pid": 1, "first_step": NOW - 900, "step": 0, "phase": "forward", "count": 9}
    put(folder.attempt(number) / f"rank-{rank}.alive.json", about | {"since": NOW, "time": NOW} | others)
    path = folder.attempt(number) / f"rank-{rank}.log"
    path.write_text(log)
    return path


def step_event(moment: float, step: int, **others: float) -> str:
    return json.dumps({"event": "step", "time": moment, "step": step, "throughput/ecg_per_s": 50.0} | others) + "\n"


@pytest.fixture
def slurm_says(monkeypatch: pytest.MonkeyPatch) -> dict[str, Known]:
    """What SLURM knows of jobs, by number."""
    said: dict[str, Known] = {}
    monkeypatch.setattr(slurm, "known", lambda wanted: {key: said[key] for key in wanted if key in said})
    return said


def stand(run: Path) -> Standing:
    ((one,), _) = standings([run], NOW)
    return one


# -- one word --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "says", "word"),
    [
        (None, "PENDING", "queued"),
        ("requeued", "PENDING", "requeued"),
        ("running", "PENDING", "requeued"),  # by SLURM, after the loss of a node
        (None, "CONFIGURING", "starting"),
        (None, "RUNNING", "starting"),
        ("starting", "RUNNING", "starting"),
        ("running", "RUNNING", "running"),
        ("saving", "RUNNING", "saving"),
        ("done", "RUNNING", "done"),  # for the moment until SLURM knows
        ("requeued", "COMPLETING", "requeued"),
        ("stopped", "COMPLETING", "saving"),  # for a requeue or for good: SLURM will say
        ("stopped", "PENDING", "requeued"),
        ("done", "COMPLETED", "done"),
        ("failed", "FAILED", "failed"),
        (None, "FAILED", "failed"),
        (None, "COMPLETED", "lost"),
        ("stopped", "FAILED", "stopped"),  # exit code 75
        ("running", "FAILED", "lost"),
        ("running", "TIMEOUT", "lost"),
        ("saving", "NODE_FAIL", "lost"),
        ("running", "CANCELLED", "cancelled"),
        (None, "CANCELLED", "cancelled"),
        ("done", "CANCELLED", "done"),
        ("running", "REQUEUE_HOLD", "requeued"),
        ("running", "SUSPENDED", "suspended"),
        ("done", None, "done"),
        ("running", None, "lost"),
        (None, None, "lost"),
    ],
)
def test_one_word_for_what_the_supervisor_and_slurm_say(phase: str | None, says: str | None, word: str) -> None:
    assert slurm_word(phase, NOW, Known(says, began=NOW - 1) if says else None) == word


def test_what_was_written_before_slurm_started_the_job_again_is_no_longer_so() -> None:
    for phase in ("requeued", "running"):
        assert slurm_word(phase, NOW - 60, Known("RUNNING", began=NOW)) == "starting"


def test_one_word_without_slurm() -> None:
    assert local_word("running", True, 1e6) == "running"
    assert local_word("running", False, 1e6) == "lost"
    assert local_word("failed", False, 1e6) == "failed"
    assert local_word(None, False, 1.0) == "starting"
    assert local_word(None, False, 1e6) == "lost"


def test_a_process_is_known_by_when_it_began() -> None:
    assert is_process(os.getpid(), time.time())
    assert not is_process(os.getpid(), time.time() - 86400 * 365)  # another had the number when that was written
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert not is_process(ended.pid, time.time())  # nobody has waited for it yet
    assert not is_process(ended.pid, time.time())


# -- what a run has reached ------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(0, 10**6), st.floats(1e-3, 1e4))
def test_estimated_end_is_exact_at_an_even_pace(first: int, done: int, left: int, pace_s: float) -> None:
    points = [(NOW + i * pace_s, first + i) for i in range(0, done + 1, max(1, done // 7))]
    if len(points) > 1:
        end = estimated_end(points, first + done + left, NOW)
        assert end == pytest.approx(NOW + (done + left) * pace_s, rel=1e-9, abs=1e-3)


def test_no_end_is_estimated_from_less_than_two_steps_and_none_in_the_past() -> None:
    assert estimated_end([], 10, NOW) is None
    assert estimated_end([(NOW, 3)], 10, NOW) is None
    assert estimated_end([(NOW, 3), (NOW + 1, 3)], 10, NOW) is None
    assert estimated_end([(NOW, 3), (NOW + 1, 4)], 10, NOW + 100) == NOW + 100


def test_events_are_read_from_the_end_and_torn_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert tail_events(path) == []
    path.write_text("".join(step_event(NOW + i, i) for i in range(20000)) + 'no json\n[]\n{"event": "step", "ti')
    began = time.perf_counter()
    events = tail_events(path)
    assert time.perf_counter() - began < 0.5
    assert 100 < len(events) < 5000
    assert [event["step"] for event in events] == list(range(20000 - len(events), 20000))


def test_pace_is_that_of_the_current_attempt(tmp_path: Path, slurm_says: dict[str, Known]) -> None:
    run = tmp_path / "a"
    folder = make_job(run)
    slurm_says["7"] = Known("RUNNING", began=NOW - 500)
    began = NOW - 400
    before = attempt(1, NOW - 4000, ended=NOW - 3000, outcome="stopped", step_to=50)
    write_state(folder, "running", NOW - 300, attempts=[before, attempt(2, began, step_from=50)])
    write_rank(folder, 2, step=72)
    (run / "config.yaml").write_text("train: {steps: 100}\n")
    put_checkpoint(run / "checkpoints", 50)
    os.utime(run / "checkpoints" / "step-00000050", (NOW - 77, NOW - 77))
    (run / "checkpoints" / "step-00000070.partial").mkdir()
    first = [step_event(NOW - 3900 + i, i) for i in range(10, 60, 10)]
    second = [step_event(NOW - 200, 60), step_event(NOW - 100, 70, **{"throughput/mfu": 0.4})]
    (run / "events.jsonl").write_text("".join([*first, *second]) + '{"event": "st')
    one = stand(run)
    assert (one.state, one.step, one.steps, one.ecg_per_s, one.mfu) == ("running", 72, 100, 50.0, 0.4)
    assert one.estimated_end == pytest.approx(NOW + 200, abs=1)
    assert (one.checkpoint_step, one.restarts, one.requeues, one.nodes) == (50, 2, 1, ["n1", "n2"])
    assert one.checkpoint_time == pytest.approx(NOW - 77)
    write_state(folder, "stopping", NOW, attempts=[before, attempt(2, began, step_from=50)])
    one = stand(run)
    assert (one.state, one.estimated_end) == ("saving", None)


@pytest.mark.parametrize(("protocol", "shown"), [("probe", None), ("neighbours", None), ("finetune", 10), (None, 10)])
def test_a_probe_has_no_steps_to_do(tmp_path: Path, protocol: str | None, shown: int | None) -> None:
    task = f"task: {{protocol: {protocol}}}\n" if protocol else ""
    (tmp_path / "config.yaml").write_text(task + "train: {steps: 10}\n")
    assert steps_to_do(JobFolder.of(tmp_path)) == shown


def test_a_job_is_starting_until_its_first_step_and_saving_while_it_saves(
    tmp_path: Path, slurm_says: dict[str, Known]
) -> None:
    folder = make_job(tmp_path)
    slurm_says["7"] = Known("RUNNING", began=NOW - 500)
    write_state(folder, "running")
    assert stand(tmp_path).state == "starting"
    for rank, word in (
        ({"phase": "start-up"}, "starting"),
        ({"phase": "forward", "first_step": None}, "starting"),
        ({"phase": "forward", "first_step": None, "step": 1}, "running"),
        ({"phase": "forward"}, "running"),
        ({"phase": "save"}, "saving"),
    ):
        write_rank(folder, **rank)  # type: ignore[arg-type]
        assert stand(tmp_path).state == word


def test_a_job_that_was_submitted_again_has_not_failed(tmp_path: Path, slurm_says: dict[str, Known]) -> None:
    folder = make_job(tmp_path, job_id="8")
    error = {"rank": 1, "host": "n1", "line": "ValueError: no", "traceback": None, "time": NOW}
    write_state(folder, "failed", NOW - 100, job_id="7", error=error)
    slurm_says["8"] = Known("PENDING", "Priority", began=NOW + 60)
    one = stand(tmp_path)
    assert (one.state, one.reason, one.error, one.expected_start) == ("queued", "Priority", None, NOW + 60)


def test_what_a_job_before_has_left_in_the_folder_does_not_count(tmp_path: Path, slurm_says: dict[str, Known]) -> None:
    write_state(make_job(tmp_path / "a"), "done", NOW - 4000)
    make_job(tmp_path / "a", job_id=None, submitted=NOW)  # between job.json and sbatch's answer
    assert (stand(tmp_path / "a").state, stand(tmp_path / "a").job_id) == ("unsubmitted", None)
    make_job(tmp_path / "a", "local", submitted=NOW)
    assert (stand(tmp_path / "a").state, stand(tmp_path / "a").job_id) == ("starting", None)
    refuse_active(tmp_path / "nowhere")


def test_a_number_that_slurm_has_given_to_another_job_is_not_taken_for_ours(
    tmp_path: Path, slurm_says: dict[str, Known]
) -> None:
    write_state(make_job(tmp_path, submitted=NOW - 86400), "running", NOW - 80000)
    slurm_says["7"] = Known("RUNNING", submitted=NOW - 50, began=NOW - 40)
    assert (stand(tmp_path).state, stand(tmp_path).reason) == ("lost", "unknown to SLURM")
    slurm_says["7"] = Known("RUNNING", restarts=2, submitted=NOW - 50, began=NOW - 40)  # ours, started again
    assert (stand(tmp_path).state, stand(tmp_path).requeues) == ("starting", 2)


def test_jobs_of_this_machine(tmp_path: Path) -> None:
    folder = make_job(tmp_path, "local")
    write_rank(folder)
    write_state(folder, "running", job_id=None)
    assert stand(tmp_path).state == "running"
    write_state(folder, "running", NOW - 4000 * 365 * 86400 / 1000, job_id=None)
    assert stand(tmp_path).state == "lost"
    write_state(folder, "running", NOW - 1000, job_id=None, host="elsewhere")
    assert stand(tmp_path).state == "running"  # its rank was heard
    write_rank(folder, time=NOW - 1000)
    assert stand(tmp_path).state == "lost"


def test_without_slurm_what_was_written_last_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write_state(make_job(tmp_path / "runs" / "a"), "done")
    make_job(tmp_path / "runs" / "b")
    assert subcommand("status", ["--runs", str(tmp_path / "runs"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert {one["name"]: one["state"] for one in json.loads(out)} == {"a": "done", "b": "queued"}
    assert "squeue is not on the PATH" in err
    with pytest.raises(InputError, match="may still be in the queue: squeue is not on the PATH"):
        refuse_active(tmp_path / "runs" / "b")
    with pytest.raises(InputError, match="squeue is not on the PATH"):
        subcommand("cancel", [str(tmp_path / "runs" / "b")])


def test_accounting_is_asked_for_what_the_controller_has_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def run(*command: str) -> str:
        asked.append(command)
        if command[0] == "squeue":
            assert command[-1] == "--jobs=7,8_1,7,8_1"
            return ""
        return "7|CANCELLED by 0\n8_1|COMPLETED\n9|FAILED\n"

    monkeypatch.setattr(slurm, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert slurm.known(["7", "8_1"]) == {"7": Known("CANCELLED"), "8_1": Known("COMPLETED")}
    assert len(asked) == 2
    assert slurm.known([]) == {}
    assert len(asked) == 2


# -- status ----------------------------------------------------------------------------------------------------------


def test_runs_are_found_four_levels_deep(tmp_path: Path) -> None:
    for name in ("a", "sweep/1", "sweep/2", "w/x/y/z", "v/w/x/y/z", "a/checkpoints/no", "a/after", "profile"):
        make_job(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = [str(run.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert found == ["a", "a/after", "profile", "sweep/1", "sweep/2", "w/x/y/z"]


def test_status_lists_newest_first_and_shows_damaged_jobs(
    tmp_path: Path, slurm_says: dict[str, Known], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_state(make_job(tmp_path / "runs/old", submitted=NOW - 100), "done")
    make_job(tmp_path / "runs/sweep/new", job_id="8_1")
    make_job(tmp_path / "runs/never", job_id=None, submitted=NOW - 9000)
    make_job(tmp_path / "runs/torn").job.write_text('{"for')
    slurm_says["8_1"] = Known("PENDING", "Priority")
    assert subcommand("status", []) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "job", "state", "step", "ECG/s", "MFU", "saved", "restarts", "requeues", "end"]
    assert [row.split()[0] for row in rows] == ["runs/old", "runs/sweep/new", "runs/never", "runs/torn"]
    assert re.search(r"8_1 +queued \(Priority\) ", rows[1])
    assert "unsubmitted" in rows[2]
    assert "damaged" in rows[3]
    assert subcommand("status", ["runs/sweep"]) == 0  # a sweep: no job itself
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert subcommand("status", ["--json"]) == 0
    for one in json.loads(capsys.readouterr().out):
        assert list(one) == [field.name for field in fields(Standing)]


def test_one_run_is_shown_in_detail(
    tmp_path: Path, slurm_says: dict[str, Known], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_job(tmp_path)
    error = {"rank": 3, "host": "n2", "line": "ValueError: \x1b[2Jno", "traceback": "…", "time": NOW}
    ends = {"ended": NOW - 700, "outcome": "crashed", "what": "ValueError: \x1b[2Jno"}
    write_state(folder, "failed", error=error, attempts=[attempt(i, **ends, step_to=50) for i in range(1, 15)])
    write_rank(folder, 14)
    slurm_says["7"] = Known("FAILED", "NonZeroExitCode")
    assert subcommand("status", [str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "error     rank 3 on n2: ValueError: \\x1b[2Jno" in out
    assert "attempts  4 earlier ones" in out
    assert re.search(r"attempt 14.*, 5 min, crashed, from step 0 to 50: ValueError", out)
    assert "launch/attempts/0014" in out
    assert "n1, n2" in out


def test_status_refuses_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for arguments, said in (
        ([], "--runs runs: no such folder"),
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "empty: no job of ecgscale-launch"),
        (["empty", "--runs", "empty"], "not both"),
        (["--bogus"], "--bogus"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            subcommand("status", arguments)


def test_the_table_keeps_to_the_width() -> None:
    far = {"step": 12345, "steps": 100000, "ecg_per_s": 1234.5, "estimated_end": NOW + 1e5, "checkpoint_time": NOW}
    jobs = [Standing("/somewhere/" + "x" * 60 + "/end", state="queued", reason="\x1b[31m" + "Why " * 30, job_id="1")]
    jobs += [Standing("/b", state="running", **far)]  # type: ignore[arg-type]
    whole = table(jobs, NOW, None, False)
    assert len(whole) == 3
    assert "\x1b" not in "".join(whole)
    for width in range(72, 250):
        lines = table(jobs, NOW, width, False)
        assert max(map(len, lines)) <= width
        assert all(part in lines[2] for part in ("/b", "running", "12345/100000 12%", "in 1 d 3 h"))
        assert "/end" in lines[1]
    coloured = table(jobs, NOW, 80, True)
    assert "\x1b[36mrunning" in coloured[2]
    assert [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in coloured] == table(jobs, NOW, 80, False)


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, terminal: bool) -> None:
            self.isatty = lambda: terminal

    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert screen(Stream(False)) == (None, False)  # type: ignore[arg-type]
    assert screen(Stream(True)) == (90, True)  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert screen(Stream(True)) == (90, False)  # type: ignore[arg-type]


def test_durations_and_details_of_little() -> None:
    assert [duration(s) for s in (-3, 45, 720, 12000, 190000)] == ["0 s", "45 s", "12 min", "3 h 20 min", "2 d 4 h"]
    assert details(Standing("r"), NOW) == []


# -- logs ------------------------------------------------------------------------------------------------------------


def test_logs_of_ranks_attempts_and_the_supervisor(
    tmp_path: Path, slurm_says: dict[str, Known], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder, run = make_job(tmp_path), str(tmp_path)
    slurm_says["7"] = Known("PENDING", "Priority")
    with pytest.raises(InputError, match=r"no log, the job is queued \(Priority\)"):
        subcommand("logs", [run])
    with pytest.raises(InputError, match=r"supervisor\.log: not written yet"):
        subcommand("logs", [run, "--supervisor"])
    for number in (1, 2):
        for rank in (0, 1, 2, 5):
            write_rank(folder, number, rank, f"\x1b[1mattempt {number} rank {rank}\r\n")
    folder.log.write_text("all\n")
    for arguments, said in (
        ([], b"\x1b[1mattempt 2 rank 0\r\n"),
        (["--rank", "5"], b"\x1b[1mattempt 2 rank 5\r\n"),
        (["--rank", "1", "--attempt", "1"], b"\x1b[1mattempt 1 rank 1\r\n"),
        (["--supervisor"], b"all\n"),
    ):
        assert subcommand("logs", [run, *arguments]) == 0
        assert capfdbinary.readouterr().out == said
    for arguments, complaint in (
        (["--rank", "3"], "attempt 2 has the ranks 0 to 2, 5"),
        (["--rank", "3", "-f"], "attempt 2 has the ranks 0 to 2, 5"),
        (["--attempt", "3"], "--attempt 3: there were 1 to 2"),
        (["--attempt", "1", "--supervisor"], "leave it out"),
    ):
        with pytest.raises(InputError, match=complaint):
            subcommand("logs", [run, *arguments])


def test_following_moves_on_to_the_next_attempt_and_ends_with_the_job(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = make_job(tmp_path, "local", submitted=NOW)

    write_state(folder, "running", time.time(), job_id=None)

    def job() -> None:
        for numbers in ((1,), (2, 3)):  # the third begins before anybody has looked at the second
            time.sleep(0.5)
            for number in numbers:
                write_rank(folder, number, log=f"{number}:0\n")
            with (folder.attempt(number) / "rank-0.log").open("ab", buffering=0) as log:
                for i in range(1, 10):
                    log.write(f"{number}:{i}\n".encode())
                    time.sleep(0.05)
        write_state(folder, "done", time.time(), job_id=None)
        time.sleep(0.7)
        with (folder.attempt(3) / "rank-0.log").open("a") as late:  # as a shared file system may be
            late.write("last\n")

    worker = threading.Thread(target=job)
    worker.start()
    began = time.monotonic()
    assert subcommand("logs", [str(tmp_path), "-f"]) == 0
    assert time.monotonic() - began < 30
    worker.join()
    out, err = capfdbinary.readouterr()
    assert out.decode().split() == [*(f"1:{i}" for i in range(10)), "2:0", *(f"3:{i}" for i in range(10)), "last"]
    assert err.decode().splitlines()[1:] == [
        *(f"==> attempt {number} <==" for number in (1, 2, 3)),
        f"{tmp_path}: done",
    ]
    assert b"no log yet" in err
    assert subcommand("logs", [str(tmp_path), "-f", "--attempt", "1"]) == 0
    assert capfdbinary.readouterr().out.count(b"1:") == 10


def test_following_a_job_that_was_cancelled_ends_with_that_word(
    tmp_path: Path, slurm_says: dict[str, Known], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = make_job(tmp_path)
    write_state(folder, "running")
    folder.log.write_text("attempt 1\n")
    slurm_says["7"] = Known("CANCELLED")
    assert subcommand("logs", [str(tmp_path), "-f", "--supervisor"]) == 0
    assert capfdbinary.readouterr() == (b"attempt 1\n", f"{tmp_path}: cancelled\n".encode())


# -- cancel and resume -----------------------------------------------------------------------------------------------

STUB = """
import json, os, signal, sys, time
def write(phase):
    state = json.loads(open(sys.argv[1]).read()) | {"phase": phase, "pid": os.getpid(), "time": time.time()}
    open(sys.argv[1] + ".new", "w").write(json.dumps(state)); os.replace(sys.argv[1] + ".new", sys.argv[1])
def save(*_):
    write("stopped"); sys.exit(75)
signal.signal(signal.SIGTERM, save)
write("running")
print("up", flush=True)
while True: time.sleep(0.05)
"""


def start_stub(folder: JobFolder) -> subprocess.Popen[str]:
    """A process that does what a supervisor does when it is told to stop."""
    write_state(folder, "starting", job_id=None)
    stub = subprocess.Popen([sys.executable, "-c", STUB, str(folder.state)], stdout=subprocess.PIPE, text=True)
    assert stub.stdout is not None
    assert stub.stdout.readline() == "up\n"
    return stub


def test_cancel_asks_a_local_job_to_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_job(tmp_path, "local")
    with start_stub(folder) as stub:
        with pytest.raises(InputError, match="is starting; wait for its end or cancel it first"):
            refuse_active(tmp_path)
        assert subcommand("cancel", [str(tmp_path)]) == 0
        assert f"process {stub.pid} was told: it saves and ends" in capsys.readouterr().out
        assert stub.wait(10) == 75
    with pytest.raises(InputError, match="nothing to cancel, it is stopped"):
        subcommand("cancel", [str(tmp_path)])
    with start_stub(folder) as stub:
        assert subcommand("cancel", [str(tmp_path), "--now"]) == 0
        assert stub.wait(10) == -signal.SIGKILL
    with pytest.raises(InputError, match="nothing to cancel, it is lost"):
        subcommand("cancel", [str(tmp_path)])


def test_cancel_spares_processes_that_are_not_the_job(tmp_path: Path) -> None:
    folder = make_job(tmp_path, "local", submitted=NOW - 1e9)
    with subprocess.Popen(["sleep", "60"]) as other:
        write_state(folder, "running", time.time() - 3600, job_id=None, pid=other.pid)
        with pytest.raises(InputError, match="nothing to cancel, it is lost"):
            subcommand("cancel", [str(tmp_path)])
        write_state(folder, "running", time.time(), job_id=None, pid=other.pid, host="elsewhere")
        with pytest.raises(InputError, match="runs on elsewhere; cancel it there"):
            subcommand("cancel", [str(tmp_path)])
        assert other.poll() is None
        other.kill()


def test_of_a_sweep_what_still_runs_is_cancelled(
    tmp_path: Path, slurm_says: dict[str, Known], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "run", lambda *command: told.append(command) or "")  # type: ignore[func-returns-value]
    monkeypatch.setattr(slurm, "dependents", lambda job_id: ["1_2", "9"] if job_id == "1_1" else [])
    for number, says in ((0, "COMPLETED"), (1, "RUNNING"), (2, "PENDING")):
        folder = make_job(tmp_path / str(number), job_id=f"1_{number}")
        slurm_says[f"1_{number}"] = Known(says, began=NOW - 500)
        if says != "PENDING":
            write_state(folder, "done" if says == "COMPLETED" else "running", job_id=f"1_{number}")
    assert subcommand("cancel", [str(tmp_path)]) == 0
    assert told == [("scancel", "--batch", "--signal=TERM", "1_1"), ("scancel", "1_2")]
    out = capsys.readouterr().out
    assert "job 1_1 was told: it saves and ends; 9, depending on it, will not start" in out
    assert "job 1_2 was cancelled" in out
    with pytest.raises(InputError, match="0: nothing to cancel, it is done"):
        subcommand("cancel", [str(tmp_path / "0"), str(tmp_path / "2")])
    assert told[-1] == ("scancel", "1_2")


def test_resume_hands_over_the_job_and_the_overrides(
    tmp_path: Path, slurm_says: dict[str, Known], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def submit(job: Any, changes: Given, new_code: bool) -> str:
        given.append((job.run, changes.dotted(), new_code))
        return "8"

    monkeypatch.setattr(launching, "resubmit", submit)
    write_state(make_job(tmp_path), "failed")
    for says in ("RUNNING", "PENDING"):
        write_state(make_job(tmp_path), "running")
        slurm_says["7"] = Known(says, began=NOW - 500)
        with pytest.raises(InputError, match=r"is (starting|requeued) as job 7; wait for its end or cancel it first"):
            subcommand("resume", [str(tmp_path)])
    slurm_says["7"] = Known("TIMEOUT")
    assert subcommand("resume", [str(tmp_path), "--time", "8:00:00", "--new-code", "--nodes=2"]) == 0
    assert given == [(str(tmp_path), {"time": "8:00:00", "nodes": 2}, True)]
    assert "submitted again as job 8" in capsys.readouterr().out
    with pytest.raises(InputError, match="give RUN first"):
        subcommand("resume", ["--time", "8:00:00", str(tmp_path)])


def test_watching_does_not_wait_for_slow_imports() -> None:
    code = "import ecgscale_launch.watch, sys; print(*{'torch', 'numpy', 'ecgscale.config'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- a real SLURM, without accounting --------------------------------------------------------------------------------


@pytest.fixture
def sbatch(devcluster: DevCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    for name, value in devcluster.environment.items():
        monkeypatch.setenv(name, value)

    def submit(script: str, *options: str) -> str:
        command = ["sbatch", "--parsable", "--chdir", str(tmp_path), *options]
        return subprocess.run(command, input=script, capture_output=True, text=True, check=True).stdout.strip()

    return submit


def test_slurm_queued_running_asked_to_save_and_ended(
    sbatch: Callable[..., str], wait_for: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = JobFolder.of(tmp_path / "a")
    script = f"#!/bin/bash\nexec {sys.executable} stub.py {folder.state}\n"
    (tmp_path / "stub.py").write_text(STUB)
    job_id = sbatch(script, "--hold", "--ntasks=1")
    make_job(tmp_path / "a", job_id=job_id, submitted=time.time())
    after = sbatch("#!/bin/bash\ntrue\n", f"--dependency=afterok:{job_id}")
    make_job(tmp_path / "b", job_id=after, submitted=time.time())
    make_job(tmp_path / "c", job_id="99999", submitted=time.time())
    words = {Path(one.run).name: one for one in standings([tmp_path / name for name in "abc"])[0]}
    assert {name: one.state for name, one in words.items()} == {"a": "queued", "b": "queued", "c": "lost"}
    assert (words["a"].reason, words["b"].reason) == ("JobHeldUser", "Dependency")
    assert stand(tmp_path / "c").reason == "unknown to SLURM"  # alone, squeue would call it an error

    write_state(folder, "starting", job_id=job_id)  # the stub fills it in
    slurm.run("scontrol", "release", job_id)
    wait_for(lambda: json.loads(folder.state.read_text())["phase"] == "running")
    write_rank(folder)
    assert stand(tmp_path / "a").state == "running"
    with pytest.raises(InputError, match=f"is running as job {job_id}"):
        refuse_active(tmp_path / "a")

    assert subcommand("cancel", [str(tmp_path / "a")]) == 0
    assert f"; {after}, depending on it, will not start" in capsys.readouterr().out
    wait_for(lambda: slurm.known([job_id])[job_id].state == "FAILED")  # exit code 75
    assert stand(tmp_path / "a").state == "stopped"
    wait_for(lambda: stand(tmp_path / "b").reason == "DependencyNeverSatisfied")
    assert subcommand("cancel", [str(tmp_path / "b")]) == 0
    wait_for(lambda: stand(tmp_path / "b").state == "cancelled")


def test_slurm_names_tasks_of_arrays_and_jobs_that_end_before_their_supervisor_begins(
    sbatch: Callable[..., str], wait_for: Callable[..., None], tmp_path: Path
) -> None:
    job_id = sbatch("#!/bin/bash\nexit $SLURM_ARRAY_TASK_ID\n", "--array=0-1")
    for task in (0, 1):
        make_job(tmp_path / str(task), job_id=f"{job_id}_{task}", submitted=time.time())
    runs = [tmp_path / "0", tmp_path / "1"]
    after = sbatch("#!/bin/bash\ntrue\n", f"--dependency=afterok:{job_id}", "--hold")
    assert slurm.dependents(f"{job_id}_1") == slurm.dependents(job_id) == [after]
    assert slurm.dependents(f"{job_id}0") == slurm.dependents(job_id[:-1] or "0") == []
    slurm.cancel(after)
    wait_for(lambda: all(one.over for one in standings(runs)[0]))
    assert [(one.state, one.reason) for one in standings(runs)[0]] == [("lost", "COMPLETED"), ("failed", "FAILED")]
