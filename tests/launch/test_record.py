"""Is everything that a job is made of written down, and out of reach of later edits and of other users?"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from ecgscale import yaml_text
from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError, MachineError
from ecgscale.files import read_json_if_there, read_json_now, write_json, write_json_or_say
from ecgscale.provenance import Clone
from ecgscale.settings import Given
from ecgscale_launch import launching
from ecgscale_launch import snapshot as snapshot_module
from ecgscale_launch.job_folder import JobFolder, make_private, refuse_shared
from ecgscale_launch.job_record import JobRecord, Source, make_job, read_job, read_work, versions
from ecgscale_launch.launch_config import LaunchConfig
from ecgscale_launch.launching import resubmit
from ecgscale_launch.snapshot import PACKAGES, code_environment, package_folders, snapshot
from ecgscale_launch.stages import Wanted, stages
from ecgscale_launch.standing import standings

CLUSTER = LaunchConfig(nodes=2, environment={"A": "it's $(x)"})
INGEST = ["ingest", "a", "b"]
CODE = Source(package_folders(), Clone(None, False, b""))


def made(run: Path, command: list[str], cluster: LaunchConfig = CLUSTER) -> JobRecord:
    return make_job(run, read_work(command), cluster, "local", CODE)


@pytest.fixture
def package(tmp_path):
    """A package of one file."""
    folder = tmp_path / "clone" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("VALUE = 1\n")
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- job folders -----------------------------------------------------------------------------------------------------


def test_a_job_is_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["ingest", "in put", "out\nput", "--dataset", "$(x)", "--labels=\udc80", "--label-columns=a=1,2"]
    night = replace(CLUSTER, name="night")
    path = make_job(Path("runs/a"), read_work(command), night, "slurm", CODE).folder.path
    folder = JobFolder(path)
    assert path == tmp_path / "runs" / "a" / "launch"
    assert (mode(path), mode(path.parent)) == (0o700, 0o700)
    job = read_job(Path("runs/a"))
    assert (job.folder.path, job.run, job.cwd) == (path, str(path.parent), str(tmp_path))
    assert (job.name, job.command, job.where) == ("night", command, "slurm")
    assert (job.cluster, job.python) == (night, sys.executable)
    assert job.versions == versions()
    assert {"python", "ecgscale", "torch", "numpy"} <= set(job.versions)
    assert {one.name for one in folder.code.iterdir()} == set(PACKAGES)
    assert not list(folder.code.rglob("__pycache__"))
    given = {"source": "in put", "out": "out\nput", "dataset": "$(x)", "labels": ["\udc80"], "label_columns": ["a=1,2"]}
    assert yaml_text.read(folder.config) == given
    keys = "format name run command cluster where cwd time python commit dirty versions user host"
    assert " ".join(json.loads(folder.job.read_text())) == keys


def test_a_pretraining_runs_from_its_resolved_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_text("train: {steps: 7}")
    command = ["pretrain", "--config", "given.yaml", "--data.shards", "a,b"]
    made(tmp_path / "run", command)
    job = read_job(tmp_path / "run")
    (tmp_path / "given.yaml").write_text("train: {steps: 8}")
    assert job.name == "pretrain-run"
    assert job.command == command
    config = load(PretrainConfig, ["--config", str(job.folder.config)])
    assert (config.train.steps, config.data.shards, config.run.dir) == (7, ["a", "b"], str(tmp_path / "run"))


def test_parts_and_sweeps_are_values_of_their_jobs(tmp_path):
    *parts, merge = (piece for stage in stages(Wanted([INGEST], run="r", parts=2)) for piece in stage.pieces)
    assert [piece.work.values for piece in parts] == [
        {"source": "a", "out": "b", "part": part} for part in ("1/2", "2/2")
    ]
    assert merge.work.values == {"source": "a", "out": "b", "merge": True}
    command = ["pretrain", "--run.dir", "r", "--objective.name=cmsc"]
    sweeps = (("train.seed", ("1", "2")), ("data.leads", ("12", "I,II")))
    [stage] = stages(Wanted([command], sweeps=sweeps))
    swept = [(piece.work.values["train"]["seed"], piece.work.values["data"]["leads"]) for piece in stage.pieces]
    assert swept == [(1, ["12"]), (1, ["I", "II"]), (2, ["12"]), (2, ["I", "II"])]
    assert [piece.run.name for piece in stage.pieces][1] == "seed=1_leads=I,II"


def test_the_short_form_of_finetune_is_known(tmp_path):
    folder = made(tmp_path / "run", ["finetune", "--init", "model"]).folder
    assert yaml.safe_load(folder.config.read_text())["init"]["model"] == "model"


def test_what_is_wrong_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match=r"unknown key train\.stepz"):
        made(tmp_path / "run", ["pretrain", "--train.stepz", "3"])
    with pytest.raises(InputError, match="name 'a b': give up to 128"):
        made(tmp_path / "run", INGEST, replace(CLUSTER, name="a b"))
    with pytest.raises(InputError, match="ingest: the following arguments are required: out"):
        made(tmp_path / "run", ["ingest", "a"])
    with pytest.raises(InputError, match="NUL"):
        made(tmp_path / "run", ["ingest", "a\0", "b"])
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(tmp_path):
    made(tmp_path / "run", ["pretrain", "--train.seed", "1"])
    (tmp_path / "run" / "launch" / "config.yaml").rename(tmp_path / "run" / "config.yaml")  # as the run writes it
    with pytest.raises(InputError, match=r"the run has train\.seed 1, now it is 2"):
        made(tmp_path / "run", ["pretrain", "--train.seed", "2"])
    made(tmp_path / "run", ["pretrain", "--train.seed", "1", "--train.steps", "9"])


def test_a_data_set_is_no_run_folder(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is a data set"):
        made(tmp_path, INGEST)


@pytest.mark.parametrize("name", ["it's", 'a "b"', "$(touch pwned)", "`x`", "a b", "-rf", "ü", "; exit"])
def test_hostile_run_folders_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    made(Path(name), INGEST)
    job = read_job(Path(name))
    assert job.run == str(tmp_path / name)
    assert LaunchConfig(name=job.name).name == job.name
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\rb", "\udc80"])
def test_control_characters_in_run_folders_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"run folder .* control character") as refused:
        made(tmp_path / name, INGEST)
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o704, 0o720])
def test_a_job_folder_open_to_others_is_refused(tmp_path, bits):
    launch = tmp_path / "run" / "launch"
    launch.mkdir(parents=True)
    launch.chmod(bits)
    with pytest.raises(InputError, match=f"launch: open to others \\(mode {bits:04o}\\); chmod 700 it"):
        made(tmp_path / "run", INGEST)
    assert not list(launch.iterdir())
    launch.chmod(0o700)
    made(tmp_path / "run", INGEST)


def test_a_job_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    folder = made(tmp_path / "run", INGEST).folder
    monkeypatch.setattr(os, "geteuid", lambda: folder.path.stat().st_uid + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        refuse_shared(folder)


def test_a_link_or_file_in_place_of_the_job_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    for name, make in (("a", lambda path: path.symlink_to(tmp_path / "elsewhere")), ("b", Path.touch)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "launch")
        with pytest.raises(InputError, match="launch: not a folder"):
            made(tmp_path / name, INGEST)
    (tmp_path / "c").touch()
    for run in ("c", "c/d"):
        with pytest.raises(InputError, match=r"c: (not a folder|cannot make the folder)"):
            made(tmp_path / run, INGEST)


def test_an_existing_run_folder_keeps_its_mode(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    path = made(tmp_path / "run", INGEST).folder.path
    assert (mode(path), mode(path.parent)) == (0o700, 0o755)


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_job_is_named(tmp_path):
    for run in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError) as refused:
            read_job(run)
        assert str(refused.value) == f"{run}: no job of ecgscale-launch; give a run folder that it made"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "ecgscale-job/9"}, "format 'ecgscale-job/9'; this ecgscale-launch reads ecgscale-job/1"),
        ({"command": []}, "damaged, command is []"),
        ({"command": [1]}, "damaged, command '[1]': give a list of text"),
        ({"name": None}, "damaged, name: a value is missing"),
        ({"where": "moon"}, "damaged, where 'moon': give one of"),
        ({"versions": {"torch": 2}}, "damaged, versions \"{'torch': 2}\": give"),
        ({"cluster": {"nodes": 0}}, "damaged, nodes 0: give 1 or more"),
        ({"cluster": {"environment": {"A": "x\n$(y)"}}}, "damaged, environment.A 'x\\n$(y)'"),
        ({"cluster": {"colour": 1}}, "damaged, unknown key cluster.colour"),
    ],
)
def test_damaged_jobs_are_named(tmp_path, change, said):
    folder = made(tmp_path / "run", INGEST).folder
    write_json(folder.job, json.loads(folder.job.read_text()) | change)
    with pytest.raises(InputError) as refused:
        read_job(tmp_path / "run")
    assert str(refused.value).startswith(f"{folder.job}: {said}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1, "a": 2}'])
def test_files_that_are_no_json_are_named(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(InputError, match=r"state\.json: damaged, not"):
        read_json_if_there(tmp_path / "state.json")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_no_fault_of_the_user(tmp_path, monkeypatch, number):
    """Exit code 1, after which a job is started again; a status line goes without what cannot be read."""
    folder = made(tmp_path / "run", INGEST).folder

    def fails(*given: object, **named: object) -> None:
        raise OSError(number, os.strerror(number), str(folder.path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fails)
        with pytest.raises(MachineError, match=f"^{folder.job}: cannot read: {os.strerror(number)}"):
            read_job(tmp_path / "run")
        assert read_json_now(folder.state) is None
        (job,), complaint = standings([tmp_path / "run"])
        assert (job.state, complaint) == ("damaged", None)
        assert os.strerror(number) in (job.reason or "")
    for name, doing, what in (("lstat", "cannot read", refuse_shared), ("mkdir", "cannot make", make_private)):
        with monkeypatch.context() as patched:
            patched.setattr(Path, name, fails)
            with pytest.raises(MachineError, match=f"^{folder.path}: {doing}.*: {os.strerror(number)}"):
                what(folder)
    with monkeypatch.context() as patched:
        patched.setattr(snapshot_module, "_copy", fails)
        with pytest.raises(MachineError, match=f"^{folder.code}: cannot write: {os.strerror(number)}"):
            snapshot({"ecgscale": tmp_path}, folder.code)


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "state.json"
    assert read_json_if_there(path) is None
    write_json(path, {"text": "ü\udc80\n"})
    assert read_json_if_there(path) == {"text": "ü\udc80\n"}
    assert list(tmp_path.iterdir()) == [path]
    assert read_json_if_there(path / "below") is None
    write_json_or_say(path, {"mfu": float("nan")})
    assert read_json_if_there(path) == {"mfu": None}


def test_what_a_job_relies_on_is_flushed(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def counted(handle: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", counted)
    write_json(tmp_path / "state.json", {})
    assert [name.split(".")[0] for name in flushed] == ["state", tmp_path.name]


def test_attempts_are_counted(tmp_path):
    folder = JobFolder.of(tmp_path)
    assert folder.latest_attempt() is None
    for name in ("0002", "0010", "old", "00x1"):
        (folder.attempts / name).mkdir(parents=True)
    assert folder.latest_attempt() == folder.attempt(10) == tmp_path / "launch" / "attempts" / "0010"


# -- code ------------------------------------------------------------------------------------------------------------


def value_seen(folder: JobFolder, cwd: Path) -> str:
    """What a job imports that is started in ``cwd``."""
    command = [sys.executable, "-c", "import package; print(package.VALUE)"]
    environment = code_environment(folder.code, os.environ | {"PYTHONPATH": str(cwd)})
    done = subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_later_edits_do_not_reach_the_snapshot(package, tmp_path):
    folder = JobFolder(tmp_path)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "old.pyc").touch()
    (package / "data.json").symlink_to(package.parent / "data.json")
    (package.parent / "data.json").write_text("1")
    (package / ".#lock").symlink_to("nowhere")
    package.chmod(0o555)
    snapshot({"package": package}, folder.code)
    package.chmod(0o755)
    (package / "__init__.py").write_text("VALUE = 2\n")
    (package.parent / "data.json").write_text("2")
    assert sorted(path.name for path in (folder.code / "package").iterdir()) == ["__init__.py", "data.json"]
    assert (folder.code / "package" / "data.json").read_text() == "1"
    assert value_seen(folder, package.parent) == "1", "even where the clone is the current folder"


def test_a_snapshot_is_replaced_as_a_whole(package, tmp_path):
    folder = JobFolder(tmp_path / "job")
    (folder.path / f"code.{'0' * 32}.partial" / "package").mkdir(parents=True)  # left by one that was killed
    os.utime(folder.path / f"code.{'0' * 32}.partial", (0, 0))
    (package / "gone.py").touch()
    snapshot({"package": package}, folder.code)
    (package / "gone.py").unlink()
    (package / "__init__.py").write_text("VALUE = 2\n")
    snapshot({"package": package}, folder.code)
    assert value_seen(folder, tmp_path) == "2"
    assert [path.name for path in (folder.code / "package").glob("*.py")] == ["__init__.py"]
    assert list(folder.path.iterdir()) == [folder.code]


def test_a_snapshot_that_fails_leaves_the_one_before(package, tmp_path, monkeypatch):
    folder = JobFolder(tmp_path / "job")
    snapshot({"package": package}, folder.code)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (package / "__init__.py").write_text("VALUE = 2\n")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(MachineError, match=r"/job/code: cannot write: No space left"):
        snapshot({"package": package}, folder.code)
    assert value_seen(folder, tmp_path) == "1"
    assert [path.name for path in folder.path.iterdir()] == ["code"]


def test_jobs_of_an_array_share_one_copy_of_the_code(tmp_path):
    """Until one of them is given its own."""
    of_array = JobFolder.of(tmp_path / "runs")
    job = make_job(tmp_path / "runs" / "part-0001", read_work(INGEST), CLUSTER, "slurm", CODE, shares_code=True)
    assert not job.folder.code.exists()
    assert job.code == of_array.code
    snapshot(CODE.packages, job.folder.code)
    assert job.code == job.folder.code


def test_the_packages_are_found():
    for name, path in package_folders().items():
        assert (path / "__init__.py").is_file()
        assert path.name == name


def test_a_job_of_an_earlier_version_is_read(tmp_path):
    """Its job.json has no other keys; beside it lie cluster.yaml and a folder of submitit."""
    job = made(tmp_path / "run", INGEST)
    (job.folder.path / "submitit").mkdir()
    (job.folder.path / "submitit" / "7_0_log.out").write_text("srun: error\n")
    tree = json.loads(job.folder.job.read_text())
    write_json(job.folder.job, tree | {"versions": tree["versions"] | {"submitit": "1.5.4"}})
    assert read_job(tmp_path / "run").cluster == job.cluster
    assert job.folder.batch_folders() == [job.folder.path / "submitit"]


def test_code_of_an_earlier_version_is_not_submitted_again(tmp_path):
    job = make_job(tmp_path / "run", read_work(INGEST), CLUSTER, "slurm", CODE)
    (job.code / "ecgscale_launch" / "supervise.py").unlink()
    with pytest.raises(InputError, match=r"launch/code: packages of an earlier version, .*; give --new-code"):
        resubmit(job, Given(), new_code=False)


def test_new_code_for_a_job_of_an_earlier_version_gets_values(tmp_path, monkeypatch):
    """Its ranks read the command's words again; those of today read config.yaml."""
    job = make_job(tmp_path / "run", read_work([*INGEST, "--part", "2/3"]), CLUSTER, "slurm", CODE)
    values = yaml_text.read(job.folder.config)
    job.folder.config.unlink()
    monkeypatch.setattr(launching, "check_place", lambda *_: None)
    monkeypatch.setattr(launching.batch, "test", lambda _: None)
    monkeypatch.setattr(launching.batch, "submit", lambda _: ["7"])
    assert resubmit(job, Given(), new_code=False) == "7"
    assert not job.folder.config.exists(), "its own code needs none"
    assert resubmit(job, Given(), new_code=True) == "7"
    assert yaml_text.read(job.folder.config) == values == {"source": "a", "out": "b", "part": "2/3"}


def test_the_cluster_in_the_job_is_the_resolved_one(tmp_path):
    folder = made(tmp_path / "run", INGEST).folder
    assert json.loads(folder.job.read_text())["cluster"] == asdict(replace(CLUSTER, name="ingest-run"))


def test_a_job_is_made_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    make_job(tmp_path / "run", read_work(INGEST), CLUSTER, "local", Source.today())
    assert (read_job(tmp_path / "run").commit, (tmp_path / "run/launch/diff.patch").read_bytes()) == (None, b"")
