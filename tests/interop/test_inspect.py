"""Does inspect say what a model is, and what a folder is not?"""

from __future__ import annotations

import shutil

import pytest

from ecgscale.export import Profile
from ecgscale.interop.fairseq import import_checkpoint


def test_a_pretrained_model(command, make_export, tmp_path):
    export = make_export(tmp_path / "export", profile=Profile(250.0, 2.5, "zscore"))
    said = dict(line.split(maxsplit=1) for line in command("inspect", export).splitlines())
    assert said["model"] == f"ecgscale-export/2 in {export}"
    assert said["parameters"] == "24,444: encoder 23,856, local_head 588"
    assert said["shape"].startswith("2 layers of width 32, 2 heads, feed-forward 64; conv stem of 16 channels")
    assert said["profile"] == "250 Hz, each lead z-scored over the recording, segments of 2.5 s"
    assert said["leads"].startswith("I, II, III, aVR, aVL, aVF, V1, V2, V3, V4, V5, V6; ")
    assert said["step"] == "7"
    assert "source" not in said


def test_imported_models(command, fine_tuned, make_export, tmp_path, written):
    path = written(tmp_path / "theirs.pt", fine_tuned)
    import_checkpoint(path, tmp_path / "named", classes=("a", "b", "c"))
    import_checkpoint(path, tmp_path / "unnamed")
    said = command("inspect", tmp_path / "named")
    assert "classes     3: a, b, c\n" in said
    assert "profile     500 Hz, millivolts, segments of 5 s\n" in said
    assert "source      theirs.pt of fairseq-signals, float32\n" in said
    assert "classes     3, whose names the model does not know\n" in command("inspect", tmp_path / "unnamed")
    task = {"label": "x", "kind": "identification", "protocol": "p"}
    persons = make_export(tmp_path / "persons", persons=5, task=task)
    said = command("inspect", persons)
    assert "persons     5 (ArcFace)\n" in said
    assert "task        x, identification, p\n" in said


def test_a_run(command, make_export, tmp_path):
    make_export(tmp_path / "run" / "export")
    (tmp_path / "run" / "config.yaml").touch()
    assert f"in {tmp_path / 'run' / 'export'}\n" in command("inspect", tmp_path / "run")


def test_an_export_whose_writer_died_while_it_replaced_it(command, make_export, tmp_path):
    make_export(tmp_path / "export").rename(tmp_path / "export.before")
    assert f"in {tmp_path / 'export.before'}\n" in command("inspect", tmp_path / "export")


@pytest.mark.parametrize("kind", ["absent", "empty", "a file", "a run that has saved nothing", "damaged"])
def test_what_is_neither(refusal, make_export, tmp_path, kind):
    path = tmp_path / "it"
    if kind == "a file":
        path.touch()
    elif kind != "absent":
        make_export(path)
        if kind == "damaged":
            (path / "config.json").write_text("{}")
            assert "not the config of an ecgscale export" in refusal("inspect", path)
            return
        shutil.rmtree(path)
        path.mkdir()
    if kind.startswith("a run"):
        (path / "config.yaml").touch()
        assert "neither an export (config.json) nor a run folder with checkpoints" in refusal("inspect", path)
        return
    line = refusal("inspect", path)
    assert f"{path} is no data set (manifest.json), no export (config.json) and no run folder (checkpoints/), " in line
