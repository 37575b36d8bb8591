"""Files of other formats on a disk that is full."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ecgscale.cli import main

ONNX = pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs ecgscale[onnx]")


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", ["model.pt", pytest.param("model.onnx", marks=ONNX), "model"])
def test_a_full_disk_names_the_file_and_leaves_what_was_there(name, older, make_export, full_disk, tmp_path, capsys):
    export, out = make_export(tmp_path / "export"), tmp_path / "out" / name
    out.parent.mkdir()
    command = ["export", str(export), str(out)]
    if older:
        assert main(command) == 0
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
    capsys.readouterr()
    for most_bytes in (1 << 10, 40_000):
        with full_disk(most_bytes):
            assert main(command) == 1
        out_text, err = capsys.readouterr()
        assert (out_text, err.count("\n")) == ("", 1)
        assert err.startswith(f"ecgscale: {out}")
        assert err.endswith("cannot write: File too large\n")
        assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
        assert {path.name for path in out.parent.iterdir()} == ({name} if older else set())


def test_a_fairseq_file_of_one_model_is_the_same_bytes_each_time(make_export, tmp_path):
    export = make_export(tmp_path / "export")
    for name in ("a.pt", "b.pt"):
        assert main(["export", str(export), str(tmp_path / name)]) == 0
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
