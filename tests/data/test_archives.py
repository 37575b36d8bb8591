"""Archives of WFDB: the same records as from the folder, and nothing of a hostile one outside of a temporary folder."""

from __future__ import annotations

import bz2
import errno
import fcntl
import gc
import gzip
import io
import lzma
import multiprocessing
import os
import pickle
import random
import re
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_128

from ecgscale import cli
from ecgscale.data.sources import Source, SourceOptions, WfdbFolder, archive, open_source, scratch
from ecgscale.data.sources.catalogue import Catalogue, Member
from ecgscale.errors import InputError, MachineError
from ecgscale.record import Record

PACKED = ("zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")
OPTIONS = SourceOptions()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where temporary files go, with nothing else in it."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(scratch, "_MEMORY", place)
    yield place
    gc.collect()
    assert not list(place.iterdir()), "left behind"


@pytest.fixture
def raw(tmp_path, write_record, make_record) -> Path:
    """Six records in two folders, one of them with segments."""
    root = tmp_path / "raw"
    for i in range(6):
        write_record(root / f"p{i % 2}", f"r{i}", make_record(f"r{i}"), [f"Age: {50 + i}", "Dx: 1,2", "PatientID: 7"])
    (root / "p0" / "long.hea").write_text("long/2 12 100 2000\nr0 1000\nr2 1000\n")
    for header in (root / "p0" / "r0.hea", root / "p0" / "r2.hea"):  # one gain throughout
        header.write_text(re.sub(r" 16 [\d.]+\(0\)", " 16 1000(0)", header.read_text()))
    return root


def pack(root: Path, out: Path, top: str = "") -> Path:
    """The files below a folder as an archive, by its suffix; ``top`` is a folder to put before."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [(path, f"{top}{path.relative_to(root).as_posix()}") for path in files]
    if out.suffix == ".zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
            for i, (path, name) in enumerate(names):
                packed.write(path, name, zipfile.ZIP_STORED if i % 2 else zipfile.ZIP_DEFLATED)
    else:
        mode = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "xz": "xz", "tar": ""}[out.name.rpartition(".")[2]]
        with tarfile.open(out, f"w:{mode}") as packed:
            for path, name in names:
                packed.add(path, name)
    return out


def one_member(out: Path, name: str, content: bytes = b"x", **fields: object) -> Path:
    """An archive of one member with any name and kind."""
    if out.suffix == ".zip":
        info = zipfile.ZipInfo("x")
        info.filename = name
        info.external_attr = int(fields.get("mode", 0)) << 16  # type: ignore[call-overload]
        with zipfile.ZipFile(out, "w") as packed:
            packed.writestr(info, content)
        return out
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    with tarfile.open(out, "w") as packed:
        packed.addfile(info, io.BytesIO(content))
    return out


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_source(path, OPTIONS)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outcome_of(source: Source, item: str) -> Record | InputError:
    try:
        return source.read(item)
    except InputError as error:
        return error


# --- the same as the folder ---


@pytest.mark.parametrize("top", ["", "everything/", "./"])
@pytest.mark.parametrize("kind", PACKED)
def test_an_archive_equals_its_folder(raw, tmp_path, place, assert_same, kind: str, top: str) -> None:
    folder = WfdbFolder(raw, "raw")
    source = open_source(pack(raw, tmp_path / f"raw.{kind}", top), OPTIONS)
    assert source.dataset == "raw"
    assert source.items() == folder.items() == ["p0/long", "p0/r4", "p1/r1", "p1/r3", "p1/r5"]
    for item in source.items():
        assert_same(source.read(item), folder.read(item))
        assert source.fingerprint(item).endswith(folder.fingerprint(item))
    segments = [(raw / "p0" / f"{name}.hea").read_bytes() for name in ("long", "r0", "r2")]
    hashes = [xxh3_128((raw / "p0" / f"{name}.dat").read_bytes()).digest() for name in ("r0", "r2")]
    assert folder.fingerprint("p0/long") == b"\0".join(segments + hashes)
    assert "5 WFDB records" in source.description
    assert source.unlabelled() == source.items()
    del source


@pytest.mark.parametrize("kind", PACKED)
def test_labels_patients_and_ignored_leads(raw, tmp_path, place, assert_same, kind: str) -> None:
    (tmp_path / "labels.csv").write_text("record,rhythm\np1/r3,SR|AF\np0/r4,SR\n")
    chosen = {"labels_csv": tmp_path / "labels.csv", "patient_key": "@folder", "ignore_leads": ("v6",)}
    folder = WfdbFolder(raw, "set", **chosen)
    source = open_source(pack(raw, tmp_path / f"x.{kind}"), SourceOptions(dataset="set", **chosen))
    record = source.read("p1/r3")
    assert record.patient == "p1"
    assert record.labels == {"Dx": ["1", "2"], "rhythm": ["SR", "AF"]}
    assert record.leads[-1] == "V5"
    assert_same(record, folder.read("p1/r3"))
    assert source.unlabelled() == folder.unlabelled() == ["p0/long", "p1/r1", "p1/r5"]
    (tmp_path / "labels.csv").write_text("record,rhythm\nnobody,SR\n")
    with pytest.raises(InputError, match="names no record"):
        open_source(tmp_path / f"x.{kind}", SourceOptions(labels_csv=tmp_path / "labels.csv")).items()
    del source


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", ["cinc2021", "ecgid"])
def test_real_recordings(shared_data, tmp_path, place, assert_same, kind: str, name: str) -> None:
    options = SourceOptions(ignore_leads=("ecg i filtered",) if name == "ecgid" else ())
    folder = WfdbFolder(shared_data / name, name, ignore_leads=options.ignore_leads)
    source = open_source(pack(shared_data / name, tmp_path / f"{name}.{kind}"), options)
    assert source.items() == folder.items()
    for item in source.items()[::9]:
        one, other = outcome_of(folder, item), outcome_of(source, item)
        if isinstance(one, InputError):  # a few of them are damaged
            assert str(other).replace(str(source.tree.where), str(folder.root)) == str(one)  # type: ignore[attr-defined]
        else:
            assert_same(other, one)
    del source


def _read(source, item: str) -> Record:
    return source.read(item)


def test_several_processes_share_one_archive(raw, tmp_path, place, assert_same) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for kind in ("zip", "tar.gz"):
            source = open_source(pack(raw, tmp_path / f"raw.{kind}"), OPTIONS)
            assert len(pickle.dumps(source)) < 2000
            items = source.items() * 4
            records = list(pool.map(_read, [source] * len(items), items))
            for item, record in zip(items, records, strict=True):
                assert_same(record, source.read(item))
            copy = pickle.loads(pickle.dumps(source))
            del copy
            gc.collect()
            assert source.read(items[0]).name == items[0]
            del source


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_ingest_from_the_command_line(raw, tmp_path, place, capsys, kind: str) -> None:
    path = raw if kind == "folder" else pack(raw, tmp_path / f"raw.{kind}")
    assert cli.main(["ingest", str(path), str(tmp_path / "out"), "--rate-hz=100", "--workers=1"]) == 0
    out = capsys.readouterr().out
    assert "WFDB records" in out.splitlines()[0]
    assert "5 records in 1 shards, 0 rejected" in out


# --- what is in no order ---


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/a.hea", "an absolute name"),
        ("../a.hea", "one with '..'"),
        ("a/../../b.hea", "one with '..'"),
        ("a\\..\\b.hea", "with a backslash"),
        ("b" * 256, "too long"),
    ],
)
def test_names_that_lead_elsewhere(tmp_path, place, kind: str, name: str, reason: str) -> None:
    said = refusal(one_member(tmp_path / f"x.{kind}", name))
    assert reason in said
    assert name[:40] in said.replace("\\\\", "\\")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar(tmp_path, place, kind: bytes) -> None:
    said = refusal(one_member(tmp_path / "x.tar", "a.hea", b"", type=kind, linkname="/etc/passwd"))
    assert "member 'a.hea' is a link, a device or sparse" in said


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_in_a_zip(tmp_path, place, kind: int) -> None:
    assert "member 'a.hea' is a link or a device" in refusal(one_member(tmp_path / "x.zip", "a.hea", mode=kind | 0o777))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_stand_twice(raw, tmp_path, place) -> None:
    pack(raw, tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as packed:
        packed.writestr("p1/r1.dat", b"other")
    pack(raw, tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar", "a") as packed:
        packed.add(raw / "p1" / "r1.dat", "./p1//r1.dat")
    for kind in ("zip", "tar"):
        assert "two files have the same name: 'p1/r1.dat'" in refusal(tmp_path / f"x.{kind}")


def test_encrypted_members(raw, tmp_path, place) -> None:
    path = pack(raw, tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 8] |= 1
    path.write_bytes(content)
    assert "member 'p0/long.hea' is encrypted" in refusal(path)


def test_other_compression_in_a_zip(tmp_path, place) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("a.hea", b"x")
    assert "member 'a.hea' is compressed by method 14" in refusal(tmp_path / "x.zip")


def test_bombs(tmp_path, place, monkeypatch) -> None:
    monkeypatch.setattr(archive, "_SMALL_BYTES", 1 << 16)
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.dat", zeros)
    assert "'a.dat': 1033 bytes unpack to 1048576, more than 100 times" in refusal(tmp_path / "x.zip")
    plain = one_member(tmp_path / "x.tar", "a.dat", zeros).read_bytes()
    for suffix, compress in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        (tmp_path / f"x.tar.{suffix}").write_bytes(compress(plain))
        assert "the archive: " in refusal(tmp_path / f"x.tar.{suffix}")


@pytest.mark.parametrize("shift", [7, 70_000])
def test_a_zip_whose_directory_is_said_to_stand_elsewhere(raw, tmp_path, shift) -> None:
    """Members then begin before the file does, which the system alone would call an invalid argument."""
    path = pack(raw, tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\5\6")
    (offset,) = struct.unpack_from("<I", content, end + 16)
    struct.pack_into("<I", content, end + 16, offset + shift)
    path.write_bytes(content)
    assert re.search(r"member '.*' begins at byte -\d+ of \d+, so the archive's directory is wrong", refusal(path))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_disk_that_fails_is_no_fault_of_the_archive(raw, tmp_path, kind, monkeypatch) -> None:
    """Else its records would be left out of the data set as rejected."""
    path = pack(raw, tmp_path / f"x.{kind}")
    source = open_source(path, OPTIONS)

    def fails(file: object, n_bytes: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(archive, "_read", fails)
    with pytest.raises(MachineError, match=f"^{path}: cannot read: Input/output error"):
        source.read(source.items()[0])


@pytest.mark.parametrize(
    "read",
    [
        *(lambda one: one.file("a"), lambda one: one.headers(""), lambda one: one.children(""), Catalogue.items),
        *(Catalogue.n_records, lambda one: one.describe("r"), lambda one: one.text(1)),
    ],
)
def test_a_catalogue_that_the_disk_has_lost(tmp_path, read) -> None:
    catalogue = Catalogue.make(tmp_path / "x.sqlite")
    catalogue.add_files([("a.hea", Member(0, 1, 1, 0, 0))])
    size = catalogue.path.stat().st_size
    catalogue.path.write_bytes(catalogue.path.read_bytes()[:100] + bytes(size - 100))
    with pytest.raises(MachineError, match=f"^{catalogue.path}: cannot be read: "):
        read(catalogue)


def test_a_catalogue_that_cannot_be_made(tmp_path) -> None:
    with pytest.raises(MachineError, match=f"^{tmp_path / 'gone'}: .*TMPDIR"):
        Catalogue.make(tmp_path / "gone" / "x.sqlite")


def test_a_zip_whose_members_overlap(tmp_path, place) -> None:
    body = np.random.default_rng(0).bytes(4000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr("a.dat", body)
    content = (tmp_path / "x.zip").read_bytes()
    start = content.index(b"PK\1\2")
    end = content.index(b"PK\5\6")
    entry = content[start:end]
    entries = b"".join(entry.replace(b"a.dat", b"%c.dat" % (97 + i)) for i in range(5))
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 5, 5, len(entries), start, 0)
    (tmp_path / "x.zip").write_bytes(content[:start] + entries + tail)
    assert "overlap" in refusal(tmp_path / "x.zip").lower()


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("left", [0, 10, 0.5, -700, -30])
def test_truncated_archives(raw, tmp_path, place, kind: str, left: float) -> None:
    path = pack(raw, tmp_path / f"x.{kind}")
    content = path.read_bytes()
    if kind == "tar":
        content = content.rstrip(b"\0") + bytes(1024)  # without the padding that may be missing
        left = -1024 - 30 if left == -30 else left
    path.write_bytes(content[: int(left * len(content)) if 0 < left < 1 else int(left)])
    assert "truncated" in refusal(path) or "too long" in refusal(path)


def test_a_tar_cut_between_two_members(raw, tmp_path, place) -> None:
    path = pack(raw, tmp_path / "x.tar")
    with tarfile.open(path) as packed:
        end = packed.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:end])
    assert f"no end mark at byte {end}" in refusal(path)


def test_a_tar_with_a_damaged_header(raw, tmp_path, place) -> None:
    path = pack(raw, tmp_path / "x.tar")
    with tarfile.open(path) as packed:
        start = packed.getmembers()[4].offset
    content = bytearray(path.read_bytes())
    content[start + 10] ^= 1
    path.write_bytes(content)
    assert f"at byte {start}" in refusal(path)


def test_damaged_members_of_a_zip_are_rejected_one_by_one(raw, tmp_path, place) -> None:
    path = pack(raw, tmp_path / "x.zip")
    with zipfile.ZipFile(path) as packed:
        offsets = {name: packed.getinfo(name).header_offset for name in ("p1/r1.dat", "p1/r3.dat", "p1/r5.hea")}
    content = bytearray(path.read_bytes())
    content[offsets["p1/r1.dat"] + 500] ^= 1
    content[offsets["p1/r3.dat"]] ^= 1
    content[offsets["p1/r5.hea"] + 50] ^= 255
    path.write_bytes(content)
    source = open_source(path, OPTIONS)
    for item, reason in (
        ("p1/r1", "damaged: "),
        ("p1/r3", "no file begins where"),
        ("p1/r5", "damaged|lies|not|no such"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            source.read(item)
        assert str(caught.value).startswith(f"{path}/{item}.hea: ")
        assert str(place) not in str(caught.value)
    assert source.read("p0/r4").n_samples == 1000
    del source


def test_what_a_record_lacks_is_named_without_temporary_paths(raw, tmp_path, place) -> None:
    (raw / "p1" / "r1.dat").unlink()
    (raw / "p1" / "r3.hea").write_text("r3 12 500\n")
    path = pack(raw, tmp_path / "x.tar.gz")
    source = open_source(path, OPTIONS)
    for item, reason in (
        ("p1/r1", "r1.dat: no such data file"),
        ("p1/r3", "claims 12 signals"),
        ("p9/r", "no such header"),
    ):
        with pytest.raises(InputError) as caught:
            source.read(item)
        assert str(caught.value).startswith(f"{path}/{item}.hea: {reason}") or reason in str(caught.value)
        assert str(place) not in str(caught.value)
    del source


def test_an_archive_without_records(tmp_path, place) -> None:
    assert "no WFDB record" in refusal(one_member(tmp_path / "x.zip", "a.txt"))
    assert "no WFDB record" in refusal(one_member(tmp_path / "x.tar", "a.txt"))
    (tmp_path / "other.rar").write_bytes(b"x")
    assert "give a folder, an archive" in refusal(tmp_path / "other.rar")
    assert "no such file or folder" in refusal(tmp_path / "absent.zip")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_mutated_archives_are_read_or_refused(raw, tmp_path, place, kind: str) -> None:
    content = pack(raw, tmp_path / f"x.{kind}").read_bytes()
    random_ = random.Random(0)
    path = tmp_path / f"y.{kind}"
    for _ in range(60):
        mutated = bytearray(content)
        for _ in range(random_.randint(1, 8)):
            structure = [content.index(b"PK\1\2")] if kind == "zip" else [512 * random_.randrange(len(content) // 512)]
            at = random_.choice(
                [random_.randrange(len(content)), min(structure[0] + random_.randrange(512), len(content) - 1)]
            )
            mutated[at] = random_.randrange(256)
        path.write_bytes(mutated)
        try:
            source = open_source(path, OPTIONS)
        except InputError as error:
            said = [str(error)]
        else:
            outcomes = [outcome_of(source, item) for item in source.items()]
            said = [str(outcome) for outcome in outcomes if isinstance(outcome, InputError)]
            del source
        assert all(line.startswith(str(path)) for line in said)


# --- temporary folders ---


def test_a_temporary_folder_lives_as_long_as_its_maker(place) -> None:
    made = scratch.Scratch.make()
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    copy = pickle.loads(pickle.dumps(made))
    del copy
    gc.collect()
    child = os.fork()
    if not child:
        del made
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert made.path.is_dir()
    path = made.path
    del made
    gc.collect()
    assert not path.exists()


def test_what_a_killed_process_left_is_removed(place) -> None:
    code = (
        "import os, sys, tempfile; from pathlib import Path; from ecgscale.data.sources.scratch import Scratch; "
        "s = Scratch.make(Path(sys.argv[1])); print(s.path, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    running = scratch.Scratch.make()
    assert left.is_dir()  # it might be one that is just being made
    for path in (left, running.path):
        os.utime(path, (0, 0))
    scratch.Scratch.make()
    assert not left.exists()
    assert running.path.is_dir()
    del running


def test_a_full_disk_is_named(raw, tmp_path, place, monkeypatch) -> None:
    path = pack(raw, tmp_path / "x.tar.gz")
    real = Path.open

    class Full(io.RawIOBase):
        def write(self, content: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full() if self.name == "plain.tar" else real(self, *a, **k))
    for _ in range(2):
        with pytest.raises(MachineError, match=r"x\.tar\.gz: no room to uncompress it .*TMPDIR"):
            open_source(path, OPTIONS)


def test_large_records_do_not_go_into_memory(raw, tmp_path, place, monkeypatch) -> None:
    source = open_source(pack(raw, tmp_path / "x.zip"), OPTIONS)
    opened: Callable[[int], Path] = source.tree._room_for  # type: ignore[attr-defined]
    monkeypatch.setattr(scratch.Scratch, "free_bytes", lambda self: 256_000_000)
    assert opened(999_999) == source.tree.memory.path  # type: ignore[attr-defined]
    assert opened(1_000_001) == source.tree.disk.path  # type: ignore[attr-defined]
    del source


def test_a_lock_is_held_while_a_folder_is_used(place) -> None:
    made = scratch.Scratch.make()
    lock = os.open(made.path / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    del made
