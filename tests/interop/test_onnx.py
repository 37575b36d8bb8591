"""Does an ONNX file give in onnxruntime what the model gives in PyTorch, whatever goes in?"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ecgscale.export import Profile
from ecgscale.inference import Recording, load
from ecgscale.interop import onnx_model
from ecgscale.lead_names import LEADS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
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


def embedding_by_the_docs(path, monkeypatch):
    """The function that docs/models.md shows."""
    monkeypatch.chdir(path.parent)
    (shown,) = re.findall(r"```python\n(import json\n.*?)```", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(shown, "docs/models.md", "exec"), namespace)
    return namespace["embedding"]


@pytest.mark.parametrize("names", [LEADS, ("I", "II", "V2"), ("V6",)], ids=len)
@pytest.mark.parametrize("windows", [0.16, 0.4, 1.0, 1.3, 2.0, 2.6])
def test_recordings_of_any_length_give_what_embed_gives(made, smooth_ecg, monkeypatch, names, windows):
    """Shorter than a window, whole ones, with a rest below 1 s that is left out, and with a longer one."""
    export, path, _ = made
    model = load(export)
    rate_hz, at = model.profile.rate_hz, [LEADS.index(name) for name in names]
    signal_LT = np.zeros((12, round(windows * model.profile.segment_s * rate_hz)), np.float32)
    signal_LT[at] = 2.0 + smooth_ecg(rate_hz, windows * model.profile.segment_s, 1)[at]
    if len(names) == 12:
        signal_LT[4] = 0.0  # a flat lead
    rows = [row for row in at if signal_LT[row].any()]
    expected = model.embed(signal_LT[rows], rate_hz, [LEADS[row] for row in rows]).record_embedding[0]
    np.testing.assert_allclose(embedding_by_the_docs(path, monkeypatch)(signal_LT), expected, **CLOSE)


def test_tokens_and_logits_of_rows_of_other_lengths(made, smooth_ecg):
    export, path, _ = made
    model, patch = load(export), load(export).encoder.config.patch_samples
    samples = round(model.profile.segment_s * model.profile.rate_hz)
    lengths = [samples, patch, 3 * patch + 1]
    signal_BLT = np.stack([2.0 + smooth_ecg(model.profile.rate_hz, model.profile.segment_s, row) for row in range(3)])
    given = {"signal": signal_BLT.astype(np.float32), "length": np.array(lengths)}  # behind its end stands something
    if model.profile.normalisation == "zscore":
        parts = [signal_LT[:, :n] for signal_LT, n in zip(signal_BLT, lengths, strict=True)]
        given["mean"] = np.stack([part.mean(axis=1) for part in parts]).astype(np.float32)
        given["deviation"] = np.stack([part.std(axis=1) for part in parts]).astype(np.float32)
    token_BND, embedding_BD, *logits = session(path).run(None, given)
    for row, length in enumerate(lengths):
        recording = Recording(signal_BLT[row, :, :length].astype(np.float32), np.ones(12, np.float32), [*range(12)])
        expected = model.embed_recordings([recording], tokens=True)
        np.testing.assert_allclose(token_BND[row, : length // patch], expected.tokens[0], **CLOSE)
        assert np.isnan(token_BND[row, length // patch :]).all()
        np.testing.assert_allclose(embedding_BD[row], expected.record_embedding[0], **CLOSE)
        if model.head is not None:
            np.testing.assert_allclose(logits[0][row], model.logits([recording])[0], **CLOSE)


def test_a_window_of_another_length_is_refused_by_the_file(made):
    export, path, _ = made
    model, run = load(export), session(path)
    signal_BLT = np.zeros((1, 12, round(model.profile.segment_s * model.profile.rate_hz) - 1), np.float32)
    given = {"signal": signal_BLT, "length": np.array([signal_BLT.shape[2]])}
    given |= {one.name: np.ones((1, 12), np.float32) for one in run.get_inputs()[2:]}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="invalid dimensions"):
        run.run(None, given)


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
    samples = round(model.profile.segment_s * model.profile.rate_hz)
    inputs = {one.name: one.shape[1:] for one in session(path).get_inputs()}
    moments = {"mean": [12], "deviation": [12]} if model.profile.normalisation == "zscore" else {}
    assert inputs == {"signal": [12, samples], "length": []} | moments
    assert (about["window_samples"], about["patch_samples"]) == (samples, model.encoder.config.patch_samples)
    assert said.startswith(f"export: {path}, {', '.join(outputs)} of signal (batch, 12, {samples}) in mV, length")
    assert float(said.split("differ by ")[1].split()[0]) < 1e-4


def test_leads_that_training_masked_are_masked(make_export, small_model_config, smooth_ecg, tmp_path, monkeypatch):
    export, path = tmp_path / "export", tmp_path / "model.onnx"
    make_export(export, replace(small_model_config, depth=1), Profile(250.0, 2.0, "zscore"), leads=["I", "II", "V2"])
    printed = onnx_model.export_onnx(export, path)
    assert "all others are masked in the file, as the model was trained with I,II,V2 alone" in printed
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(properties["ecgscale"])["trained_leads"] == ["I", "II", "V2"]
    signal_LT = smooth_ecg(250, 2)
    expected = load(export).embed(signal_LT[[0, 1, 7]], 250, ("I", "II", "V2")).record_embedding[0]
    np.testing.assert_allclose(embedding_by_the_docs(path, monkeypatch)(signal_LT), expected, **CLOSE)


def test_a_file_that_computes_something_else_is_not_kept(made, refusal, tmp_path, monkeypatch):
    export, _, _ = made
    out = tmp_path / "model.onnx"
    program = type("Program", (), {"model": type("Model", (), {"metadata_props": {}})})()
    program.save = lambda path, **_: path.write_bytes(made[1].read_bytes())
    monkeypatch.setattr(onnx_model, "_program", lambda _: program)
    right = onnx_model._right
    monkeypatch.setattr(onnx_model, "_right", lambda *given: [array + 0.01 for array in right(*given)])
    line = refusal("export", export, out, "--format", "onnx")
    assert "tokens of 12 leads" in line
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
