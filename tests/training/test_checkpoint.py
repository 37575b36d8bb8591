"""Checkpoints: nothing that is not finite replaces anything, nothing lies, nothing that is not ours is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecgscale.cli import main
from ecgscale.errors import InputError
from ecgscale.files import JSON_LIMIT_BYTES, file_sha256
from ecgscale.run_folder import leave_run
from ecgscale.training import checkpoint
from ecgscale.training.state import STATE, read_state, write_state
from small_jobs import SMALL, events, losses, put_checkpoint

TENSORS = "tensors-00000-of-00001.safetensors"


def job(shards: Path, run: Path, *more: str) -> list[str]:
    often = ["--train.checkpoint_every=2", "--train.validation_recordings=1", f"--run.dir={run}"]
    return ["pretrain", *SMALL, f"--data.shards={shards}", *often, *more]


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints at 2 and 4."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main(job(shards, run, "--train.steps=4")) == 0
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(autouse=True)
def leave(tmp_path) -> Iterator[None]:
    """What a command that failed leaves to the end of its process."""
    yield
    leave_run(tmp_path / "run")


def steps_left(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def is_finite(folder: Path) -> bool:
    return all(
        bool(tensor.isfinite().all()) for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
    )


# --- what is not finite ---


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_stage_saves_what_is_not_finite(world_size, tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).parent / "spoilt_states.py")
    common = os.environ | {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outcomes = [json.loads(process.communicate(timeout=240)[0]) for process in started]
    for name, outcome in outcomes[0].items():
        _, _, what, value = name.split("-")
        assert outcome["fresh"], name
        if value in ("1.0", "2.0"):
            assert (outcome["said"], outcome["left"]) == ("", ["step-00000007"]), name
        else:
            assert f"step 7 is not saved, {what}.last.weight is not finite" in outcome["said"], name
            assert outcome["left"] == [], name
        assert all(other[name]["said"] == outcome["said"] for other in outcomes), name


def poison(monkeypatch, value: float, step: int) -> None:
    """One weight of the run becomes ``value`` before its step number ``step``, as a flipped bit would have it."""
    import ecgscale.training.engine as engine_module
    import ecgscale.training.loop as loop_module

    engines = []
    start, seed = engine_module.Engine.__init__, loop_module._seed_dropout

    def remember(self, *arguments, **keywords) -> None:
        start(self, *arguments, **keywords)
        engines.append(self)

    def spoil(seed_, at, micro_step, rank) -> None:
        if at == step - 1:
            with torch.no_grad():
                engines[-1]._engine.optimizer.single_partition_of_fp32_groups[0][5] = value
        seed(seed_, at, micro_step, rank)

    monkeypatch.setattr(engine_module.Engine, "__init__", remember)
    monkeypatch.setattr(loop_module, "_seed_dropout", spoil)


@pytest.mark.parametrize("value", [float("inf"), 3e38])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_good_checkpoints_outlive_steps_that_are_skipped(
    value, keep_last, shards, tmp_path, monkeypatch, capsys
) -> None:
    again = job(shards, tmp_path / "run", "--train.steps=20", f"--train.keep_last={keep_last}")
    with monkeypatch.context() as patched:
        poison(patched, value, step=7)
        assert main(again) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite" in said or "non-finite gradient" in said
    folders = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert all(map(is_finite, folders))
    good = [folder for folder in folders if checkpoint.step_of(folder) <= 6]
    assert good, steps_left(tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()
    for folder in folders:
        if folder not in good:  # finite, but of the weight that no step can get away from
            shutil.rmtree(folder)
    assert main([*again[:-2], "--train.steps=8", again[-1]]) == 0


# --- what lies ---


def rewrite(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the newest checkpoint, with hashes that fit."""
    folder = run / "checkpoints" / "step-00000004"
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    about = {"bytes": (folder / TENSORS).stat().st_size, "sha256": file_sha256(folder / TENSORS)}
    restate(folder, {"files": {TENSORS: about}})


def restate(folder: Path, changes: dict[str, object]) -> None:
    """Change a state, with a hash that fits."""
    write_state(folder, {key: value for key, value in read_state(folder).items() if key != "sha256"} | changes)


def told(capsys, arguments: list[str], code: int = 2) -> str:
    """The last line of a command that ends with ``code``."""
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    return lines[-1]


def spoil(kind: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if name.startswith(f"{kind}."))].view(-1)[-1] = value

    return change


def test_what_versions_before_saved_is_not_gone_on_with(run, shards, capsys) -> None:
    for kind, value in (("exp_avg_sq", float("inf")), ("weight", float("nan"))):
        rewrite(run, spoil(kind, value))
        for steps in (4, 6):  # to export what is done already, and to train
            line = told(capsys, job(shards, run, f"--train.steps={steps}"))
            assert f"step-00000004: {kind}." in line
            assert "is not finite; remove" in line
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert main(job(shards, run, "--train.steps=4")) == 0


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight.encoder.renamed"] = tensors.pop(next(name for name in tensors if name.startswith("weight.encoder")))


def without_moment(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.startswith("exp_avg."))]


def of_another_type(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.startswith("weight."))
    tensors[name] = tensors[name].double()


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    of_two = (name for name, tensor in tensors.items() if name.startswith("weight.") and tensor.ndim == 2)
    name = next(name for name in of_two if len(set(tensors[name].shape)) == 2)
    tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, "is missing, the model has"),
        (without_moment, "exp_avg."),
        (reshaped, "has the shape"),
        (of_another_type, "is F64"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(change, says, run, shards, capsys) -> None:
    rewrite(run, change)
    line = told(capsys, job(shards, run, "--train.steps=6"))
    assert says in line
    assert "step-00000004" in line


SHA256 = "0" * 64
LIES: dict[str, dict[str, object]] = {
    "a negative step": {"step": -1},
    "a step beyond all": {"step": 1 << 63},
    "a step that is true": {"step": True},
    "a step as text": {"step": "4"},
    "half a step": {"step": 4.5},
    "another step": {"step": 5},
    "an infinite position": {"position": float("inf")},
    "a position that is no number": {"position": float("nan")},
    "more skipped steps than steps": {"skipped": 5},
    "more skipped in a row than at all": {"skipped": 1, "skipped_in_a_row": 2},
    "more updates than steps": {"optimizer_steps": 1 << 62},
    "a list for files": {"files": [TENSORS]},
    "a file elsewhere": {"files": {"../../export/model.safetensors": {"bytes": 1, "sha256": SHA256}}},
    "itself as a file": {"files": {STATE: {"bytes": 1, "sha256": SHA256}}},
    "the folder as a file": {"files": {"..": {"bytes": 1, "sha256": SHA256}}},
    "a size as text": {"files": {TENSORS: {"bytes": "1", "sha256": SHA256}}},
    "another size": {"files": {TENSORS: {"bytes": 1, "sha256": SHA256}}},
    "a hash of another length": {"files": {TENSORS: {"bytes": 1, "sha256": "0"}}},
    "no size": {"files": {TENSORS: None}},
    "text for the config": {"config": "engine: {}"},
    "a list of versions": {"versions": ["torch"]},
    "data of a number": {"data": 3},
    "an optimizer without its numbers": {"optimizer": {"slots": [], "scalars": {}}},
    "a slot of the optimizer that is a number": {"optimizer": {"slots": [1], "scalars": {}, "group": {}}},
    "a step of the optimizer as text": {"optimizer": {"slots": [], "scalars": {"step": "1"}, "group": {}}},
    "a step of the optimizer beyond all": {"optimizer": {"slots": [], "scalars": {"step": 10**400}, "group": {}}},
    "a list of the optimizer's numbers": {"optimizer": {"slots": [], "scalars": [], "group": {}}},
    "no model": {"about": []},
    "another format": {"format": 7},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_state_is_refused(lie, run, shards, capsys) -> None:
    folder = run / "checkpoints" / "step-00000004"
    state = json.loads((folder / STATE).read_text()) | LIES[lie]
    rest = {key: value for key, value in state.items() if key != "sha256"}
    state["sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / STATE).write_text(json.dumps(state))
    with pytest.raises(InputError, match="step-00000004"):
        checkpoint.latest(run / "checkpoints")


@pytest.mark.parametrize("key", ["step", "files", "sha256", "format", "data", "config", "position", "optimizer_steps"])
def test_a_state_without_a_key_is_refused(key, run, shards, capsys) -> None:
    folder = run / "checkpoints" / "step-00000004"
    state = {name: value for name, value in read_state(folder).items() if name not in ("sha256", key)}
    (folder / STATE).unlink()
    if key in ("sha256", "format"):
        (folder / STATE).write_text(json.dumps(state))
    else:
        write_state(folder, state)
    assert "step-00000004" in told(capsys, job(shards, run, "--train.steps=6"))


TEXTS = {
    "deep": b"[" * 200_000,
    "deep in objects": b'{"a":' * 100_000,
    "digits": b'{"step": ' + b"9" * 5_000 + b"}",
    "huge": b'{"step": "' + b"x" * JSON_LIMIT_BYTES + b'"}',
    "no text": bytes(range(256)),
    "a number": b"1e400",
    "empty": b"",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_state_that_is_none_is_refused_at_once(kind, tmp_path) -> None:
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    (folder / STATE).write_bytes(TEXTS[kind])
    began = time.monotonic()
    with pytest.raises(InputError, match=r"step-00000004/state\.json: (damaged|more than)") as refused:
        checkpoint.latest(tmp_path)
    assert time.monotonic() - began < 2
    assert len(str(refused.value)) < 500


def test_a_state_that_is_no_file_is_not_waited_for(tmp_path) -> None:
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    os.mkfifo(folder / STATE)
    with pytest.raises(InputError, match=r"state\.json: missing"):
        checkpoint.latest(tmp_path)


# --- what is not ours ---


def test_old_checkpoints_are_pruned_and_nothing_else(tmp_path) -> None:
    for step in (2, 4, 6, 8, 10):
        put_checkpoint(tmp_path, step)
    others = ["step-00000012.partial", "step-00000002-backup", "step-00000099-backup", "step-4", "step-000000004"]
    others += ["step-00000004 copy", "step-0000000x", "steps", "step-99999999999999999999"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000098").touch()  # no folder
    checkpoint.prune(tmp_path, keep_last=2, keep_every=4)
    assert [path.name[-2:] for path in checkpoint.checkpoints(tmp_path)] == ["04", "08", "10"]
    assert {path.name for path in tmp_path.iterdir()} >= {*others, "step-00000098"}
    checkpoint.prune(tmp_path, keep_last=1, keep_every=0, proven=9)
    assert [path.name[-2:] for path in checkpoint.checkpoints(tmp_path)] == ["08", "10"]
    checkpoint.prune(tmp_path, keep_last=1, keep_every=0, proven=10)
    assert [path.name[-2:] for path in checkpoint.checkpoints(tmp_path)] == ["10"]
    assert {path.name for path in tmp_path.iterdir()} == {*others, "step-00000098", "step-00000010"}


def test_checkpoints_are_in_order_of_steps(tmp_path) -> None:
    for step in (100_000_000, 99_999_999, 5):
        put_checkpoint(tmp_path, step)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_what_killed_saves_left_is_removed_once_a_later_one_is_whole(tmp_path) -> None:
    """Saves by the clock come at other steps in each start, so that nobody else would."""
    others = ["step-00000009.partial", "step-5.partial", "step-000000005.partial", "step-00000005.partial.bak"]
    others += ["step-00000005-backup.partial", "step-0000000x.partial"]
    put_checkpoint(tmp_path, 8)
    for name in ("step-00000005.partial", "step-00000007.partial", *others):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000005.partial" / TENSORS).touch()
    (tmp_path / "step-00000006.partial").touch()  # no folder
    checkpoint.prune(tmp_path, keep_last=1, keep_every=0)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "step-00000008", "step-00000006.partial"}


def test_a_removal_that_was_killed_is_finished(tmp_path) -> None:
    put_checkpoint(tmp_path, 2)
    (tmp_path / ".removed-step-00000001").mkdir()
    checkpoint.prune(tmp_path, keep_last=1, keep_every=0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_backup_beside_the_checkpoints_does_not_disturb(run, shards) -> None:
    backup = run / "checkpoints" / "step-00000004-backup"
    shutil.copytree(run / "checkpoints" / "step-00000004", backup)
    assert main(job(shards, run, "--train.steps=8")) == 0
    assert steps_left(run) == ["step-00000004-backup", "step-00000006", "step-00000008"]
    assert is_finite(backup)


def test_an_empty_folder_with_a_checkpoints_name_is_passed_over(run, shards, tmp_path, capsys) -> None:
    empty = run / "checkpoints" / "step-99999999"
    empty.mkdir()
    assert main(job(shards, run, "--train.steps=8", "--train.keep_last=1")) == 0
    assert f"{empty}: empty, so it is passed over; remove it" in capsys.readouterr().err.splitlines()
    assert steps_left(run) == ["step-00000006", "step-00000008", empty.name], "6 and 8: proven, and the newest"
    assert json.loads((run / "export/config.json").read_text())["step"] == 8
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["step"] == 8


def test_a_checkpoint_that_lacks_its_state_is_not_passed_over(run, shards, capsys) -> None:
    state = run / "checkpoints" / "step-00000004" / STATE
    state.unlink()
    line = told(capsys, job(shards, run, "--train.steps=8"))
    assert line == f"ecgscale: {state}: missing, so {state.parent} is no complete checkpoint; remove the folder"


# --- what earlier versions wrote ---


def test_a_checkpoint_without_buffers_and_optimizer_goes_on_with_the_same_bits(run, shards) -> None:
    early = run.parent / "early"
    shutil.copytree(run, early)
    folder = early / "checkpoints" / "step-00000004"
    state = read_state(folder)
    assert state["optimizer"] == {"slots": ["exp_avg", "exp_avg_sq"], "scalars": {"step": 4.0}, "group": {}}
    write_state(folder, {key: value for key, value in state.items() if key not in ("sha256", "optimizer")})
    for each in (run, early):
        assert main(job(shards, each, "--train.steps=6")) == 0
    assert losses(early) == losses(run)


# --- what the disk does ---


def fail_fsync(monkeypatch, part: str, times: int) -> list[str]:
    """The first fsyncs of a path that holds ``part`` fail; the paths."""
    fsync, failed = os.fsync, []

    def failing(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if part in path and len(failed) < times:
            failed.append(path)
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    return failed


@pytest.mark.parametrize("file", [TENSORS, STATE])
def test_one_error_of_the_disk_does_not_end_a_run(file, run, shards, monkeypatch, capsys) -> None:
    failed = fail_fsync(monkeypatch, f"step-00000006.partial/{file}", times=1)
    assert main(job(shards, run, "--train.steps=6")) == 0
    assert failed
    assert f"step-00000006.partial/{file}: cannot write: Input/output error; trying again" in capsys.readouterr().err
    assert steps_left(run) == ["step-00000004", "step-00000006"]


def test_a_disk_that_fails_ends_a_run_that_can_go_on(run, shards, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patched:
        fail_fsync(patched, f"step-00000006.partial/{TENSORS}", times=9)
        line = told(capsys, job(shards, run, "--train.steps=6"), code=1)
    assert line.startswith("ecgscale: cannot write the checkpoint: ")
    assert line.endswith(f"step-00000006.partial/{TENSORS}: cannot write: Input/output error")
    assert steps_left(run) == ["step-00000002", "step-00000004"]
    assert main(job(shards, run, "--train.steps=6")) == 0


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_a_run(run, shards, monkeypatch, capsys) -> None:
    rmtree = shutil.rmtree

    def busy(path: Path, **keywords: object) -> None:
        if "removed" in path.name:
            raise OSError(39, "Directory not empty", str(path))
        rmtree(path, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", busy)
        assert main(job(shards, run, "--train.steps=6")) == 0
    assert "cannot remove old checkpoints: Directory not empty; tried again after" in capsys.readouterr().err
    assert steps_left(run) == [".removed-step-00000002", "step-00000004", "step-00000006"]
    assert main(job(shards, run, "--train.steps=8")) == 0
    assert steps_left(run) == ["step-00000006", "step-00000008"]


def test_what_does_not_read_back_is_the_machines_fault(run, shards, monkeypatch, capsys) -> None:
    fsync = os.fsync

    def forgetful(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.parent.name == "step-00000006.partial" and path.name.startswith(STATE):
            with (path.parent / TENSORS).open("r+b") as tensors:
                tensors.write(b"\0")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", forgetful)
    line = told(capsys, job(shards, run, "--train.steps=6"), code=1)
    assert "step-00000006.partial: what was written does not read back" in line
    assert steps_left(run) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("name", ["events.jsonl", "recordings/rank-0.jsonl"])
def test_a_full_disk_names_the_file(name, shards, tmp_path, capsys) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.symlink_to("/dev/full")
    line = told(capsys, job(shards, tmp_path / "run", "--train.steps=2", "--train.log_recordings=true"), code=1)
    assert line == f"ecgscale: {file}: cannot write: No space left on device"


FULL_BOARD = """
import sys
from ecgscale.cli import main
from tensorboard.summary.writer.record_writer import RecordWriter

def full(*_):
    raise OSError(28, "No space left on device")

RecordWriter.write = full
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_names_tensorboards_folder(shards, tmp_path) -> None:
    command = [sys.executable, "-c", FULL_BOARD, *job(shards, tmp_path / "run", "--train.steps=4")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line == f"ecgscale: {tmp_path / 'run' / 'tensorboard'}: cannot write: No space left on device"
    assert ended.returncode == 1


def test_fewer_steps_than_are_done_export_what_is_there(run, shards) -> None:
    assert main(job(shards, run, "--train.steps=4")) == 0
    whole = json.loads((run / "export/config.json").read_text())
    assert main(job(shards, run, "--train.steps=3")) == 0
    fewer = json.loads((run / "export/config.json").read_text())
    assert (fewer["step"], fewer["weights_sha256"]) == (4, whole["weights_sha256"])


@pytest.mark.parametrize("key", ["train.seed=9223372036854775808", "data.workers=1025"])
def test_numbers_beyond_what_a_machine_takes_are_refused(key, run, shards, capsys) -> None:
    assert f"{key.replace('=', ' ')}: give" in told(capsys, job(shards, run, f"--{key}"))


def test_a_run_that_began_while_the_folder_was_waited_for_is_not_taken_over(
    shards, tmp_path, capsys, monkeypatch
) -> None:
    """Two launches at once: the one that waited for the lock has looked at a folder that was still empty."""
    run = tmp_path / "run"

    def lock(folder: Path) -> None:
        monkeypatch.undo()
        assert main(job(shards, folder, "--train.steps=2", "--train.seed=5")) == 0

    monkeypatch.setattr("ecgscale.run.lock_run", lock)
    line = told(capsys, job(shards, run, "--train.steps=2"))
    assert "the run has train.seed 5, now it is 0" in line


# --- what has changed since ---


def test_the_config_of_the_checkpoint_counts_where_the_file_is_gone(run, shards, capsys) -> None:
    (run / "config.yaml").unlink()
    line = told(capsys, job(shards, run, "--train.steps=6", "--engine.learning_rate=7e-3"))
    assert "step-00000004/state.json: the run has engine.learning_rate 0.001, now it is 0.007" in line
    assert main(job(shards, run, "--train.steps=6")) == 0
    assert (run / "config.yaml").exists()


def test_a_config_that_was_edited_does_not_change_a_run(run, shards, capsys) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("weight_decay: 0.01", "weight_decay: 0.5"))
    line = told(capsys, job(shards, run, "--train.steps=6", "--engine.weight_decay=0.5"))
    assert "state.json: the run has engine.weight_decay 0.01, now it is 0.5" in line


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"\xff\xfe\x00", b"[" * 5000, b"a: [1"])
def test_a_damaged_config_is_told_in_a_line(content, run, shards, capsys) -> None:
    (run / "config.yaml").write_bytes(content)
    line = told(capsys, job(shards, run, "--train.steps=6"))
    assert "config.yaml: damaged" in line
    assert "remove it" in line


def test_versions_that_have_changed_are_told(run, shards, capsys) -> None:
    folder = run / "checkpoints" / "step-00000004"
    versions = read_state(folder)["versions"]
    assert versions.keys() == {"ecgscale", "torch", "deepspeed", "python"}
    assert main(job(shards, run, "--train.steps=6")) == 0
    assert "versions have changed" not in capsys.readouterr().err
    folder = run / "checkpoints" / "step-00000006"
    restate(folder, {"versions": versions | {"torch": "2.4.1", "ecgscale": "0.0.9"}})
    assert main(job(shards, run, "--train.steps=8")) == 0
    line = f"versions have changed since: ecgscale 0.0.9 -> {versions['ecgscale']}, torch 2.4.1 -> {versions['torch']}"
    assert line in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("schedule", "steps", "becomes"),
    [
        ("linear", 8, "the learning rate of step 5 was 0.0005, now it is 0.0006667 and falls until step 8 (linear)"),
        ("linear", 5, "the learning rate of step 5 was 0.0005, now it is 0.0003333 and falls until step 5 (linear)"),
        ("linear", 4, None),
        ("constant", 8, None),
    ],
)
def test_what_another_number_of_steps_does_to_the_rate_is_told(
    schedule, steps, becomes, shards, tmp_path, capsys
) -> None:
    """The expected rates are those of a line from step 2 to the end, from 0.001 to 0."""
    run = tmp_path / "run"
    of_rate = [f"--train.schedule={schedule}", "--train.warmup_steps=2", "--train.final_lr_ratio=0"]
    again = [*job(shards, run), *of_rate]
    assert main([*again, "--train.steps=6"]) == 0
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    leave_run(run)
    assert main([*again, "--train.steps=6"]) == 0
    assert "train.steps was" not in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main([*again, f"--train.steps={steps}"]) == 0
    told_of = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.steps was")]
    assert told_of == ([f"train.steps was 6, now it is {steps}: {becomes}"] if becomes else [])
    if becomes:
        trained_at = [event for event in events(run) if event.get("step") == 5 and "train/learning_rate" in event]
        assert f"now it is {trained_at[-1]['train/learning_rate']:.4g} " in becomes


def test_a_config_that_is_nested_for_long_is_told_in_a_line(run, shards, capsys) -> None:
    nested: dict[str, object] = {}
    for _ in range(900):
        nested = {"engine": nested}
    restate(run / "checkpoints" / "step-00000004", {"config": nested})
    assert "step-00000004/state.json: " in told(capsys, job(shards, run, "--train.steps=6"))


# --- events ---


@pytest.mark.parametrize("torn", [b'{"event": "step", "time": 1.0, "step": 5, "tra', b"\0" * 4096, b'{"a": "\xc3'])
def test_a_torn_line_of_events_swallows_none(torn, run, shards) -> None:
    with (run / "events.jsonl").open("ab") as file:
        file.write(torn)
    assert main(job(shards, run, "--train.steps=8")) == 0
    assert {event["step"] for event in events(run) if event["event"] == "step"} == set(range(1, 9))
