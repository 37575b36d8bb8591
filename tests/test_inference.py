"""Does a model see an ECG as it was trained to, however the ECG comes in, and does an export keep it whole?"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecgscale import inference
from ecgscale.data.plausibility import BLANK
from ecgscale.errors import InputError, MachineError
from ecgscale.export import Profile, about_model, export_run, write_export
from ecgscale.files import file_sha256, read_json, sealed, write_json
from ecgscale.inference import ECGModel, Recording, load
from ecgscale.lead_names import LEADS
from ecgscale.record import Record, Remark, quantise
from ecgscale.training.state import write_state

WINDOW = 2500  # samples of 5 s at 500 Hz
CLOSE = {"rtol": 0, "atol": 2e-6}  # float32 rounding of embeddings of about 1


@pytest.fixture(scope="module")
def model(make_model) -> ECGModel:
    return make_model()


@pytest.fixture(scope="module")
def ecg_12_s(smooth_ecg):
    return smooth_ecg(500, 12)


def distance(a, b) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def record_of(signal_mv_LT, leads=LEADS) -> Record:
    return Record.of("r", quantise(signal_mv_LT), 500.0, tuple(leads))


def weights_of(model: ECGModel) -> dict[str, torch.Tensor]:
    weights = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    head = model.head.state_dict() if model.head else {}
    return weights | {f"head.{name}": tensor for name, tensor in head.items()}


def test_a_model_says_in_a_line_what_it_is(make_model):
    line = repr(make_model())
    assert "\n" not in line
    assert "conv stem, 2 layers of width 32" in line
    assert "takes 500 Hz in windows of 5 s, mv; no head; on c" in line
    classifier = make_model("zscore", classes=8)
    assert "zscore; a head; on c" in repr(classifier)
    classifier.about["classes"] = list("abcdefgh")
    assert "classes a, b, c, d, e, f, … (8)" in repr(classifier)


# --- what goes in ---


def test_shapes(model, smooth_ecg):
    signal_RLT = np.stack([smooth_ecg(500, 10, seed) for seed in range(3)])
    many = model.embed(signal_RLT, 500, LEADS)
    assert many.record_embedding.shape == (3, 32)
    assert many.record_embedding.dtype == np.float32
    assert many.tokens is None
    for signal_LT, embedding_D in zip(signal_RLT, many.record_embedding, strict=True):
        np.testing.assert_allclose(model.embed(signal_LT, 500, LEADS).record_embedding[0], embedding_D, **CLOSE)
    assert distance(many.record_embedding[0], many.record_embedding[1]) > 0.01, "different ECGs differ"


def test_segments_hold_a_token(small_model_config):
    config = replace(small_model_config, stem="patch", patch_samples=50)
    said = "segments of 0.09 s at 500 Hz are shorter than one token of 50 samples; give longer ones"
    with pytest.raises(InputError, match=said):
        about_model(config, Profile(500.0, 0.09, "mv"))


def test_more_recordings_than_fit_into_one_batch(model, smooth_ecg):
    signal_RLT = np.stack([smooth_ecg(500, 0.2, seed) for seed in range(70)])
    embedding_RD = model.embed(signal_RLT, 500, LEADS).record_embedding
    assert embedding_RD.shape == (70, 32)
    for row in (31, 32, 69):
        alone_D = model.embed(signal_RLT[row], 500, LEADS).record_embedding[0]
        np.testing.assert_allclose(embedding_RD[row], alone_D, **CLOSE)


@pytest.mark.parametrize(
    "names", [("V6", "ecg i", "AVR"), ("II",), LEADS[::-1]], ids=["three in other words", "one", "reversed"]
)
@pytest.mark.parametrize("normalisation", ["mv", "zscore"])
def test_lead_subsets_in_any_order_are_the_twelve_with_the_others_zero(make_model, ecg_12_s, names, normalisation):
    model = make_model(normalisation)
    places = [[lead.casefold() for lead in LEADS].index(name.casefold().removeprefix("ecg ")) for name in names]
    masked_LT = np.zeros_like(ecg_12_s)
    masked_LT[places] = ecg_12_s[places]
    subset = model.embed(ecg_12_s[places], 500, names).record_embedding
    np.testing.assert_allclose(subset, model.embed(masked_LT, 500, LEADS).record_embedding, **CLOSE)
    if len(names) < 12:
        assert distance(subset, model.embed(ecg_12_s, 500, LEADS).record_embedding) > 0.01


@pytest.mark.parametrize("rate_hz", [250, 1000, np.float32(250), np.int64(1000)])
def test_the_same_ecg_at_another_rate_gives_the_same_embedding(model, smooth_ecg, rate_hz):
    expected = model.embed(smooth_ecg(500, 10), 500, LEADS).record_embedding
    signal_LT = smooth_ecg(float(rate_hz), 10)
    assert distance(model.embed(signal_LT, rate_hz, LEADS).record_embedding, expected) < 2e-3
    assert distance(model.embed(signal_LT, 500, LEADS).record_embedding, expected) > 0.02, "the rate matters"


def test_integers_lists_and_counts_are_the_same_ecg(model, ecg_12_s):
    counts_LT = np.rint(200 * ecg_12_s).astype(np.int32)
    expected = model.embed(counts_LT * 0.005, 500, LEADS).record_embedding
    for given in (counts_LT, counts_LT.tolist()):
        embedding = model.embed(given, 500, LEADS, mv_per_count=0.005).record_embedding
        np.testing.assert_array_equal(embedding, expected)
    np.testing.assert_array_equal(model.embed(counts_LT * 5.0, 500, LEADS, unit="uV").record_embedding, expected)
    volts = model.embed(counts_LT * 5e-6, 500, LEADS, unit="V").record_embedding
    np.testing.assert_allclose(volts, expected, **CLOSE)
    tenths = model.embed(counts_LT * 0.05, 500, LEADS, unit="0.1mV").record_embedding
    np.testing.assert_allclose(tenths, expected, **CLOSE)


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4", "f8"])
def test_millivolts_take_little_beyond_themselves(dtype):
    """Where leads are longer than a piece; one has an offset that is taken off."""
    time_T = np.arange(3 << 18)
    signal_LT = np.stack([lead + 500 * np.sin(time_T / 40 + lead) for lead in range(12)]).astype(dtype)
    signal_LT[1] += 32_000 if dtype == "i2" else 33_000
    rows = [0, 1, *range(3, 12)]
    signal_mv_LT = signal_LT[rows] * np.float64(1e-3)
    signal_mv_LT[1] -= 0.0 if dtype == "i2" else float(np.median(signal_LT[1])) * 1e-3
    tracemalloc.start()
    mv_LT = inference._millivolts(signal_LT, rows, 1e-3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mv_LT.dtype == np.float32
    np.testing.assert_array_equal(mv_LT, signal_mv_LT.astype(np.float32))
    assert peak < 1.5 * mv_LT.nbytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mv_LT: mv_LT / 1000, "are they volts? Then give --unit V"),
        (lambda mv_LT: mv_LT * 1000, "are they microvolts? Then give --unit uV"),
        (lambda mv_LT: np.rint(mv_LT * 200).astype(np.int16), "integers (int16) say no unit; give --mv-per-count"),
        (lambda mv_LT: 0 * mv_LT, "all samples are zero"),
        (lambda mv_LT: 0 * mv_LT - 80, "all leads stand still, at -80 mV"),
        (lambda mv_LT: np.where(np.arange(6000) == 77, -9999, mv_LT), "most likely a code for missing ones"),
    ],
    ids=["volts", "microvolts", "counts", "zeros", "still", "code"],
)
def test_what_is_no_ecg_is_refused(model, ecg_12_s, change, said):
    with pytest.raises(InputError) as refused:
        model.embed(change(ecg_12_s), 500, LEADS)
    assert said in str(refused.value)
    if said.startswith("integers"):
        return
    with pytest.raises(InputError) as refused:
        model.embed(np.stack([ecg_12_s, change(ecg_12_s)]), 500, LEADS)
    assert str(refused.value).startswith("recording 1: ")


def test_what_is_odd_is_logged_and_flat_leads_are_masked(model, ecg_12_s, caplog):
    odd_LT = ecg_12_s.copy()
    odd_LT[7] = 4.0
    embedding = model.embed(np.stack([ecg_12_s] + 4 * [odd_LT]), 500, LEADS).record_embedding
    without = [lead for lead in LEADS if lead != "V2"]
    alone = model.embed(np.delete(ecg_12_s, 7, axis=0), 500, without).record_embedding
    np.testing.assert_allclose(embedding[3], alone[0], **CLOSE)
    assert distance(embedding[0], alone[0]) > 0.01
    named = "recording 1 (V2), recording 2 (V2), recording 3 (V2) and 1 more"
    assert f"4 records: leads without a signal are left out as absent; {named}" in caplog.messages
    assert any("I + III = II" in message for message in caplog.messages), "its leads are drawn independently"


def test_a_lead_of_nan_alone_is_masked(model, ecg_12_s, caplog):
    blank_LT = ecg_12_s.copy()
    blank_LT[7] = np.nan
    embedding = model.embed(np.stack([ecg_12_s, blank_LT]), 500, LEADS).record_embedding
    alone = model.embed(np.delete(ecg_12_s, 7, axis=0), 500, [lead for lead in LEADS if lead != "V2"]).record_embedding
    np.testing.assert_allclose(embedding[1], alone[0], **CLOSE)
    assert f"1 records: {BLANK}; recording 1 (V2)" in caplog.messages


@pytest.mark.parametrize(("option", "said"), [({"unit": "mm"}, "unit 'mm'"), ({"mv_per_count": 0.0}, "mv_per_count 0")])
def test_units_that_are_none(model, ecg_12_s, option, said):
    with pytest.raises(InputError, match=said):
        model.embed(ecg_12_s, 500, LEADS, **option)


def test_masked_numbers_are_missing(model, ecg_12_s, caplog):
    garbage_LT = ecg_12_s.copy()
    garbage_LT[4] = 7.0
    lead = np.zeros(garbage_LT.shape, bool)
    lead[4] = True
    expected = model.embed(np.where(lead, np.nan, ecg_12_s), 500, LEADS).record_embedding
    masked_LT = np.ma.masked_array(garbage_LT, lead)
    for signal in (masked_LT, list(masked_LT)):
        np.testing.assert_array_equal(model.embed(signal, 500, LEADS).record_embedding, expected)
    assert BLANK in caplog.text
    with pytest.raises(InputError, match="NaN or infinity"):
        model.embed(np.ma.masked_array(ecg_12_s, np.eye(*ecg_12_s.shape) > 0), 500, LEADS)
    counts_LT = np.ma.masked_array(np.rint(1000 * garbage_LT).astype(np.int16), lead)
    with pytest.raises(InputError, match="6000 of its numbers are masked; interpolate them, or give floats"):
        model.embed(counts_LT, 500, LEADS, mv_per_count=1e-3)


@pytest.mark.parametrize("normalisation", ["mv", "zscore"])
def test_a_stored_record_embeds_as_its_millivolts_do(make_model, ecg_12_s, normalisation):
    model, record = make_model(normalisation), record_of(ecg_12_s[:6, : 2 * WINDOW] + 1.25, LEADS[:6])
    stored = model.embed_recordings([Recording.of(record)]).record_embedding
    given = model.embed(record.millivolts(), 500, LEADS[:6]).record_embedding
    np.testing.assert_allclose(stored, given, rtol=0, atol=1e-4)


def test_remarks_are_logged_in_one_line_whatever_records_are_called(caplog):
    inference.log_remarks([("a\nb", Remark("odd", "V1")), ("c", Remark("odd"))])
    assert caplog.messages == ["2 records: odd; a b (V1), c"]


# --- windows and tokens ---


def test_long_recordings_are_the_mean_over_windows_weighted_by_tokens(model, ecg_12_s):
    windows = [ecg_12_s[:, :WINDOW], ecg_12_s[:, WINDOW : 2 * WINDOW], ecg_12_s[:, 2 * WINDOW :]]
    parts_WD = np.concatenate([model.embed(window, 500, LEADS).record_embedding for window in windows])
    expected_D = np.average(parts_WD, axis=0, weights=[156, 156, 62])
    embedding_D = model.embed(ecg_12_s, 500, LEADS).record_embedding[0]
    np.testing.assert_allclose(embedding_D, expected_D, **CLOSE)
    assert distance(embedding_D, parts_WD.mean(axis=0)) > 1e-4, "the weights matter"


def test_a_tail_below_a_second_is_left_out_and_a_longer_one_is_not(model, ecg_12_s):
    def embed(samples: int):
        return model.embed(ecg_12_s[:, :samples], 500, LEADS, tokens=True)

    whole, short_tail, tail = embed(2 * WINDOW), embed(2 * WINDOW + 499), embed(2 * WINDOW + 500)
    np.testing.assert_array_equal(whole.record_embedding, short_tail.record_embedding)
    assert whole.tokens.shape == short_tail.tokens.shape == (1, 312, 32)
    assert tail.tokens.shape == (1, 312 + 31, 32)
    assert distance(tail.record_embedding, whole.record_embedding) > 1e-4


@pytest.mark.parametrize(("samples", "tokens"), [(16, 1), (31, 1), (250, 15), (2499, 156), (2500, 156)])
def test_all_that_there_is_is_kept_however_short(model, ecg_12_s, samples, tokens):
    embedding = model.embed_recordings([Recording.of(record_of(ecg_12_s[:, :samples]))], tokens=True)
    assert embedding.tokens.shape == (1, tokens, 32)
    assert np.isfinite(embedding.tokens).all()
    np.testing.assert_allclose(embedding.tokens.mean(axis=1), embedding.record_embedding, **CLOSE)


def test_tokens_end_in_nan_behind_shorter_recordings(model, ecg_12_s):
    recordings = [Recording.of(record_of(ecg_12_s[:, :samples])) for samples in (6000, 1000, 2500)]
    embedding = model.embed_recordings(recordings, tokens=True)
    counts = [156 + 156 + 62, 62, 156]
    assert embedding.tokens.shape == (3, max(counts), 32)
    for tokens_ND, count, record_D in zip(embedding.tokens, counts, embedding.record_embedding, strict=True):
        assert np.isfinite(tokens_ND[:count]).all()
        assert np.isnan(tokens_ND[count:]).all()
        np.testing.assert_allclose(tokens_ND[:count].mean(axis=0), record_D, **CLOSE)


@pytest.mark.parametrize("samples", [2500, 6000, 1300], ids=["one window", "several", "padded"])
def test_zscore_does_not_see_gain_or_offset_of_a_lead(make_model, ecg_12_s, samples):
    model, signal_LT = make_model("zscore"), ecg_12_s[:, :samples]
    gain_L1, offset_L1 = np.geomspace(0.2, 5, 12)[:, None], np.linspace(-8, 8, 12)[:, None]
    expected = model.embed(signal_LT, 500, LEADS).record_embedding
    np.testing.assert_allclose(
        model.embed(gain_L1 * signal_LT + offset_L1, 500, LEADS).record_embedding, expected, rtol=0, atol=1e-4
    )
    counts_LT = record_of(signal_LT).signal_LT
    counts, moved = (Recording(x_LT, np.ones(12), list(range(12))) for x_LT in (counts_LT, 3 * counts_LT + 1234))
    # Behind the end stands the offset as a whole count, which is zero to within half a count.
    expected = model.embed_recordings([counts]).record_embedding
    np.testing.assert_allclose(model.embed_recordings([moved]).record_embedding, expected, rtol=0, atol=3e-2)
    plain = make_model("mv")
    moved = plain.embed(gain_L1 * signal_LT, 500, LEADS).record_embedding
    assert distance(moved, plain.embed(signal_LT, 500, LEADS).record_embedding) > 0.01, "millivolts do"


def test_flat_leads_give_finite_embeddings(make_model):
    for normalisation in ("mv", "zscore"):
        flat = Recording(np.full((12, WINDOW), 3.0, np.float32), np.ones(12, np.float32), list(range(12)))
        assert np.isfinite(make_model(normalisation).embed_recordings([flat], tokens=True).tokens).all()


def test_logits_are_those_of_the_mean_embedding(make_model, ecg_12_s):
    model = make_model(classes=3)
    recordings = [Recording.of(record_of(ecg_12_s[:, :samples])) for samples in (6000, 1000)]
    expected = model.head(torch.from_numpy(model.embed_recordings(recordings).record_embedding)).detach().numpy()
    np.testing.assert_allclose(model.logits(recordings), expected, **CLOSE)
    with pytest.raises(InputError, match="no classification head"):
        make_model().logits(recordings)


# --- bad input ---

OKAY = np.tile([0.0, 0.5], (12, 250))
WITH_NAN = np.where(np.arange(500) == 7, np.nan, OKAY)


@pytest.mark.parametrize(
    ("signal", "rate_hz", "leads", "said"),
    [
        (OKAY[:2], 500, ("I", "V7"), "unknown lead 'V7'"),
        (OKAY[:2], 500, ("I", "ECG I"), "lead I stands 2 times"),
        (OKAY, 500, LEADS[:6], "shape (1, 12, 500)"),
        (OKAY.T, 500, LEADS, "shape (1, 500, 12)"),
        (OKAY[0], 500, ("I",), "shape (500,)"),
        (OKAY[None, None], 500, LEADS, "shape (1, 1, 12, 500)"),
        (WITH_NAN, 500, LEADS, "NaN or infinity"),
        (np.where(OKAY == 0, -np.inf, 0), 500, LEADS, "NaN or infinity"),
        (OKAY, 0, LEADS, "sampling rate 0 Hz; an ECG has 20 to 100000 Hz"),
        (OKAY, -500, LEADS, "sampling rate -500 Hz"),
        (OKAY, np.nan, LEADS, "sampling rate nan Hz"),
        (OKAY, np.inf, LEADS, "sampling rate inf Hz"),
        (OKAY, 1e-6, LEADS, "sampling rate 1e-06 Hz"),
        (OKAY, 10, LEADS, "sampling rate 10 Hz"),
        (OKAY, np.float32(2**-8), LEADS, "a period in seconds? Then it is 256 Hz"),
        (OKAY[:, :15], 500, LEADS, "15 samples at 500 Hz are 30 ms; an ECG has at least 200 ms"),
        (OKAY[:, :99], 500, LEADS, "99 samples at 500 Hz"),
        (OKAY[:, :7], 250, LEADS, "7 samples at 250 Hz"),
        (OKAY[:, :0], 250, LEADS, "shape (1, 12, 0) is empty"),
        (OKAY[:0], 500, (), "shape (1, 0, 500) is empty"),
        (np.zeros((0, 12, 500)), 500, LEADS, "shape (0, 12, 500) is empty"),
        (np.full((12, 500), "0"), 500, LEADS, "type <U1"),
        (OKAY * 1j, 500, LEADS, "type complex128"),
    ],
)
def test_bad_input_is_named(model, signal, rate_hz, leads, said):
    with pytest.raises(InputError) as refused:
        model.embed(signal, rate_hz, leads)
    assert said in str(refused.value)


# --- exports ---


@pytest.mark.parametrize("classes", [0, 3])
def test_an_export_gives_the_same_embeddings(make_model, ecg_12_s, tmp_path, classes):
    model = make_model("zscore", classes)
    folder = write_export(tmp_path / "out" / "export", weights_of(model), model.about)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    again = load(folder)
    assert again.profile == model.profile
    assert (again.head is None) == (classes == 0)
    np.testing.assert_array_equal(
        again.embed(ecg_12_s, 500, LEADS).record_embedding, model.embed(ecg_12_s, 500, LEADS).record_embedding
    )
    if classes:
        recording = Recording.of(record_of(ecg_12_s))
        np.testing.assert_array_equal(again.logits([recording]), model.logits([recording]))


def test_an_export_holds_all_parts_or_those_that_are_named_in_float32(model, tmp_path):
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(model).items()}
    weights |= {"local_head.x": torch.zeros(3), "own_head.x": torch.zeros(3)}
    whole = write_export(tmp_path / "whole", weights, model.about)
    stored = load_file(whole / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert json.loads((whole / "config.json").read_text())["parts"] == ["encoder", "local_head", "own_head"]
    load(whole)
    parts = {"parts": ["encoder", "own_head"]}
    named = write_export(tmp_path / "named", weights | {"teacher.x": torch.zeros(3)}, model.about | parts)
    assert load_file(named / "model.safetensors").keys() == weights.keys() - {"local_head.x"}


def test_a_part_that_an_export_does_not_name_is_refused(small_export):
    path = small_export / "model.safetensors"
    save_file(load_file(path) | {"local_head.x": torch.zeros(3)}, path)
    about = {key: value for key, value in read_json(small_export / "config.json").items() if key != "sha256"}
    write_json(small_export / "config.json", sealed(about | {"weights_sha256": file_sha256(path)}))
    with pytest.raises(InputError, match=r"left over local_head\.x; an export holds encoder\.\* alone"):
        load(small_export)


def damage_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def damage_group(group: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        damage_config(**{group: about[group] | changes})(folder)

    return damage


def damage_weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


def of_type(dtype: torch.dtype) -> Callable[[dict], dict]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def with_head(**changes: object) -> Callable[[Path], None]:
    """A head of three outputs, and what is said of them."""

    def damage(folder: Path) -> None:
        head = {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
        damage_weights(lambda tensors: tensors | head)(folder)
        damage_config(classes=["a", "b", "c"], thresholds=[0.5, None, 0.1])(folder)
        assert load(folder).head is not None
        damage_config(**changes)(folder)

    return damage


def deep_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"more": ' + 10**5 * "[" + 10**5 * "]" + ",", 1))


def endless_config(folder: Path) -> None:
    os.truncate(folder / "config.json", 1 << 40)


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def without(tensors: dict, name: str) -> dict:
    return {key: tensor for key, tensor in tensors.items() if key != name}


NEIGHBOURS = ("centre", "bank", "target")


@pytest.mark.parametrize(
    ("damage", "named", "said"),
    [
        (cut("config.json", 50), "config.json", "damaged"),
        (cut("config.json", 0), "config.json", "damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json", "damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json", "damaged"),
        (damage_config(format="other/2"), "config.json", "ecgscale-export/2"),
        (damage_config(model=None), "", "does not describe a model"),
        (damage_group("model", colour="red"), "", "colour"),
        (damage_group("model", encoder="transfomer"), "", "model.encoder 'transfomer' is unknown"),
        (damage_group("model", encoder=["transformer"]), "", "model.encoder \"['transformer']\" is unknown"),
        (damage_group("model", encoder="os:System"), "", "model.encoder 'os:System' is code that is not ours"),
        (damage_group("model", width="wide"), "", "does not describe a model"),
        (damage_group("model", dropout=2), "", "model.dropout 2"),
        (damage_group("profile", normalisation="minmax"), "", "normalisation 'minmax'"),
        (damage_group("profile", rate_hz=0), "", "rate_hz 0"),
        (damage_group("profile", leads=["I", "II"]), "", "leads ('I', 'II')"),
        (damage_group("profile", segment_s=1e9), "", "more than 1048576 samples"),
        (damage_group("profile", segment_s=[5]), "", "segment_s is '[5]'"),
        (damage_group("model", width=64), "", "encoder.feature_projection.weight is (32, 16)"),
        (damage_group("model", width=10**9), "", "width 1000000000, but all weights together"),
        (damage_group("model", width=10**400), "", "width 10000000000000000000, but all weights together"),
        (damage_group("model", width=16384, position_groups=1, position_kernel=16384), "", "encoder.feature_proj"),
        (damage_group("model", depth=10**6), "", "depth 1000000, but there are 40 weights"),
        (damage_group("model", depth=True), "", "depth is 'True'"),
        (damage_group("model", dropout=float("nan")), "config.json", "NaN is no number"),
        (damage_config(step="7"), "config.json", "step is '7'"),
        (damage_config(task=[]), "config.json", "task is '[]'"),
        (deep_config, "config.json", "nested"),
        (endless_config, "config.json", "more than 16777216 bytes"),
        (lambda folder: (folder / "config.json").unlink(), "", "neither an export (config.json) nor a run"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors", "not a readable safetensors"),
        (cut("model.safetensors", 4), "model.safetensors", "not a readable safetensors"),
        (cut("model.safetensors", 9000), "model.safetensors", "not a readable safetensors"),
        (damage_weights(lambda t: without(t, "encoder.norm.bias")), "", "missing norm.bias"),
        (damage_weights(lambda t: t | {"encoder.more": torch.zeros(2)}), "", "left over more"),
        (damage_weights(lambda t: t | {"quantizer.more": torch.zeros(2)}), "model.safetensors", "quantizer.more"),
        (damage_weights(lambda t: t | {"encoder.norm.bias": torch.zeros(2)}), "", "encoder.norm.bias is (2,)"),
        (damage_weights(lambda t: t | {"head.weight": torch.zeros(3, 8)}), "", "weights do not fit"),
        (damage_weights(lambda t: t | {"head.weight": torch.zeros(3)}), "", "weights do not fit"),
        (damage_weights(lambda t: t | {f"head.{n}": torch.zeros(3) for n in NEIGHBOURS}), "", "its neighbours are not"),
        (
            damage_weights(lambda t: t | {"head.bias": torch.tensor([torch.inf])}),
            "model.safetensors",
            "head.bias holds",
        ),
        (damage_weights(lambda t: t | {"head.weight": torch.zeros(3, 32)}), "", "missing bias"),
        *(
            (damage_weights(of_type(dtype)), "model.safetensors", f"is {dtype}; ecgscale writes torch.float32 alone")
            for dtype in (torch.float16, torch.float64, torch.int32, torch.complex64)
        ),
        *(
            (with_head(classes=classes), "", "its head has 3 outputs, for which")
            for classes in (["a"], ["a", "b"], ["a", "b", "a"], [1, 2, 3], ["a", "b", "c", "d"])
        ),
        *(
            (with_head(thresholds=thresholds), "", "are no 3 thresholds")
            for thresholds in ([0.5], [0.5, 0.5, "0.5"], [0.5, 0.5, 0.5, None])
        ),
        (with_head(thresholds="0.5"), "config.json", "thresholds is '0.5', no list"),
        (with_head(leads="I"), "config.json", "leads is 'I', no list"),
    ],
)
def test_a_damaged_export_is_refused_by_name(small_export, without_checksums, damage, named, said):
    """Also where no checksum tells: in exports of earlier versions, or made by hand."""
    load(without_checksums(small_export))
    damage(small_export)
    with pytest.raises(InputError) as refused:
        load(small_export)
    assert str(refused.value).startswith(f"{small_export / named}: ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_flipped_bit_of_an_export_is_believed(small_export, smooth_ecg, name):
    """It is refused, or it stands where it says nothing."""
    path, ecg_LT = small_export / name, smooth_ecg(500, 5)
    whole, before = path.read_bytes(), load(small_export).embed(ecg_LT, 500, LEADS).record_embedding
    rng, reasons = np.random.default_rng(3), []
    for at in rng.integers(len(whole), size=60):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(load(small_export).embed(ecg_LT, 500, LEADS).record_embedding, before)
        except InputError as error:
            reasons.append(str(error))
    assert len(reasons) > 50
    assert all(reason.startswith(f"{path}: ") for reason in reasons)


def test_exports_of_earlier_versions_are_read(small_export, without_checksums, smooth_ecg):
    before = load(small_export).embed(smooth_ecg(500, 5), 500, LEADS)
    after = load(without_checksums(small_export)).embed(smooth_ecg(500, 5), 500, LEADS)
    np.testing.assert_array_equal(after.record_embedding, before.record_embedding)


def test_weights_that_are_not_finite_are_neither_written_nor_replace_an_export(model, small_export):
    before = {path: path.read_bytes() for path in small_export.iterdir()}
    weights = weights_of(model) | {"encoder.norm.bias": torch.full((32,), torch.nan)}
    with pytest.raises(InputError, match=r"export: not exported: encoder\.norm\.bias holds NaN or infinity"):
        write_export(small_export, weights, model.about)
    assert {path: path.read_bytes() for path in small_export.iterdir()} == before


def test_an_export_that_was_about_to_be_replaced_is_found_aside(small_export, tmp_path):
    before = load(small_export).about
    small_export.rename(tmp_path / "export.before")
    assert load(small_export).about == before


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch], ids=["absent", "empty", "a file"])
def test_what_is_no_model_is_named(tmp_path, make):
    make(tmp_path / "m")
    with pytest.raises(InputError, match=r"/m: neither an export \(config.json\) nor a run folder"):
        load(tmp_path / "m")


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 20_000], ids=["at once", "halfway"])
def test_an_export_is_complete_or_absent(make_model, small_export, tmp_path, size):
    model, before = make_model(), {path: path.read_bytes() for path in small_export.iterdir()}
    for folder in (tmp_path / "new", small_export):
        with disk_full_after(size), pytest.raises(MachineError, match=f"{folder}.*: cannot write: "):
            write_export(folder, weights_of(model), model.about)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"], "nothing half-written stays"
    assert {path: path.read_bytes() for path in small_export.iterdir()} == before


def test_an_export_whose_description_does_not_fit_leaves_nothing(model, tmp_path):
    about = model.about | {"classes": ["x" * 200_000]}
    with disk_full_after(150_000), pytest.raises(MachineError, match=r"config\.json: cannot write"):
        write_export(tmp_path / "export", {"head.bias": torch.zeros(2)}, about)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_export_are_no_model_and_do_not_disturb(model, tmp_path):
    partial = tmp_path / f"export.{32 * 'a'}.partial"
    partial.mkdir()
    (partial / "junk").touch()
    os.utime(partial, (0, 0))
    write_export(tmp_path / "export", weights_of(model), model.about)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]


# --- runs ---


@pytest.fixture
def run(model, tmp_path) -> Path:
    """A run folder with two checkpoints, as the engine leaves it; the model's weights are in the second."""
    for step, factor in ((1, 0.5), (2, 1.0)):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        file = folder / "tensors-00000-of-00001.safetensors"
        tensors = {f"weight.{name}": tensor * factor for name, tensor in weights_of(model).items()}
        save_file(tensors | {"weight.local_head.x": torch.zeros(2), "exp_avg.encoder.norm.bias": torch.ones(32)}, file)
        about = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        write_state(folder, {"step": step, "files": {file.name: about}, "about": model.about})
    return tmp_path / "run"


def test_a_run_is_loaded_and_exported_from_its_newest_checkpoint(run, model, tmp_path, ecg_12_s):
    expected = model.embed(ecg_12_s, 500, LEADS).record_embedding
    np.testing.assert_array_equal(load(run).embed(ecg_12_s, 500, LEADS).record_embedding, expected)
    for _ in range(2):  # an export may be made again in its place
        assert export_run(run, tmp_path / "out") == tmp_path / "out"
        np.testing.assert_array_equal(load(tmp_path / "out").embed(ecg_12_s, 500, LEADS).record_embedding, expected)


def test_the_export_of_a_run_comes_before_its_checkpoints(run, make_model):
    other = about_model(make_model().encoder.config, Profile(250.0, 5.0, "mv"))
    write_export(run / "export", weights_of(make_model()), other | {"step": 2})
    assert load(run).profile.rate_hz == 250
    write_export(run / "export", weights_of(make_model()), other | {"step": 1})
    assert load(run).profile.rate_hz == 500, "the run has gone on since"


def test_the_export_of_another_run_is_refused(run, model, tmp_path):
    (run / "run.id").write_text("a" * 32)
    export_run(run, tmp_path / "out")
    shutil.copytree(tmp_path / "out", run / "export")
    assert load(run).about["run"] == "a" * 32
    (run / "run.id").write_text("b" * 32)
    with pytest.raises(InputError, match=f"export: is of another run than {run}; put it elsewhere"):
        load(run)
    (run / "run.id").unlink()
    assert load(run).about["step"] == 2, "of a run that an earlier version began it is not known"


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    file = next((run / "checkpoints" / "step-00000002").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"step-00000002/tensors.*damaged"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(file.parent)
    assert export_run(run, tmp_path / "out").exists()


def test_nothing_but_an_export_is_overwritten(run, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    for out in (foreign, run, run / "checkpoints" / "step-00000001" / "state.json"):
        with pytest.raises(InputError, match=f"{out}: exists and is no export"):
            export_run(run, out)
    assert (foreign / "config.json").is_file()
    with pytest.raises(InputError, match="nowhere: neither an export"):
        export_run(tmp_path / "nowhere", tmp_path / "out")


def test_an_electrode_offset_is_taken_off_as_when_records_are_read(model, ecg_12_s) -> None:
    centred = np.array(ecg_12_s, np.float32)
    centred[6] -= np.median(centred[6])
    beside = centred.copy()
    beside[6] += 300  # float32 has steps of 0.03 µV there
    expected, got = (model.embed(signal, 500, LEADS).record_embedding for signal in (centred, beside))
    assert distance(got, expected) < 1e-3
    beside[6] -= 270  # 1 µV counts can hold that: an offset like any other
    assert distance(model.embed(beside, 500, LEADS).record_embedding, expected) > 1e-3
