"""Ingest that is killed, done in parts or added to: the folder ends as that of one undisturbed ingest, bit by bit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest, ingest_part, job, merge_parts
from ecgscale.data.ingest.slice import part_file
from ecgscale.data.remarked import Remarked
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import write_manifest
from ecgscale.data.sources import OpenedSource, SourceOptions, WfdbFolder, open_source
from ecgscale.errors import InputError, MachineError
from ecgscale.inspection import verify_dataset
from ecgscale.record import Record, Remark
from ecgscale.simulate import Simulation

OPTIONS = IngestOptions(rate_hz=100.0, records_per_shard=2, split_by="fold", validation_values=("1",))
SIMULATE = ("--patients=60", "--rate-hz=100", "--duration-s=5", "--records-per-shard=5")
UNFINISHED = "ingest.unfinished"


@dataclass(frozen=True)
class Tiny:
    """Records of one lead and five samples; names that end in "bad" cannot be read, those of one letter are odd."""

    names: tuple[str, ...]
    dataset: str = "tiny"
    key: str = "fold"
    read_items: list[str] | None = None

    def items(self) -> list[str]:
        return list(self.names)

    def read(self, item: str) -> Record:
        if self.read_items is not None:
            self.read_items.append(item)
        if item.endswith("bad"):
            raise InputError(f"{item}: cannot be read")
        fold = {self.key: str(len(item) % 2)}
        signal_LT = np.frombuffer(item.ljust(10).encode()[:10], np.int16)[None]
        remarks = (Remark("the name is short", "1 letter"), Remark("the name is short")) if len(item) == 1 else ()
        scale_L = np.ones(1, np.float32)
        return Record(item, signal_LT, scale_L, 100.0, ("I",), patient=item, metadata=fold, remarks=remarks)


class Again(Tiny):
    """Other names for the same records of the same patients."""

    def read(self, item: str) -> Record:
        return replace(super().read(item.removeprefix("again/")), name=item)


FIRST = Tiny(("a", "bbbbbb", "c-bad", "d-bad", "ee", "f", "g-bad", "h", "iii"))  # the second of five shards is empty
SECOND = Tiny(("1", "22", "3", "4-bad", "5"), "other")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(out: Path, names: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of some tars, by default those that have a part file."""
    if names is None:
        tars = (part.with_suffix("").with_suffix(".tar") for part in out.glob("*.part.safetensors"))
        names = [tar.name for tar in tars if tar.exists()]
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in names}


class Killed(BaseException):
    """A process that was killed does nothing any more, not even tidy up."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Die before the step-th change of the folder's list of files."""
    done = 0

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done >= step:
                raise Killed
            return change(*arguments, **options)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "link")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        yield


def killed_everywhere(run: Callable[[Path], object], folder: Path, begin: Callable[[Path], object]) -> Iterator[Path]:
    """Yields folders in which ``run`` was killed after 0, 1, 2 ... steps, until it is no more."""
    for step in range(1, 200):
        out = folder / f"{step}"
        begin(out)
        try:
            with killed_at(step):
                run(out)
        except Killed:
            yield out
            continue
        assert step > 15
        return
    raise AssertionError


# --- killed ---


def test_killed_at_any_step_and_gone_on(tmp_path) -> None:
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    undisturbed = contents(tmp_path / "undisturbed")
    assert len([name for name in undisturbed if name.endswith(".tar")]) == 4
    assert json.loads(undisturbed["manifest.json"])["rejected"] == 3
    for out in killed_everywhere(lambda out: ingest(FIRST, out, OPTIONS), tmp_path, lambda out: None):
        finished, read = stamps(out), []
        result = ingest(Tiny(FIRST.names, read_items=read), out, OPTIONS)
        assert (result.records, result.rejected, result.shards, result.patients_known) == (6, 3, 4, True)
        assert result.remarked == {"the name is short": Remarked(3, ["a", "f", "h"])}
        assert contents(out) == undisturbed
        assert stamps(out, finished) == finished
        assert len(read) < len(FIRST.names) or not finished
    # The last of them had its manifest already.
    with pytest.raises(InputError, match="holds a data set already"):
        ingest(FIRST, out, OPTIONS)


def test_finished_slices_are_not_read_again(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed), killed_at(12):
        ingest(FIRST, out, OPTIONS)
    finished = len(list(out.glob("*.part.safetensors")))
    assert finished == 2
    read: list[str] = []
    ingest(Tiny(FIRST.names, read_items=read), out, OPTIONS)
    assert read == list(FIRST.names[2 * finished :])


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_of_a_part_file_is_never_believed(tmp_path, seed) -> None:
    """Without a checksum over its columns, a patient or a split would be another, and no tar would tell."""
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    out, rng = tmp_path / "out", np.random.default_rng(seed)
    ingest_part(FIRST, out, OPTIONS, (1, 1))
    for part in sorted(out.glob("*.part.safetensors")):
        content = bytearray(part.read_bytes())
        content[rng.integers(8, len(content))] ^= 1 << rng.integers(8)
        part.write_bytes(content)
    ingest(FIRST, out, OPTIONS)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_what_is_damaged_is_done_again(tmp_path) -> None:
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    out = tmp_path / "out"
    for part in (1, 2):
        ingest_part(FIRST, out, OPTIONS, (part, 2))
    (out / "shard-000000.part.safetensors").write_bytes(b"")
    (out / "shard-000002.part.safetensors").write_bytes((out / "shard-000003.part.safetensors").read_bytes()[:100])
    (out / "shard-000003.tar").write_bytes(b"short")
    (out / "shard-000004.tar").unlink()
    with pytest.raises(InputError, match=r"4 of 5 shards.*shard-000000\.tar of --part 1/2"):
        merge_parts(FIRST, out, OPTIONS)
    ingest(FIRST, out, OPTIONS)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("mark", [b"", b'{"base": "', b"ingest", b"[]", b'{"parts": 1}', b"[" * 100_000])
def test_the_mark_of_an_older_version_does_not_block(tmp_path, mark) -> None:
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    out = tmp_path / "out"
    out.mkdir()
    (out / UNFINISHED).write_bytes(mark)
    for name in ("shard-000000.tar", "shard-000099.tar", "shard-000001.index.safetensors", "shard-000001.tar.partial"):
        (out / name).write_bytes(b"old")
    ingest(FIRST, out, OPTIONS)
    assert contents(out) == contents(tmp_path / "undisturbed")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys; from ecgscale.cli import main; sys.exit(main())"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], start_new_session=True, **output)


def wait_for_parts(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.part.safetensors"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What ``simulate`` with SIMULATE makes."""
    out = tmp_path_factory.mktemp("simulated") / "whole"
    options = IngestOptions(rate_hz=100.0, records_per_shard=5, test_fraction=0.2)
    ingest(Simulation(patients=60, rate_hz=100.0, duration_s=5.0), out, options)
    return out


def test_killed_by_the_system(whole, tmp_path) -> None:
    """Parent or worker, at random moments; the shards that were finished stay as they are."""
    out, rng = tmp_path / "out", random.Random(time.time_ns())
    finished: dict[str, tuple[int, int]] = {}
    for killed in ("parent", "worker"):
        count = len(finished) + 2
        with start("simulate", out, *SIMULATE, "--workers=2") as process:
            wait_for_parts(process, out, count)
            time.sleep(0.02 * rng.random())
            children = psutil.Process(process.pid).children(recursive=True)
            if killed == "parent":
                process.kill()
            else:  # the workers are the children of the fork server
                next(child for child in children if child.ppid() != process.pid).kill()
            _, error = process.communicate()
        assert process.returncode == (-signal.SIGKILL if killed == "parent" else 2)
        assert killed == "parent" or "a worker was killed, most likely for memory" in error
        assert not psutil.wait_procs(children, timeout=20)[1]  # orphans would go on writing there
        assert stamps(out, finished) == finished
        finished = stamps(out)
        assert len(finished) >= count
    with start("simulate", out, *SIMULATE, "--workers=2") as process:
        assert process.communicate()[0] == f"{out}: 120 records in 24 shards, 0 rejected\n"
    assert contents(out) == contents(whole)
    assert stamps(out, finished) == finished


# --- what is asked for ---


@pytest.mark.parametrize(
    ("source", "changed", "named"),
    [
        (FIRST, {"rate_hz": 50.0}, r"rate-hz 100\.0, this one 50\.0"),
        (FIRST, {"payload": "npy"}, "payload pco, this one npy"),
        (FIRST, {"records_per_shard": 3}, "records-per-shard 2, this one 3"),
        (FIRST, {"split_by": "", "validation_values": ()}, "split-by fold, this one none"),
        (FIRST, {"validation_values": ("0",), "test_values": ("1", "3")}, "test-values none, this one 1,3"),
        (Tiny(FIRST.names[:-1]), {}, "records 9, this one 8"),
        (Tiny((*FIRST.names[:-1], "k")), {}, "the sha256 of their names 444117.*"),
        (Tiny(FIRST.names, "other"), {}, "dataset tiny, this one other"),
    ],
)
def test_only_the_same_ingest_goes_on(tmp_path, source, changed, named) -> None:
    out = tmp_path / "out"
    ingest_part(FIRST, out, OPTIONS, (1, 2))
    before = contents(out)
    options = IngestOptions(**vars(OPTIONS) | changed)
    with pytest.raises(InputError, match=f"out: .*has {named}; give the same, or --restart"):
        ingest(source, out, options)
    assert contents(out) == before
    ingest(source, tmp_path / "new", options)
    ingest(source, out, options, restart=True)
    assert contents(out) == contents(tmp_path / "new")


def test_other_arguments_are_named(tmp_path) -> None:
    ingest_part(FIRST, tmp_path, OPTIONS, (1, 2), arguments={"--seed": "0"})
    with pytest.raises(InputError, match="has --seed 0, this one 1;"):
        ingest(FIRST, tmp_path, OPTIONS, arguments={"--seed": "1"})
    with pytest.raises(InputError, match="has --seed 0, this one unset;"):
        ingest(FIRST, tmp_path, OPTIONS)


def test_an_unknown_key_is_noticed_after_one_shard(tmp_path) -> None:
    out, read = tmp_path / "out", []
    source = Tiny(tuple(f"{i:05d}" for i in range(1000)), key="strat_fold", read_items=read)
    with pytest.raises(InputError, match="split-by fold: no record has that key; they have strat_fold"):
        ingest(source, out, OPTIONS)
    assert len(read) < 100
    assert not list(out.iterdir())  # it may be given another key at once
    ingest_part(source, out, IngestOptions(**vars(OPTIONS) | {"split_by": "strat_fold"}), (1, 50))


def test_a_key_that_the_first_records_lack_is_no_mistake(tmp_path) -> None:
    @dataclass(frozen=True)
    class Late(Tiny):
        def read(self, item: str) -> Record:
            return Tiny(self.names, key="fold" if item > "01" else "sex").read(item)

    result = ingest(Late(tuple(f"{i:02d}" + "x" * (i % 2) for i in range(20))), tmp_path, OPTIONS)
    assert result.records == 20


def test_wrong_splits_cost_no_second_conversion(tmp_path) -> None:
    wrong = IngestOptions(**vars(OPTIONS) | {"validation_values": ("7",)})
    with pytest.raises(InputError, match=r"no record has fold in \['7'\].*; the records have 0, 1"):
        ingest(FIRST, tmp_path / "out", wrong)
    read: list[str] = []
    ingest(Tiny(FIRST.names, read_items=read), tmp_path / "out", OPTIONS)
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    assert not read
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


# --- parts ---


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_parts_in_any_order_give_the_same_bytes(tmp_path, n) -> None:
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    out, order = tmp_path / "out", random.Random(n).sample(range(1, n + 1), n)
    missing = [ingest_part(FIRST, out, OPTIONS, (i, n)) for i in order]
    assert missing == sorted(missing, reverse=True)
    assert missing[-1] == 0
    assert ingest_part(FIRST, out, OPTIONS, (order[0], n)) == 0  # twice is harmless
    with pytest.raises(InputError, match="ingest was not finished"):
        ShardSet.open(out)
    result = merge_parts(FIRST, out, OPTIONS)
    assert (result.records, result.rejected, result.shards) == (6, 3, 4)
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.fixture
def headers(tmp_path, write_record, make_record) -> WfdbFolder:
    """Eight records in a folder of WFDB."""
    for i in range(8):
        write_record(tmp_path / "in", f"r{i}", make_record(f"r{i}", scale_L=np.full(12, 1e-3, np.float32)))
    return WfdbFolder(tmp_path / "in", "in")


def mend_gain(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace(" 16 999.", " 16 499."))
    assert path.read_text() != text


def test_parts_of_records_whose_headers_changed_since(tmp_path, headers) -> None:
    out, options = tmp_path / "out", replace(OPTIONS, split_by="", validation_values=())
    ingest_part(headers, out, options, (1, 2))
    mend_gain(tmp_path / "in" / "r2.hea")
    ingest_part(headers, out, options, (2, 2))
    said = r"out: 1 of 4 shards were made before .* changed, the first is shard-000001\.tar of --part 1/2; run its part"
    with pytest.raises(InputError, match=said):
        merge_parts(headers, out, options)
    kept = stamps(out, ["shard-000000.tar", "shard-000002.tar"])
    ingest_part(headers, out, options, (1, 2))
    assert stamps(out, kept) == kept, "the other slices stay"
    merge_parts(headers, out, options)
    ingest(headers, tmp_path / "undisturbed", options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def write_source(folder: Path, kind: str, records: Sequence[Record], write_record: Callable[..., Path]) -> OpenedSource:
    """Recordings in one of the ways that ingest reads."""
    if kind == "npy":
        folder.mkdir(parents=True, exist_ok=True)
        for record in records:
            np.save(folder / f"{record.name}.npy", record.millivolts().astype(np.float32))
        return open_source(folder, SourceOptions(source_rate_hz=100.0, dataset="in"))
    for record in records:
        write_record(folder / "in", record.name, record)
    where = folder
    if kind != "folder":
        where = folder / f"in.{kind}"
        where.unlink(missing_ok=True)
        form = {"zip": "zip", "tar": "tar", "tar.gz": "gztar"}[kind]
        shutil.make_archive(str(folder / "in"), form, folder, "in")
    return open_source(where, SourceOptions(dataset="in"))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "npy"])
def test_samples_that_changed_between_parts_are_noticed(tmp_path, write_record, kind) -> None:
    simulation = Simulation(patients=4, records_per_patient=1, rate_hz=100.0)
    records = [simulation.read(item) for item in simulation.items()]
    records = [replace(record, name=f"r{i}") for i, record in enumerate(records)]
    out, options = tmp_path / "out", replace(OPTIONS, split_by="", validation_values=())
    ingest_part(write_source(tmp_path / "src", kind, records, write_record), out, options, (1, 2))
    changed_LT = records[1].signal_LT.copy()
    changed_LT[0, [-2, -1]] = changed_LT[0, [-1, -2]] + np.array([1, -1], np.int16)  # the header's checksum stays
    changed = [records[0], replace(records[1], signal_LT=changed_LT), *records[2:]]
    source = write_source(tmp_path / "src", kind, changed, write_record)
    ingest_part(source, out, options, (2, 2))
    said = r"1 of 2 shards were made before .* files or tables changed, the first is shard-000000\.tar of --part 1/2"
    with pytest.raises(InputError, match=said):
        merge_parts(source, out, options)
    kept = stamps(out, ["shard-000001.tar"])
    ingest_part(source, out, options, (1, 2))
    merge_parts(source, out, options)
    assert stamps(out, kept) == kept
    ingest(source, tmp_path / "undisturbed", options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_samples_are_not_read_again_where_no_file_changed(tmp_path, headers, monkeypatch) -> None:
    out, options = tmp_path / "out", replace(OPTIONS, split_by="", validation_values=())
    ingest_part(headers, out, options, (1, 1))
    monkeypatch.setattr(WfdbFolder, "fingerprint", lambda self, item: pytest.fail("samples are read"))
    merge_parts(headers, out, options)


def test_an_interrupted_ingest_makes_records_anew_whose_headers_changed(tmp_path, headers) -> None:
    out, options = tmp_path / "out", replace(OPTIONS, split_by="", validation_values=())
    ingest_part(headers, out, options, (1, 2))
    mend_gain(tmp_path / "in" / "r0.hea")
    ingest(headers, out, options)
    ingest(headers, tmp_path / "undisturbed", options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_parts_on_machines_that_have_copies_of_the_records(tmp_path, headers) -> None:
    out, options = tmp_path / "out", replace(OPTIONS, split_by="", validation_values=())
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere" / "in", copy_function=shutil.copyfile)
    ingest_part(headers, out, options, (1, 2))
    ingest_part(WfdbFolder(tmp_path / "elsewhere" / "in", "in"), out, options, (2, 2))
    assert merge_parts(headers, out, options).records == 8


def test_parts_of_another_version(tmp_path, monkeypatch) -> None:
    ingest_part(FIRST, tmp_path / "out", OPTIONS, (1, 2))
    monkeypatch.setattr(job, "__version__", "9.9.9")
    with pytest.raises(InputError, match=r"has ecgscale \d.*, this one 9\.9\.9; give the same, or --restart"):
        ingest_part(FIRST, tmp_path / "out", OPTIONS, (2, 2))


def test_a_missing_part_is_named_and_plain_ingest_does_it(tmp_path) -> None:
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    out = tmp_path / "out"
    ingest_part(FIRST, out, OPTIONS, (1, 3))
    ingest_part(FIRST, out, OPTIONS, (3, 3))
    with pytest.raises(InputError, match=r"out: 2 of 5 shards.*shard-000001\.tar of --part 2/3"):
        merge_parts(FIRST, out, OPTIONS)
    ingest(FIRST, out, OPTIONS)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_part_files_of_an_earlier_version_are_done_again(tmp_path) -> None:
    ingest(FIRST, tmp_path / "undisturbed", OPTIONS)
    out, read = tmp_path / "out", []
    ingest_part(FIRST, out, OPTIONS, (1, 1))
    old = part_file(out / "shard-000000.tar")
    with safe_open(old, "np") as file:
        said = json.loads(file.metadata()["part"])
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    del said["remarks"]
    save_file(columns, old, {"part": json.dumps(said)})
    ingest(Tiny(FIRST.names, read_items=read), out, OPTIONS)
    assert read[-2:] == ["a", "bbbbbb"]
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_processes_write_parts_at_the_same_time(whole, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    processes = [start("simulate", out, *SIMULATE, f"--part={i}/3", "--workers=1") for i in (2, 3, 1)]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert any("all shards are there, --merge finishes" in line for line, _ in said)
    assert main(["simulate", str(out), *SIMULATE, "--merge"]) == 0
    assert capsys.readouterr().out == f"{out}: 120 records in 24 shards, 0 rejected\n"
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "-1/3", "1/3/5"])
def test_wrong_parts_are_refused(tmp_path, capsys, part) -> None:
    assert main(["simulate", str(tmp_path / "out"), f"--part={part}"]) == 2
    assert "--part" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@contextmanager
def locked(out: Path, first: int, count: int) -> Iterator[None]:
    """Another process that works on these shards."""
    script = "import fcntl, sys; file = open(sys.argv[1], 'r+b'); "
    script += f"fcntl.lockf(file, fcntl.LOCK_EX, {count}, {first}); print('locked', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(out / UNFINISHED)], **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        yield
        process.stdin.close()


def test_no_two_processes_write_the_same_shards(tmp_path) -> None:
    out = tmp_path / "out"
    ingest_part(FIRST, out, OPTIONS, (1, 5))
    with locked(out, 1, 2):
        for part in ((2, 5), (3, 5), (1, 2), (2, 3)):
            with pytest.raises(InputError, match="out: another ingest is writing the same shards; wait"):
                ingest_part(FIRST, out, OPTIONS, part)
        ingest_part(FIRST, out, OPTIONS, (4, 5))
        ingest_part(FIRST, out, OPTIONS, (5, 5))
        for finishing in (ingest, merge_parts):
            with pytest.raises(InputError, match="out: another ingest is writing there; wait"):
                finishing(FIRST, out, OPTIONS)
    ingest(FIRST, out, OPTIONS)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(number, tmp_path, monkeypatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert ingest(FIRST, tmp_path, OPTIONS).records == 6


# --- append ---


def appended(out: Path) -> None:
    ingest(FIRST, out, OPTIONS)
    ingest(SECOND, out, IngestOptions(rate_hz=100.0, records_per_shard=2, test_fraction=0.5), append=True)


def append(out: Path) -> None:
    ingest(SECOND, out, IngestOptions(rate_hz=100.0, records_per_shard=2, test_fraction=0.5), append=True)


def test_records_are_added_behind_the_old_ones(tmp_path) -> None:
    out = tmp_path / "out"
    ingest(FIRST, out, OPTIONS)
    old = contents(out)
    append(out)
    new = contents(out)
    changed = {name for name in old if new.get(name) != old[name]}
    index = next(name for name in old if name.startswith("index-"))
    assert changed == {"manifest.json", "rejected.csv", "remarks.csv", index}
    assert {name for name in new if name.endswith(".tar")} - set(old) == {f"shard-00000{i}.tar" for i in (5, 6, 7)}
    shards = ShardSet.open(out)
    verify_dataset(str(out))
    names = [name for source in (FIRST, SECOND) for name in source.names if not name.endswith("bad")]
    assert [shards.metadata(i)["name"] for i in range(len(shards))] == names
    assert [shard.dataset for shard in shards.shards] == 4 * ["tiny"] + 3 * ["other"]
    manifest = json.loads(new["manifest.json"])
    described = [(one["dataset"], one["records"], one["rejected"], one["shards"]) for one in manifest["sources"]]
    assert described == [("tiny", 6, 3, 4), ("other", 4, 1, 3)]
    assert manifest["sources"][1]["options"]["test_fraction"] == 0.5
    rows = new["rejected.csv"].decode().split("\r\n")
    assert rows[0] == "record,reason,dataset"
    assert [row.split(",")[0] for row in rows[1:-1]] == ["c-bad", "d-bad", "g-bad", "4-bad"]
    assert rows[4].endswith(",other")
    remarks = new["remarks.csv"].decode().split("\r\n")
    assert remarks[:2] == ["record,remark,details,dataset", "a,the name is short,1 letter,tiny"]
    assert [row.split(",")[0] for row in remarks[1:-1]] == ["a", "f", "h", "1", "3", "5"]
    counts = [one["remarked"]["the name is short"] for one in manifest["sources"]]
    assert counts == [{"records": 3, "first": ["a", "f", "h"]}, {"records": 3, "first": ["1", "3", "5"]}]
    read = load_file(out / manifest["index"]["file"])  # any reader of safetensors takes it
    assert all(np.array_equal(column, shards.column(name)) for name, column in read.items())


def test_killed_while_adding_the_old_set_stays(tmp_path) -> None:
    appended(tmp_path / "undisturbed")
    undisturbed = contents(tmp_path / "undisturbed")
    for out in killed_everywhere(append, tmp_path, lambda out: ingest(FIRST, out, OPTIONS)):
        assert len(ShardSet.open(out)) in (6, 10)
        verify_dataset(str(out))
        append(out)  # also where all was done but the tidying up
        assert contents(out) == undisturbed
    with pytest.raises(InputError, match="these records of 'other' are in it already"):
        append(out)


def test_adding_in_parts(tmp_path) -> None:
    appended(tmp_path / "undisturbed")
    out, options = tmp_path / "out", IngestOptions(rate_hz=100.0, records_per_shard=2, test_fraction=0.5)
    ingest(FIRST, out, OPTIONS)
    for i in (2, 1):
        ingest_part(SECOND, out, options, (i, 2), append=True)
        assert len(ShardSet.open(out)) == 6
    merge_parts(SECOND, out, options, append=True)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_what_cannot_be_added_is_refused(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"out: no manifest\.json there"):
        append(out)
    ingest_part(FIRST, out, OPTIONS, (1, 2))
    with pytest.raises(InputError, match=r"out: no manifest\.json there"):
        append(out)
    ingest(FIRST, out, OPTIONS)
    before = contents(out)
    refused = {
        "its records have 100 Hz, not 50; append with --rate-hz 100": (SECOND, {"rate_hz": 50.0}),
        "these records of 'tiny' are in it already": (FIRST, {}),
        "none of the 1 records": (Tiny(("x-bad",), "other"), {}),
    }
    for named, (source, changed) in refused.items():
        with pytest.raises(InputError, match=named):
            ingest(source, out, IngestOptions(**vars(OPTIONS) | changed), append=True)
        after = contents(out)
        assert after | {"rejected.csv": b""} == before | {"rejected.csv": b""}
    index = next(out.glob("index-*"))
    manifest = json.loads(before["manifest.json"])
    write_manifest(out, 100.0, manifest["index"], manifest["shards"], manifest["sources"], {"mv": 1.0})
    with pytest.raises(InputError, match="tars that others wrote"):
        append(out)
    (out / "manifest.json").write_bytes(before["manifest.json"])
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(InputError, match=f"{index}: missing or damaged"):
        append(out)


def test_patients_stay_in_their_split_when_records_are_added(tmp_path) -> None:
    """The same patient ids, split by a fold before and by a hash now."""
    out = tmp_path / "out"
    ingest(FIRST, out, OPTIONS)
    before = contents(out)
    more = Again(tuple(f"again/{name}" for name in (*FIRST.names, "zz")))
    hashed = IngestOptions(rate_hz=100.0, validation_fraction=0.0, test_fraction=0.9)
    with pytest.raises(
        InputError, match=r"patient '\w+' stands in two splits .* with the split options of the earlier"
    ):
        ingest(more, out, hashed, append=True)
    assert len(ShardSet.open(out)) == 6
    ingest(more, out, IngestOptions(**vars(OPTIONS) | {"records_per_shard": 9}), append=True, restart=True)
    assert len(ShardSet.open(out)) == 6 + 7
    assert contents(out).items() >= {name: old for name, old in before.items() if name.endswith(".tar")}.items()


# --- copies ---


class Twice(Tiny):
    """Names that begin with the same letter have the same samples."""

    def read(self, item: str) -> Record:
        return replace(super().read(item), signal_LT=super().read(item[0]).signal_LT)


COPIED = Twice(("a", "aa", "b", "bbb", "c"))
MORE = Twice(("aaa", "d", "dd"), "other")


def test_copies_are_listed_wherever_an_ingest_is_killed(tmp_path) -> None:
    ingest(COPIED, tmp_path / "undisturbed", OPTIONS)
    first = contents(tmp_path / "undisturbed")
    assert sorted(first["copies.csv"].decode().split("\r\n")[1:-1]) == [
        f"{name},{name[0]},tiny,{name},{split}"
        for name, split in (("a", "validation"), ("aa", "train"), ("b", "validation"), ("bbb", "validation"))
    ]
    ingest(MORE, tmp_path / "undisturbed", OPTIONS, append=True)
    both = contents(tmp_path / "undisturbed")
    assert [row.split(",")[0] for row in both["copies.csv"].decode().split("\r\n")[1:-1]].count("aaa") == 1
    for out in killed_everywhere(lambda out: ingest(COPIED, out, OPTIONS), tmp_path / "new", lambda out: None):
        ended = (out / "manifest.json").exists()
        if ended:  # all but the tidying up, which what follows does
            other = shutil.copytree(out, tmp_path / "appended" / out.name)
            ingest(MORE, other, OPTIONS, append=True)
            assert contents(other) == both
        assert len(ingest(COPIED, out, OPTIONS).copies) == 3
        assert contents(out) == first
    assert ended

    def add(out: Path) -> None:
        assert len(ingest(MORE, out, OPTIONS, append=True).copies) == 3

    for out in killed_everywhere(add, tmp_path / "old", lambda out: ingest(COPIED, out, OPTIONS)):
        add(out)
        assert contents(out) == both


def test_where_there_are_no_copies_any_more_no_table_says_so(tmp_path) -> None:
    ingest(COPIED, tmp_path, OPTIONS)
    for path in tmp_path.iterdir():
        if path.name != "copies.csv":
            path.unlink()
    assert ingest(FIRST, tmp_path, OPTIONS).copies == []
    assert not (tmp_path / "copies.csv").exists()


def test_half_a_table_of_a_finished_set_does_not_block(tmp_path) -> None:
    """As versions left it that wrote copies.csv behind everything else."""
    left = f"copies.csv.{32 * '0'}.partial"
    appended(tmp_path / "undisturbed")
    ingest(FIRST, tmp_path / "out", OPTIONS)
    (tmp_path / "out" / left).touch()
    append(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    for name, begin in (("notes.partial", lambda out: ingest(FIRST, out, OPTIONS)), (left, Path.mkdir)):
        out = tmp_path / name.split(".")[0]
        begin(out)
        (out / name).touch()
        with pytest.raises(InputError, match=f"{name}: not made by an interrupted ingest"):
            ingest(SECOND, out, OPTIONS, append=(out / "manifest.json").exists())
        assert (out / name).exists()


# --- resources ---


@pytest.mark.parametrize(
    ("limit_bytes", "shards", "records_per_shard", "named"),
    [
        (8_000, 1, 2, "shard-000000.tar: cannot write"),
        (24_000, 100, 3, "out: cannot write the index"),
        (12_000, 60, 1, "manifest.json: cannot write"),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(tmp_path, limit_bytes, shards, records_per_shard, named) -> None:
    """A limit on the size of files stands for the disk."""
    source = Tiny(tuple(f"{i:04d}" + "x" * (i % 2) for i in range(shards * records_per_shard)))
    out, options = tmp_path / "out", IngestOptions(rate_hz=100.0, records_per_shard=records_per_shard)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        with pytest.raises(MachineError, match=f"{named}.*File too large"):
            ingest(source, out, options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.glob("*.partial"))
    assert not (out / "manifest.json").exists()
    ingest(source, out, options)
    ingest(source, tmp_path / "undisturbed", options)
    assert contents(out) == contents(tmp_path / "undisturbed")


PEAK = """
import sys, tempfile
from pathlib import Path
import numpy as np
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.record import Record

class Tiny:
    dataset = "tiny"
    def items(self):
        return [f"{i:06d}" for i in range(int(sys.argv[1]))]
    def read(self, item):
        signal_LT, scale_L = np.ones((1, 5), np.int16), np.ones(1, np.float32)
        return Record(item, signal_LT, scale_L, 100.0, ("I",), item[:-1], {"fold": [item[-2]]})

options = IngestOptions(rate_hz=100.0, records_per_shard=100, split_by="fold", test_values=("1",))
with tempfile.TemporaryDirectory(dir=sys.argv[2]) as folder:
    ingest(Tiny(), Path(folder) / "set", options)
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(peak)  # ru_maxrss would be that of the parent
"""


def test_memory_does_not_grow_with_the_number_of_records(tmp_path) -> None:
    command = [sys.executable, "-c", PEAK]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, f"{n}", str(tmp_path)], **pipes) for n in (1_000, 9_000)]
    small, large = (int(process.communicate()[0]) for process in both)
    print(small, large)
    assert large - small < 3_000  # KiB; a name is 60 bytes, what was kept of a record a thousand
