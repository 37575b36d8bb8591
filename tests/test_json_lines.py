"""Lines that are appended while others read, and after what a kill or a full disk has left."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ecgscale.errors import InputError, MachineError
from ecgscale.json_lines import JsonLines, read_json_lines


def test_lines_come_back(tmp_path) -> None:
    path = tmp_path / "below" / "lines.jsonl"
    for number in range(3):
        with JsonLines(path) as lines:
            lines.write({"number": number, "text": "a\nb é"})
            assert list(read_json_lines(path))[-1]["number"] == number, "at once"
    assert [line["number"] for line in read_json_lines(path)] == [0, 1, 2]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("torn", ['{"a": 1', '{"a": 1}', "\0" * 9, "}", "é", "[" * 9000, "7\n", "\n\n"])
def test_what_is_torn_is_left_out_and_swallows_nothing(torn, tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"b": 2}\n' + torn.encode()[:-1] if torn == "é" else b'{"b": 2}\n' + torn.encode())
    with JsonLines(path) as lines:
        lines.write({"c": 3})
    whole = [{"a": 1}] if torn == '{"a": 1}' else []
    assert list(read_json_lines(path)) == [{"b": 2}, *whole, {"c": 3}]


def test_no_file_has_no_lines(tmp_path) -> None:
    assert list(read_json_lines(tmp_path / "absent")) == []


def test_what_json_does_not_know_is_not_written(tmp_path) -> None:
    with JsonLines(tmp_path / "lines.jsonl") as lines, pytest.raises(ValueError, match="JSON compliant"):
        lines.write({"loss": float("nan")})
    assert (tmp_path / "lines.jsonl").read_bytes() == b""


def test_errors_name_the_file(tmp_path) -> None:
    with JsonLines(Path("/dev/full")) as lines, pytest.raises(MachineError, match="/dev/full: cannot write: No space"):
        lines.write({"a": 1})
    with pytest.raises(InputError, match=f"{tmp_path}: cannot write: Is a directory"):
        JsonLines(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: cannot read: Is a directory"):
        list(read_json_lines(tmp_path))


SHORT = """
import json, resource, signal, sys
from pathlib import Path
from ecgscale.errors import MachineError
from ecgscale.json_lines import JsonLines

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
lines = JsonLines(Path(sys.argv[1]))
try:
    for number in range(9):
        lines.write({"number": number, "text": "x" * 20})
except MachineError as error:
    print(json.dumps([number, str(error)]))
"""


def test_a_disk_that_takes_half_a_line_says_so_and_the_next_start_goes_on(tmp_path) -> None:
    path = tmp_path / "lines.jsonl"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ended = subprocess.run([sys.executable, "-c", SHORT, str(path)], capture_output=True, text=True, check=True)
    written, error = json.loads(ended.stdout)
    assert error == f"{path}: cannot write: File too large"
    assert path.stat().st_size == 100, "half a line"
    with JsonLines(path) as lines:
        lines.write({"number": -1})
    assert [line["number"] for line in read_json_lines(path)] == [*range(written), -1]
