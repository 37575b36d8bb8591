"""Is everything that a job is made of written down, and out of reach of later edits and of other users?"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError, MachineError
from ecgscale.files import write_json
from ecgscale_launch import record
from ecgscale_launch.folder import JobFolder, code_environment, read_json_if_there, read_json_now, write_json_or_say
from ecgscale_launch.record import (
    describe_clone,
    make_job_folder,
    make_private,
    package_folders,
    read_job,
    refuse_shared,
    snapshot,
    versions,
)
from ecgscale_launch.resources import ClusterConfig, load_cluster
from ecgscale_launch.standing import standings

CLUSTER = ClusterConfig(nodes=2, environment={"A": "it's $(x)"})


def git(folder: Path, *arguments: str) -> str:
    own = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *own, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def clone(tmp_path):
    """A repository with one package of one file, not committed."""
    package = tmp_path / "clone" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 1\n")
    git(package.parent, "init", "-q")
    return package


@pytest.fixture
def committed(clone):
    git(clone, "add", ".")
    git(clone, "commit", "-qm", "first")
    return clone


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- job folders -----------------------------------------------------------------------------------------------------


def test_a_job_is_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["ingest", "in put", "out\nput", "$(x)"]
    path = make_job_folder(Path("runs/a"), command, CLUSTER, "slurm", "night")
    folder = JobFolder(path)
    assert path == tmp_path / "runs" / "a" / "launch"
    assert (mode(path), mode(path.parent)) == (0o700, 0o700)
    job = read_job(Path("runs/a"))
    assert (job.folder, job.run, job.cwd) == (folder, path.parent, tmp_path)
    assert (job.name, job.command, job.arguments, job.where) == ("night", command, command, "slurm")
    assert (job.cluster, job.python) == (replace(CLUSTER, name="night"), sys.executable)
    assert job.versions == versions()
    assert {"python", "ecgscale", "torch", "numpy"} <= set(job.versions)
    assert load_cluster(folder.cluster, []) == job.cluster
    assert {one.name for one in folder.code.iterdir()} == set(record.PACKAGES)
    assert not list(folder.code.rglob("__pycache__"))
    assert not folder.config.exists()
    keys = "format name run command cluster where cwd time python commit dirty versions user host"
    assert " ".join(json.loads(folder.job.read_text())) == keys


def test_a_pretraining_runs_from_its_resolved_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.yaml").write_text("train: {steps: 7}")
    command = ["pretrain", "--config", "given.yaml", "--data.shards", "a,b"]
    job = read_job(Path(make_job_folder(tmp_path / "run", command, CLUSTER, "local")).parent)
    (tmp_path / "given.yaml").write_text("train: {steps: 8}")
    assert job.name == "pretrain-run"
    assert job.command == command
    assert job.arguments == ["pretrain", "--config", str(job.folder.config)]
    config = load(PretrainConfig, job.arguments[1:])
    assert (config.train.steps, config.data.shards, config.run.dir) == (7, ["a", "b"], str(tmp_path / "run"))


def test_the_short_form_of_finetune_is_known(tmp_path):
    folder = JobFolder(make_job_folder(tmp_path / "run", ["finetune", "--init", "model"], CLUSTER, "local"))
    assert yaml.safe_load(folder.config.read_text())["init"]["model"] == "model"


def test_what_is_wrong_is_told_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match=r"unknown key train\.stepz"):
        make_job_folder(tmp_path / "run", ["pretrain", "--train.stepz", "3"], CLUSTER, "local")
    with pytest.raises(InputError, match="name 'a b': give up to 128"):
        make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local", "a b")
    with pytest.raises(InputError, match="NUL"):
        make_job_folder(tmp_path / "run", ["ingest", "a\0"], CLUSTER, "local")
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(tmp_path):
    make_job_folder(tmp_path / "run", ["pretrain", "--train.seed", "1"], CLUSTER, "local")
    (tmp_path / "run" / "launch" / "config.yaml").rename(tmp_path / "run" / "config.yaml")  # as the run writes it
    with pytest.raises(InputError, match=r"the run has train\.seed 1, now it is 2"):
        make_job_folder(tmp_path / "run", ["pretrain", "--train.seed", "2"], CLUSTER, "local")
    make_job_folder(tmp_path / "run", ["pretrain", "--train.seed", "1", "--train.steps", "9"], CLUSTER, "local")


def test_a_data_set_is_no_run_folder(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="is a data set"):
        make_job_folder(tmp_path, ["ingest"], CLUSTER, "local")


@pytest.mark.parametrize("name", ["it's", 'a "b"', "$(touch pwned)", "`x`", "a b", "-rf", "ü", "; exit"])
def test_hostile_run_folders_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_job_folder(Path(name), ["ingest", "x"], CLUSTER, "local")
    job = read_job(Path(name))
    assert job.run == tmp_path / name
    assert ClusterConfig(name=job.name).name == job.name
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", "a\rb", "\udc80"])
def test_control_characters_in_run_folders_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"run folder .* control character") as refused:
        make_job_folder(tmp_path / name, ["ingest", "x"], CLUSTER, "local")
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o704, 0o720])
def test_a_job_folder_open_to_others_is_refused(tmp_path, bits):
    launch = tmp_path / "run" / "launch"
    launch.mkdir(parents=True)
    launch.chmod(bits)
    with pytest.raises(InputError, match=f"launch: open to others \\(mode {bits:04o}\\); chmod 700 it"):
        make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local")
    assert not list(launch.iterdir())
    launch.chmod(0o700)
    make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local")


def test_a_job_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    folder = JobFolder(make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local"))
    monkeypatch.setattr(os, "geteuid", lambda: folder.path.stat().st_uid + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        refuse_shared(folder)


def test_a_link_or_file_in_place_of_the_job_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    for name, make in (("a", lambda path: path.symlink_to(tmp_path / "elsewhere")), ("b", Path.touch)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "launch")
        with pytest.raises(InputError, match="launch: not a folder"):
            make_job_folder(tmp_path / name, ["ingest"], CLUSTER, "local")
    (tmp_path / "c").touch()
    for run in ("c", "c/d"):
        with pytest.raises(InputError, match=r"c: (not a folder|cannot make the folder)"):
            make_job_folder(tmp_path / run, ["ingest"], CLUSTER, "local")


def test_an_existing_run_folder_keeps_its_mode(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o755)
    path = make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local")
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
        ({"command": [1]}, "damaged, command is [1]"),
        ({"name": None}, "damaged, name is None"),
        ({"where": "moon"}, "damaged, where is 'moon'"),
        ({"versions": {"torch": 2}}, "damaged, versions is {'torch': 2}"),
        ({"cluster": {"nodes": 0}}, "damaged, cluster: nodes 0: give 1 or more"),
        ({"cluster": {"environment": {"A": "x\n$(y)"}}}, "damaged, cluster: environment.A 'x\\n$(y)'"),
        ({"cluster": {"colour": 1}}, "damaged, cluster: "),
    ],
)
def test_damaged_jobs_are_named(tmp_path, change, said):
    folder = JobFolder(make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local"))
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
    folder = JobFolder(make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local"))

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
        patched.setattr(record, "_copy", fails)
        with pytest.raises(MachineError, match=f"^{folder.path}: cannot copy the code: {os.strerror(number)}"):
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
    environment = code_environment(folder, os.environ | {"PYTHONPATH": str(cwd)})
    done = subprocess.run(command, cwd=cwd, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_later_edits_do_not_reach_the_snapshot(clone, tmp_path):
    folder = JobFolder(tmp_path)
    (clone / "__pycache__").mkdir()
    (clone / "__pycache__" / "old.pyc").touch()
    (clone / "data.json").symlink_to(clone.parent / "data.json")
    (clone.parent / "data.json").write_text("1")
    (clone / ".#lock").symlink_to("nowhere")
    clone.chmod(0o555)
    snapshot({"package": clone}, folder.code)
    clone.chmod(0o755)
    (clone / "__init__.py").write_text("VALUE = 2\n")
    (clone.parent / "data.json").write_text("2")
    assert sorted(path.name for path in (folder.code / "package").iterdir()) == ["__init__.py", "data.json"]
    assert (folder.code / "package" / "data.json").read_text() == "1"
    assert value_seen(folder, clone.parent) == "1", "even where the clone is the current folder"


def test_a_snapshot_is_replaced_as_a_whole(clone, tmp_path):
    folder = JobFolder(tmp_path / "job")
    for name in ("code.new", "code.old"):  # left by a submission that was killed
        (folder.path / name / "package").mkdir(parents=True)
    (clone / "gone.py").touch()
    snapshot({"package": clone}, folder.code)
    (clone / "gone.py").unlink()
    (clone / "__init__.py").write_text("VALUE = 2\n")
    snapshot({"package": clone}, folder.code)
    assert value_seen(folder, tmp_path) == "2"
    assert [path.name for path in (folder.code / "package").glob("*.py")] == ["__init__.py"]
    assert list(folder.path.iterdir()) == [folder.code]


def test_a_snapshot_that_fails_leaves_the_one_before(clone, tmp_path):
    folder = JobFolder(tmp_path / "job")
    snapshot({"package": clone}, folder.code)
    (folder.path / "code.new").write_text("in the way")
    with pytest.raises(InputError, match="cannot copy the code"):
        snapshot({"package": clone}, folder.code)
    assert value_seen(folder, tmp_path) == "1"


def test_the_packages_are_found():
    for name, path in package_folders().items():
        assert (path / "__init__.py").is_file()
        assert path.name == name


# -- git -------------------------------------------------------------------------------------------------------------


def test_a_clean_clone(committed):
    clone = describe_clone(committed)
    assert clone.commit == git(committed, "rev-parse", "HEAD").strip()
    assert (clone.dirty, clone.diff) == (False, b"")


def test_the_diff_rebuilds_the_working_tree(committed, tmp_path):
    (committed / "__init__.py").write_text("VALUE = 2\n")
    (committed / "staged.py").write_text("x\n")
    git(committed, "add", "staged.py")
    (committed / "binary").write_bytes(bytes(range(256)))
    (committed / "empty").touch()
    (committed / "*$(x) 'ü\n").write_text("hostile\n")
    (committed.parent / "outside the package").write_text("y\n")
    (committed / ".gitignore").write_text("secret\n")
    (committed / "secret").write_text("not shown\n")
    before = git(committed, "status", "--porcelain")
    clone = describe_clone(committed)
    assert clone.dirty
    assert git(committed, "status", "--porcelain") == before, "nothing of the clone is changed"

    git(tmp_path, "clone", "-q", str(committed.parent), "again")
    (tmp_path / "diff.patch").write_bytes(clone.diff)
    git(tmp_path / "again", "apply", str(tmp_path / "diff.patch"))

    def files(root: Path) -> dict[str, bytes]:
        found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        return {str(path): (root / path).read_bytes() for path in found if path.parts[0] != ".git"}

    expected = files(committed.parent)
    assert expected.pop("package/secret")
    assert files(tmp_path / "again") == expected


@pytest.mark.parametrize("added", [False, True])
def test_a_repository_without_commits(clone, added):
    if added:
        git(clone, "add", ".")
    found = describe_clone(clone)
    assert (found.commit, found.dirty) == (None, True)
    assert b"+VALUE = 1" in found.diff


def test_no_repository(tmp_path):
    assert describe_clone(tmp_path) == record.Clone(None, False, b"")


def test_a_package_that_is_ignored_belongs_to_no_clone(committed):
    installed = committed.parent / ".venv" / "package"
    installed.mkdir(parents=True)
    (committed.parent / ".gitignore").write_text(".venv\n")
    assert describe_clone(installed) == record.Clone(None, False, b"")


def test_no_git(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_clone(committed) == record.Clone(None, False, b"")
    make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local")
    assert (read_job(tmp_path / "run").commit, (tmp_path / "run/launch/diff.patch").read_bytes()) == (None, b"")


def test_huge_diffs_are_cut_with_a_note(committed, monkeypatch):
    monkeypatch.setattr(record, "_DIFF_LIMIT", 2**20)
    (committed / "__init__.py").write_text("VALUE = 2  # long\n" * 100_000)
    (committed / "huge.npy").write_bytes(b"\0" * 2**21)
    diff = describe_clone(committed).diff
    assert len(diff) < 2**20 + 1000
    notes = [line for line in diff.decode().splitlines() if line.startswith("# ")]
    assert notes == [
        "# ecgscale-launch: left out, too large: b'package/huge.npy'",
        "# ecgscale-launch: cut at 1 MB, does not apply",
    ]
    assert diff.endswith(b"# long\n")


def test_a_slow_git_does_not_hold_up_the_submission(committed, monkeypatch):
    monkeypatch.setattr(record, "_GIT_LIMIT_S", 0.0)
    describe_clone(committed)


def test_the_surroundings_of_a_hook_do_not_mislead(committed, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert describe_clone(committed).commit is not None


def test_settings_of_the_user_do_not_change_the_diff(committed):
    (committed / "__init__.py").write_text("VALUE = 2\n")
    plain = describe_clone(committed).diff
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false")):
        git(committed, "config", key, value)
    assert describe_clone(committed).diff == plain


def test_a_clone_within_is_left_out_with_a_note(committed):
    inner = committed / "inner"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "file").touch()
    (committed / "new.py").write_text("new\n")
    diff = describe_clone(committed).diff
    assert diff.startswith(b"# ecgscale-launch: left out, a clone of its own: b'package/inner/'\n")
    assert b"+new" in diff


def test_the_cluster_in_the_job_is_the_resolved_one(tmp_path):
    folder = JobFolder(make_job_folder(tmp_path / "run", ["ingest"], CLUSTER, "local"))
    assert json.loads(folder.job.read_text())["cluster"] == asdict(replace(CLUSTER, name="ingest-run"))
