"""Shards that are an attack: refused by name; nothing else is opened, nothing is executed, memory stays bounded.

One process runs all cases under an audit hook, which sees every file that is opened, every program that is started,
every connection, import and unpickling. It is this file, run as a program: ``python test_hostile.py FOLDER``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ecgscale import cli
from ecgscale.data.foreign import Rules
from ecgscale.data.indexing import index_folder
from ecgscale.data.ingest.options import IngestOptions
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import shard_entry, write_index, write_manifest, write_tar
from ecgscale.lead_names import LEADS
from ecgscale.record import Record

ABOUT = {"rate_hz": 100, "leads": LEADS, "mv_per_count": 0.001, "patient": "p"}
MEMORY_LIMIT_BYTES = 256 << 20  # that all cases together may take beyond what is taken when they begin
SOURCE = {"dataset": "d", "options": {}, "records": 2, "rejected": 0}
PLACES = [
    *(
        "pipe:cat /etc/passwd",
        "pipe:touch CANARY",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "ftp://host/x",
        "sftp://h/x",
    ),
    *("https://user:word@host/x", "s3://a::pipe:cat x", "s3://", "http://host/x?y", "github://a:b@c/d", "::", "-"),
    *("/etc/passwd", "/dev/zero", "\x00", "simplecache::s3://a/b", "filecache::file:///etc", "tar://x::/y"),
]


# --- what an attacker writes ---


class Attack:
    """Unpickled, it leaves a file in the working folder."""

    def __reduce__(self):
        return os.system, ("touch CANARY",)


def header(name: bytes | str, size: int, kind: bytes = b"0", link: bytes = b"", field: bytes = b"") -> bytes:
    """``field``: what stands in the place of the size."""
    raw = name.encode() if isinstance(name, str) else name
    head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    head[:100] = raw.ljust(100, b"\0")
    head[124:136] = field or b"%011o\0" % size
    head[156:157] = kind
    head[157:257] = link.ljust(100, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def member(name: bytes | str, content: bytes = b"", kind: bytes = b"0", **more: bytes) -> bytes:
    return header(name, len(content), kind, **more) + content + bytes(-len(content) % 512)


def npy(descr: str = "'<i2'", shape: str = "(12, 100)", body: bytes = bytes(2400), version: int = 1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + body


def sample(key: str, array: bytes = b"", about: bytes = b"") -> bytes:
    return member(f"{key}.json", about or json.dumps(ABOUT).encode()) + member(f"{key}.npy", array or npy())


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    content = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        while len(b"%d" % length) + len(key) + len(value) + 3 != length:
            length = len(b"%d" % length) + len(key) + len(value) + 3
        content += b"%d %s=%s\n" % (length, key, value)
    return member("PaxHeaders/x", content, kind)


END = bytes(10240)
BOMB = pickle.dumps(Attack())
OBJECTS = npy("'|O'", "(12, 100)", BOMB)

MEMBERS = {  # behind one good sample
    "pickle": member("b.pkl", BOMB),
    "pyd": member("b.pyd", BOMB),
    "pth": member("b.pth", BOMB),
    "upper-case-pickle": member("b.PKL", BOMB),
    "packed-pickle": member("b.x.pickle.gz", BOMB),
    "symlink": member("b.npy", kind=b"2", link=b"/etc/passwd"),
    "hard-link": member("b.npy", kind=b"1", link=b"/etc/passwd"),
    "character-device": member("b.npy", kind=b"3"),
    "block-device": member("b.npy", kind=b"4"),
    "pipe": member("b.npy", kind=b"6"),
    "contiguous": member("b.npy", npy(), kind=b"7"),
    "sparse": member("b.npy", npy(), kind=b"S"),
    "long-name": member("././@LongLink", b"../" * 100, kind=b"L"),
    "long-link": member("././@LongLink", b"../" * 100, kind=b"K"),
    "unknown-type": member("b.npy", npy(), kind=b"Z"),
    "folder-with-content": member("b.npy", npy(), kind=b"5"),
    "up": member("../b.npy", npy()),
    "up-inside": member("a/../../b.npy", npy()),
    "absolute": member("/etc/b.npy", npy()),
    "backslash": member("..\\b.npy", npy()),
    "line-feed": member("b\n.npy", npy()),
    "escape": member("\x1b[2Jb.npy", npy()),
    "not-utf8": member(b"\xff\xfe.npy", npy()),
    "nameless": member("", npy()),
    "twice": sample("b") + member("b.npy", npy()),
    "key-again": sample("b") + sample("a"),
    "dotted-key": member("b.1.json", json.dumps(ABOUT).encode()) + member("b.1.npy", npy()),
    "2^60-bytes": header("b.npy", 0, field=b"\x80" + (1 << 60).to_bytes(11, "big")),
    "minus-bytes": header("b.npy", 0, field=b"\xff" * 12),
    "8-gib": header("b.npy", (8 << 30) - 1),
    "odd-size": header("b.npy", 0, field=b"0o777\0\0\0\0\0\0\0"),
    "huge-pax": pax((b"comment", b"x" * (1 << 20))) + sample("b"),
    "pax-size": pax((b"size", b"1152921504606846976")) + sample("b"),
    "pax-path": pax((b"path", b"../../etc/x.npy")) + sample("b"),
    "pax-link": pax((b"linkpath", b"/etc/passwd")) + sample("b"),
    "pax-sparse": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9" * 18)) + sample("b"),
    "pax-nonsense": member("PaxHeaders/x", b"999999 mtime=1\n", b"x") + sample("b"),
    "pax-endless": header("PaxHeaders/x", 1 << 32, b"x"),
    "global-pax": pax((b"path", b"x"), kind=b"g") + sample("b"),
    "2^60-samples": sample("b", npy(shape="(12, 1152921504606846976)")),
    "2^60-leads": sample("b", npy(shape="(1152921504606846976, 1)")),
    "many-dimensions": sample("b", npy(shape="(" + "1," * 30 + ")")),
    "npy-objects": sample("b", OBJECTS),
    "npy-expression": sample("b", npy("__import__('os').system('touch CANARY')")),
    "npy-fields": sample("b", npy("[('a', '|O')]")),
    "npy-4-gib-header": sample("b", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100)),
    "npy-header-cut": sample("b", b"\x93NUMPY\x01\x00\xff\xff"),
    "pickle-as-npy": sample("b", BOMB),
    "pickle-as-json": sample("b", about=BOMB),
    "deep-json": sample("b", about=b'{"a":' * 200_000),
    "3-mib-json": sample("b", about=b"[" + b"[]," * (1 << 20)),
    "5-mib-json": sample("b", about=json.dumps(ABOUT).encode() + b" " * (5 << 20)),
    "long-number": sample("b", about=b'{"rate_hz": ' + b"9" * 100_000 + b"}"),
    "endless-rate": sample("b", about=json.dumps(ABOUT | {"rate_hz": 1e999}).encode()),
    "half-a-pair": sample("b", about=json.dumps(ABOUT | {"patient": "\ud800"}).encode()),
    "wrong-checksum": bytes([1]) + sample("b")[1:],
    "behind-the-end": END + sample("b"),
    "no-end": b"",
    "hidden-in-a-gap": header("b.txt", 1) + b"x" + b"hidden".ljust(511, b"\0"),
    "64-mib-of-end": b"",
}  # fmt: skip


def hostile_tar(path: Path, name: str, good: bytes) -> None:
    path.write_bytes(good + MEMBERS[name] + (b"" if name == "no-end" else END))
    if name == "64-mib-of-end":
        os.truncate(path, 1 << 26)


def forge(folder: Path, **changes: object) -> None:
    """A manifest with right checksums that says something else."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest.pop("sha256")
    for path, value in changes.items():
        *keys, last = (int(key) if key.isdecimal() else key for key in path.split("__"))
        place = manifest
        for key in keys:
            place = place[key]
        if value is DELETED:
            del place[last]
        else:
            place[last] = value
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


DELETED = object()


def forge_tar(folder: Path) -> None:
    (tar,) = folder.glob("*.tar")
    with tar.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    forge(folder, shards__0__bytes=tar.stat().st_size, shards__0__sha256=sha256)


def forge_index(folder: Path, content: bytes) -> None:
    (index,) = folder.glob("index-*")
    index.write_bytes(content)
    forge(folder, index__bytes=len(content), index__sha256=hashlib.sha256(content).hexdigest())


def index_with(header: object, length: int | None = None, rest: int = 1000) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(rest)


def changed_header(folder: Path, offsets: object) -> bytes:
    (index,) = folder.glob("index-*")
    content = index.read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    fields["offset"]["data_offsets"] = offsets
    return index_with(fields, rest=len(content) - 8 - length)


MANIFESTS: dict[str, dict[str, object]] = {
    **{
        f"shard-{i}": {"shards__0__file": name}
        for i, name in enumerate(
            ["../x.tar", "/etc/passwd", "pipe:cat x", "http://h/x.tar", "s3://b/x.tar", "a/../a.tar", "", ".", "..",
             "a.tar\0", "a.tar/", "\x1b[2J.tar", 7, None, ["a.tar"], "~/x.tar", "manifest.json"]
        )
    },
    **{f"index-{i}": {"index__file": name} for i, name in enumerate(["../x", "/etc/x", "pipe:x", "a.tar", 7, None])},
    **{f"no-{field}": {f"shards__0__{field}": DELETED} for field in ("file", "bytes", "sha256", "records", "payload")},
    **{f"no-{field}": {field: DELETED} for field in ("rate_hz", "records", "index", "shards", "rejected", "sources")},
    **{
        f"records-{i}": {"shards__0__records": n, "records": n}
        for i, n in enumerate([1 << 60, 1 << 40, -1, 0, 1e300, "1", True])
    },
    **{f"bytes-{i}": {"shards__0__bytes": n} for i, n in enumerate([1 << 62, -1, 0, "1", None])},
    **{f"rate-{i}": {"rate_hz": rate} for i, rate in enumerate([0, -1, 1e300, "500", None, [500], True])},
    **{f"shards-{i}": {"shards": value} for i, value in enumerate([[], {}, "a.tar", [7], [[]], None])},
    **{f"index-is-{i}": {"index": value} for i, value in enumerate([7, [], None, "x"])},
    "payload": {"shards__0__payload": "pkl"},
    "sha256": {"shards__0__sha256": "../../x"},
    "sources-1": {"sources": [7]},
    "sources-2": {"sources": [{"dataset": 7}]},
    **{
        f"remarked-{i}": {"sources": [{"dataset": "d", "records": 2, "rejected": 0, "remarked": value}]}
        for i, value in enumerate([7, [], {"k": 7}, {"k": {}}, {"k": {"records": "1", "first": []}},
                                   {"k": {"records": 1, "first": [7]}}, {"k": {"records": 1, "first": "x"}}])
    },
    "foreign-0": {"foreign": Rules().to_manifest()},
    "foreign-1": {"foreign": 7},
    "foreign-2": {"foreign": {}},
    "foreign-3": {"foreign": Rules().to_manifest() | {"lead_order": ["I"] * 12}},
    "foreign-4": {"foreign": Rules().to_manifest() | {"rate_hz": "x"}},
    "foreign-5": {"foreign": Rules().to_manifest() | {"leads": 7}},
    "foreign-6": {"foreign": Rules().to_manifest() | {"lead_order": [[]]}},
}  # fmt: skip

INDEXES: dict[str, Callable[[Path], bytes]] = {
    "2^60-header": lambda folder: index_with({}, 1 << 60),
    "2^64-header": lambda folder: index_with({}, (1 << 64) - 1),
    "empty-header": lambda folder: index_with({}),
    "list-header": lambda folder: index_with([]),
    "number-header": lambda folder: index_with(b"7"),
    "no-json": lambda folder: index_with(b"\xff\xfe"),
    "deep-header": lambda folder: index_with(b"[" * 65_000),
    "pickle": lambda folder: BOMB.ljust(2000, b"\0"),
    "columns-of-text": lambda folder: index_with({"samples": "x"}),
    "one-byte": lambda folder: b"x",
    **{
        f"offsets-{i}": lambda folder, offsets=offsets: changed_header(folder, offsets)
        for i, offsets in enumerate(
            [[1 << 60, (1 << 60) + 8], [-16, -8], [0, 1 << 60], [8, 0], ["0", "8"], [0], 7, None, [0.0, 8.0], [True, 9]]
        )
    },
}  # fmt: skip


def link(to: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    return replace


def make(kind: Callable[[Path], None]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        kind(path)

    return replace


def aside(path: Path) -> None:
    """The right content, behind a link to another folder."""
    outside = path.parents[2] / "outside" / path.parent.name / path.name
    outside.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, outside)
    path.symlink_to(outside)


FILES: dict[str, Callable[[Path], None]] = {
    "link": link("/etc/passwd"),
    "endless": link("/dev/zero"),
    "linked-content": aside,
    "pipe": make(os.mkfifo),
    "folder": make(os.mkdir),
}


# --- the folders of the cases ---


def write_cases(root: Path) -> None:
    """Folders <command>/<case>; those of `good` are what is well."""
    foreign, own = root / "good" / "foreign", root / "good" / "own"
    foreign.mkdir(parents=True)
    (foreign / "a.tar").write_bytes(sample("a") + END)
    index_folder(foreign, Rules(), IngestOptions(validation_fraction=0))
    own.mkdir()
    signal_LT = np.arange(1200, dtype=np.int16).reshape(12, 100)
    record = Record("r", signal_LT, np.full(12, 0.001, np.float32), 100.0, LEADS, "p")
    columns = write_tar(own / "a.tar", "d", [("a", record)], "pco") | {"split": np.zeros(1, np.uint8)}
    write_manifest(own, 100.0, write_index(own, columns), [shard_entry(own / "a.tar", 1, "d", "pco")], [SOURCE])
    good = {one: (one / "a.tar").read_bytes() for one in (foreign, own)}
    for name in MEMBERS:
        indexed = root / "index" / name
        indexed.mkdir(parents=True)
        hostile_tar(indexed / "b.tar", name, sample("a"))
        for base in (foreign, own):
            folder = shutil.copytree(base, root / "verify" / f"{base.name}-{name}")
            hostile_tar(folder / "a.tar", name, good[base].rstrip(b"\0") + bytes(-len(good[base].rstrip(b"\0")) % 512))
            forge_tar(folder)
    for name, changes in MANIFESTS.items():
        forge(shutil.copytree(own, root / "open" / f"manifest-{name}"), **changes)
    for name, content in INDEXES.items():
        folder = shutil.copytree(own, root / "open" / f"index-{name}")
        forge_index(folder, content(folder))
    for name, replace in FILES.items():
        for what in ("a.tar", "manifest.json", "index-*"):
            folder = shutil.copytree(own, root / "open" / f"{name}-{what.strip('-*')}")
            replace(next(folder.glob(what)))
        folder = root / "index" / f"file-{name}"
        folder.mkdir()
        (folder / "a.tar").write_bytes(good[foreign])
        replace(folder / "a.tar")
    folder = root / "index" / "written-through-manifest"
    folder.mkdir()
    (folder / "a.tar").write_bytes(good[foreign])
    (folder / "manifest.json").symlink_to(root / "CANARY")
    for name, content in (("empty", b""), ("deep", b"[" * 1_000_000), ("pickle", BOMB)):
        folder = shutil.copytree(own, root / "open" / f"manifest-is-{name}")
        (folder / "manifest.json").write_bytes(content)
    os.truncate(shutil.copytree(own, root / "open" / "manifest-is-endless") / "manifest.json", 1 << 41)


# --- the process that runs them ---

_FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.", "pickle.", "marshal."),
    *(
        "ctypes.",
        "import",
        "exec",
        "compile",
        "code.",
        "urllib.",
        "ftplib.",
        "http.",
        "webbrowser.",
        "shutil.",
        "os.link",
    ),
    *("os.symlink", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.truncate", "tempfile.", "glob.glob", "pty."),
)


class Watch:
    """What the process does, while it is told to look."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.events: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, mode, flags = args
            inside = isinstance(path, str | bytes | os.PathLike) and self.folder in Path(os.fsdecode(path)).parents
            writing = bool(set(str(mode or "r")) & set("wax+")) or bool(int(flags) & (os.O_WRONLY | os.O_RDWR))
            if not inside and path != str(self.folder):
                self.events.append(f"open {path!r}")
            elif writing:
                self.events.append(f"write {path!r}")
        elif event.startswith(_FORBIDDEN):
            self.events.append(f"{event} {args!r}"[:300])

    @contextlib.contextmanager
    def look(self, folder: Path) -> Iterator[list[str]]:
        self.events, self.folder = [], folder
        try:
            yield self.events
        finally:
            self.folder = None


def run(command: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(command)
    return code, errors.getvalue()


def open_set(folder: str) -> tuple[int, str]:
    """As a training run does it, which reads no structure: what is not refused must be readable or named."""
    try:
        ShardSet.open(folder).record(0)
    except ValueError as error:
        return 2, f"{error}\n"
    return 0, ""


COMMANDS: dict[str, Callable[[str], tuple[int, str]]] = {
    "index": lambda folder: run(["index", folder, "--workers=1"]),
    "verify": lambda folder: run(["verify", folder]),
    "open": open_set,
}


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Whoever asks for more gets a MemoryError. Mapped tars do not count: their pages belong to the disk's cache."""
    taken = 1024 * int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + MEMORY_LIMIT_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


def probe(root: Path) -> None:
    """Run all cases; print one JSON line for each."""
    watch = Watch()
    for good in (root / "good").iterdir():  # everything is imported by now, and once
        for command in ("verify", "open"):
            assert COMMANDS[command](str(good))[0] == 0, (good, command, COMMANDS[command](str(good)))
    indexed = root / "indexed"
    indexed.mkdir()
    shutil.copy(root / "good" / "foreign" / "a.tar", indexed)
    assert COMMANDS["index"](str(indexed)) == (0, "")
    run(["index", str(root)])
    os.chdir(root)
    with little_memory():
        for name in ("index", "verify", "open"):
            for folder in sorted((root / name).iterdir()):
                for command in ("open", "verify") if name == "open" else (name,):
                    before = sorted(folder.iterdir())
                    with watch.look(folder) as events:
                        code, text = COMMANDS[command](str(folder))
                    about = {"case": f"{command} {folder}", "named": str(folder), "code": code, "text": text}
                    print(json.dumps(about | {"events": events, "changed": sorted(folder.iterdir()) != before}))
    for report in (False, True):  # the first time, they import
        probe_places(watch, root, report)


def probe_places(watch: Watch, root: Path, report: bool) -> None:
    (root / "empty").mkdir(exist_ok=True)
    for place in PLACES:
        given = f"--data.shards=[{json.dumps(place)}]"
        for command in (
            *(["verify", place], ["inspect", place], ["index", place], ["pretrain", "--run.dir=run", given]),
            ["finetune", "--run.dir=run", "--task.label=x", "--init.model=model", given],
        ):
            with watch.look(root / "empty") as events:
                code, text = run(command)
            if report:
                events = [one for one in events if not one.startswith(("compile", "exec"))]  # of annotations
                about = {"case": " ".join(command), "named": "", "code": code, "text": text}
                print(json.dumps(about | {"events": events, "changed": (root / "run").exists()}))


# --- what came of it ---


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict]:
    root = tmp_path_factory.mktemp("hostile") / "root"
    write_cases(root)
    command = [sys.executable, __file__, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(root.parent.rglob("CANARY"))
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_all_are_refused_by_name_in_one_line(outcomes) -> None:
    assert len(outcomes) > 450
    for case in outcomes:
        assert case["code"] == 2, case
        assert case["text"].count("\n") == 1, case
        assert case["text"].strip().isprintable(), case
        assert case["named"] in case["text"], case
    for name in MEMBERS:
        of_tar = [case for case in outcomes if case["case"].endswith((f"/{name}", f"/own-{name}", f"/foreign-{name}"))]
        assert len(of_tar) == 3
        assert all(".tar" in case["text"] for case in of_tar), of_tar


def test_nothing_else_is_opened_and_nothing_is_executed(outcomes) -> None:
    assert [case for case in outcomes if case["events"] or case["changed"]] == []


if __name__ == "__main__":
    probe(Path(sys.argv[1]))
