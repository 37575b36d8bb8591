"""Does an ONNX file give in onnxruntime what the model gives in PyTorch, whatever goes in?"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from ecgscale.export import Profile
from ecgscale.inference import Recording, load
from ecgscale.interop import onnx_model
from ecgscale.lead_names import LEADS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32, of which an offset of 2 mV before the norm takes digits


@pytest.fixture(scope="module", params=["mv with a head", "zscore"])
def made(request, make_export, small_model_config, tmp_path_factory):
    """Export and .onnx of a model, and what the command printed."""
    folder = tmp_path_factory.mktemp("onnx")
    config = replace(small_model_config, depth=1)  # the exporter takes a second for each layer
    if request.param == "zscore":
        config = replace(config, stem="patch", patch_samples=25, pre_norm=True)
        export = make_export(folder / "export", config, Profile(250.0, 2.0, "zscore"))
    else:
        export = make_export(folder / "export", config, classes=3)
    return export, folder / "model.onnx", onnx_model.export_onnx(export, folder / "model.onnx")


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("names", [LEADS, ("I", "II", "V2"), ("V6",)], ids=len)
def test_whole_segments_give_what_embed_gives(made, smooth_ecg, names):
    export, path, _ = made
    model, run = load(export), session(path)
    rate_hz, at = model.profile.rate_hz, [LEADS.index(name) for name in names]
    signal_BLT = np.zeros((3, 12, round(model.profile.segment_s * rate_hz)), np.float32)
    for row in range(3):
        signal_BLT[row, at] = 2.0 + smooth_ecg(rate_hz, model.profile.segment_s, row)[at]
    found = run.run(None, {"signal": signal_BLT})
    expected = model.embed(signal_BLT[:, at], rate_hz, names, tokens=True)
    np.testing.assert_allclose(found[0], expected.tokens, **CLOSE)
    np.testing.assert_allclose(found[1], expected.record_embedding, **CLOSE)
    assert len(found) == (2 if model.head is None else 3)
    if model.head is not None:
        recordings = [Recording(signal_LT[at], np.ones(len(at), np.float32), at) for signal_LT in signal_BLT]
        np.testing.assert_allclose(found[2], model.logits(recordings), **CLOSE)


def test_batch_and_length_are_free(made):
    export, path, _ = made
    model, run = load(export), session(path)
    patch = model.encoder.config.patch_samples
    for rows, samples in ((1, patch), (2, 2 * patch - 1), (5, 1003), (1, 3001)):
        signal_BLT = np.random.default_rng(samples).standard_normal((rows, 12, samples), np.float32)
        signal_BLT[0, 4] = 0.7  # a flat lead
        found, expected = run.run(None, {"signal": signal_BLT}), onnx_model._right(model, signal_BLT)
        assert found[0].shape == (rows, samples // patch, 32)
        for one, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, right, **CLOSE)


def test_the_file_says_what_goes_in(made):
    export, path, said = made
    model = load(export)
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    about = json.loads(properties["ecgscale"])
    assert Profile(**about["profile"] | {"leads": tuple(about["profile"]["leads"])}) == model.profile
    assert about["units"] == "mV"
    assert properties["leads"] == ",".join(LEADS)
    outputs = ["tokens", "embedding"] + ["logits"] * (model.head is not None)
    assert [output.name for output in session(path).get_outputs()] == outputs
    assert session(path).get_inputs()[0].shape[1] == 12
    assert said.startswith(f"export: {path}, {', '.join(outputs)} of signal (batch, 12, samples) in mV\nchecked: onnx")
    assert float(said.split("differ by ")[1].split()[0]) < 1e-4


def test_leads_that_training_masked_are_masked(make_export, small_model_config, smooth_ecg, tmp_path):
    export, path = tmp_path / "export", tmp_path / "model.onnx"
    make_export(export, replace(small_model_config, depth=1), Profile(250.0, 2.0, "zscore"), leads=["I", "II", "V2"])
    printed = onnx_model.export_onnx(export, path)
    assert "all others are masked in the file, as the model was trained with I,II,V2 alone" in printed
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(properties["ecgscale"])["trained_leads"] == ["I", "II", "V2"]
    signal_LT = smooth_ecg(250, 2)
    embedding_BD = session(path).run(["embedding"], {"signal": signal_LT[None]})[0]
    expected = load(export).embed(signal_LT[[0, 1, 7]], 250, ("I", "II", "V2")).record_embedding
    np.testing.assert_allclose(embedding_BD, expected, **CLOSE)


def test_a_file_that_computes_something_else_is_not_kept(made, refusal, tmp_path, monkeypatch):
    export, _, _ = made
    out = tmp_path / "model.onnx"
    program = type("Program", (), {"model": type("Model", (), {"metadata_props": {}})})()
    program.save = lambda path, **_: path.write_bytes(made[1].read_bytes())
    monkeypatch.setattr(onnx_model, "_program", lambda _: program)
    right = onnx_model._right
    monkeypatch.setattr(onnx_model, "_right", lambda *given: [array + 0.01 for array in right(*given)])
    line = refusal("export", export, out, "--format", "onnx")
    assert "tokens of 1 × 12 leads" in line
    assert "in onnxruntime; nothing was written" in line
    assert not list(tmp_path.iterdir())


def test_refusals(made, refusal, tmp_path, monkeypatch):
    export, _, _ = made
    (tmp_path / "foreign.onnx").write_bytes(b"\x00" * 30)
    line = refusal("export", export, tmp_path / "foreign.onnx", "--format", "onnx")
    assert "is no .onnx file that ecgscale wrote" in line
    assert "give a file that ends in .onnx" in refusal("export", export, tmp_path / "model", "--format", "onnx")
    assert "nowhere: neither an export" in refusal("export", "nowhere", tmp_path / "a.onnx", "--format", "onnx")
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None if name == "onnxscript" else sys)
    line = refusal("export", export, tmp_path / "a.onnx", "--format", "onnx")
    assert line == "ecgscale: --format onnx needs onnxscript; pip install 'ecgscale[onnx]'\n"
