"""Is what is written complete or absent, and what is read back checked?"""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgscale import files
from ecgscale.errors import InputError, MachineError
from ecgscale.files import (
    parse_json,
    put_in_place,
    read_json,
    seal_holds,
    sealed,
    standing,
    whole_file,
    whole_folder,
    write_json,
    write_whole,
)


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (folder / name).write_text(text)


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in standing(folder).iterdir()}


class Died(BaseException):
    """The process ends here."""


def dies_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The n-th renaming from now on is not done any more."""
    done, original = 0, Path.rename

    def rename(self, target):
        nonlocal done
        done += 1
        if done == number:
            raise Died
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_a_file_is_flushed_before_it_takes_its_name_and_its_folder_after(tmp_path, monkeypatch):
    seen = []
    original, replace = os.fsync, Path.replace

    def fsync(handle):
        seen.append(Path(f"/proc/self/fd/{handle}").readlink().name.split(".")[0])
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda self, target: (seen.append("renamed"), replace(self, target)))
    write_whole(tmp_path / "one", b"1")
    assert seen == ["one", "renamed", tmp_path.name]
    assert (tmp_path / "one").read_bytes() == b"1"


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "one"
    write_whole(path, b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match="one: cannot write: No space left"):
            write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    assert path.read_bytes() == b"old"
    with pytest.raises(InputError, match="nowhere/one: cannot write: No such file"):
        write_whole(tmp_path / "nowhere/one", b"")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "one"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_what_killed_writers_left_goes_away_with_the_next_of_the_same_name(tmp_path):
    path = tmp_path / "o[n]e"
    left, fresh, other = (
        path.with_name(f"{name}.{32 * c}.partial") for name, c in (("o[n]e", "a"), ("o[n]e", "b"), ("n", "c"))
    )
    for one in (left, fresh, other):
        fill(one, "left")
    for one in (left, other):
        os.utime(one, (0, 0))
    write_whole(path, b"new")
    assert not left.exists()
    assert fresh.exists()
    assert other.exists()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_folder_is_there_old_or_new_wherever_its_writer_dies(tmp_path, monkeypatch, number):
    folder = tmp_path / "export"
    with whole_folder(folder) as partial:
        fill(partial, "old")
    with monkeypatch.context() as dying:
        dies_at(dying, number)
        try:
            with whole_folder(folder) as partial:
                fill(partial, "new")
        except Died:
            pass
    assert content(folder) == ({"old"} if number < 3 else {"new"})
    with whole_folder(folder) as partial:
        fill(partial, "newest")
    assert content(folder) == {"newest"}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_cannot_be_named_leaves_the_old_one_in_its_place(tmp_path, monkeypatch):
    folder, partial = tmp_path / "export", tmp_path / "partial"
    fill(folder, "old")
    fill(partial, "new")
    rename = Path.rename

    def stale(self, target):
        if self == partial:
            raise OSError(errno.ESTALE, "Stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stale)
    with pytest.raises(OSError, match="Stale"):
        put_in_place(partial, folder)
    assert folder.is_dir()
    assert content(folder) == {"old"}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("other", ["is done", "has put the old one aside"])
def test_another_writer_of_the_folder_in_between_ends_none(tmp_path, monkeypatch, number, other):
    folder, aside = tmp_path / "export", tmp_path / "export.before"
    with whole_folder(folder) as partial:
        fill(partial, "old")
    rename, done = Path.rename, 0

    def interrupted(self, target):
        nonlocal done
        done += 1
        if done == number and other == "is done":
            with whole_folder(folder) as partial:
                fill(partial, "another")
        elif done == number:
            rename(folder, aside) if folder.exists() else rename(aside, folder)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with whole_folder(folder) as partial:
        fill(partial, "new")
    assert content(folder) == {"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_many_writers_of_one_folder(tmp_path):
    """Whatever is there at the end is whole."""
    folder = tmp_path / "export"

    def write(number: int) -> None:
        for _ in range(40):
            with whole_folder(folder) as partial:
                fill(partial, f"{number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(content(folder)) == 1


def test_a_folder_that_is_left_half_filled_is_gone(tmp_path):
    def half() -> None:
        with whole_folder(tmp_path / "export") as partial:
            fill(partial, "half")
            raise InputError("full")

    with pytest.raises(InputError, match="full"):
        half()
    assert not list(tmp_path.iterdir())


def test_a_folder_over_a_file_is_refused(tmp_path):
    (tmp_path / "export").write_text("mine")
    with pytest.raises(InputError, match="export: cannot write: Not a directory"), whole_folder(tmp_path / "export"):
        pass
    assert (tmp_path / "export").read_text() == "mine"


TREES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text(), TREES, max_size=4), st.data())
def test_json_comes_back_as_it_was_and_a_flipped_bit_of_sealed_json_shows(tmp_path_factory, tree, data):
    path = tmp_path_factory.getbasetemp() / "tree.json"
    tree.pop("sha256", None)
    write_json(path, sealed(tree))
    assert read_json(path) == sealed(tree)
    assert seal_holds(read_json(path))
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        damaged = parse_json(bytes(whole))
    except InputError:
        return
    assert not seal_holds(damaged) or json.dumps(damaged) == json.dumps(sealed(tree))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is beyond"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands twice"),
        (b"[1]", "not a JSON object but list"),
        (b'{"a": ' + 70 * b"[" + 70 * b"]" + b"}", "nested more than 64 deep"),
        (b'{"a": ' + 200_000 * b"[" + 200_000 * b"]" + b"}", "nested too deeply"),
        (b'{"a": ' + 10_000 * b"1" + b"}", "not JSON"),
        (b'{"a"', "not JSON"),
        (b"\xff", "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_that_nobody_of_us_wrote_is_refused(text, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        parse_json(text)
    (tmp_path / "one.json").write_bytes(text)
    with pytest.raises(InputError, match=r"one\.json: damaged"):
        read_json(tmp_path / "one.json")


def test_json_has_a_size(tmp_path):
    (tmp_path / "one.json").write_bytes(b'{"a": "' + 100 * b"x" + b'"}')
    with pytest.raises(InputError, match=r"one\.json: more than 100 bytes"):
        read_json(tmp_path / "one.json", limit_bytes=100)
    with pytest.raises(InputError, match=r"two\.json: cannot read: No such file"):
        read_json(tmp_path / "two.json")


def test_json_that_is_replaced_while_it_is_opened_is_read_again(tmp_path, monkeypatch):
    """As NFS says it, where another machine puts a new file in the place of the one that was opened."""
    write_json(tmp_path / "one.json", {"a": 1})
    opened, stale = Path.open, [True]

    def open_once_stale(path: Path, *given, **named):
        if stale and stale.pop():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", open_once_stale)
    assert read_json(tmp_path / "one.json") == {"a": 1}


def test_numbers_that_are_none_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "one.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_a_file_system_without_its_own_flush_is_written_all_the_same(tmp_path, monkeypatch):
    original = os.fsync

    def fsync(handle):
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        original(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_whole(tmp_path / "one", b"1")
    assert (tmp_path / "one").read_bytes() == b"1"
