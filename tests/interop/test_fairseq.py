"""Do checkpoints of the reference come in whole and right, go back bit by bit, and fail in one line otherwise?"""

from __future__ import annotations

import math
import zipfile
from argparse import Namespace
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ecgscale.errors import InputError
from ecgscale.export import Profile, amend_export
from ecgscale.inference import Recording, load
from ecgscale.interop.fairseq import export_checkpoint, import_checkpoint
from ecgscale.interop.fairseq_config import cfg_for, contents_of
from ecgscale.interop.fairseq_layout import Codes, Contents, layout, to_theirs
from ecgscale.model.encoder import ModelConfig
from ecgscale.model.presets import PRESETS

CHECKPOINTS = ("fairseq_pretrained", "fairseq_pretrained_old_keys", "fairseq_finetuned")


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def recordings(signal_RLT) -> list[Recording]:
    return [Recording(signal_LT, np.ones(12, np.float32), list(range(12))) for signal_LT in signal_RLT]


# --- the reference's own files ---


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_outputs_of_the_reference(command, shared_reference, tmp_path, name):
    out = tmp_path / "export"
    said = command("import-fairseq", shared_reference / f"{name}.pt", out)
    assert "all accounted for\nprofile: mv-500hz, since cfg.task.normalize is false; the file does not say the" in said
    expected = load_file(shared_reference / f"{name}.expected.safetensors")
    signal_RLT, close = expected["input.signal"].numpy(), {"rtol": 1e-4, "atol": 1e-5}
    if "out.logits" in expected:
        np.testing.assert_allclose(load(out).logits(recordings(signal_RLT)), expected["out.logits"], **close)
        return
    np.save(tmp_path / "ecg.npy", signal_RLT)
    command("embed", out, tmp_path / "ecg.npy", tmp_path / "ecg.npz", "--rate-hz", 500, "--tokens")
    found = np.load(tmp_path / "ecg.npz", allow_pickle=False)
    np.testing.assert_allclose(found["tokens"], expected["out.encoder"], **close)
    np.testing.assert_allclose(found["record_embedding"], expected["out.record_embedding"], **close)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_there_and_back(command, shared_reference, tmp_path, read, name):
    command("import-fairseq", shared_reference / f"{name}.pt", tmp_path / "export")
    command("export", tmp_path / "export", tmp_path / "back.pt")  # its ending says the format
    given, back = read(shared_reference / f"{name}.pt"), read(tmp_path / "back.pt")
    assert back.keys() == given.keys()
    assert back["cfg"] == given["cfg"]
    assert back["optimizer_history"][-1]["num_updates"] == given["optimizer_history"][-1]["num_updates"]
    same(back["model"], given["model"])


# --- files of our making ---


@pytest.mark.parametrize("change", ["new names", "old names", "half", "mixed", "bias", "no heads", "pre-norm"])
def test_there_and_back_of_what_the_reference_may_write(
    command, make_export, small_model_config, tmp_path, read, written, change
):
    config = replace(small_model_config, stem_bias=change == "bias", pre_norm=change == "pre-norm")
    command("export", make_export(tmp_path / "ours", config), tmp_path / "a.pt", "--format", "fairseq")
    state = read(tmp_path / "a.pt")
    model = state["model"]
    if change == "old names":
        for i, letter in enumerate("gv"):
            old = f"conv_pos.pos_conv.0.weight_{letter}"
            model[old] = model.pop(f"conv_pos.pos_conv.0.parametrizations.weight.original{i}")
    if change in ("half", "mixed"):
        for name in model:
            if change == "half" or name.startswith("encoder."):
                model[name] = model[name].half()
    if change == "no heads":
        for name in [n for n in model if n.startswith(("quantizer", "project_q", "final_proj"))]:
            del model[name]
    said = command("import-fairseq", written(tmp_path / "a.pt", state), tmp_path / "export")
    assert ("pretrained, without heads" if change == "no heads" else "pretrained with its heads") in said
    assert "profile: the one that ecgscale wrote into the file" in said
    command("export", tmp_path / "export", tmp_path / "b.pt", "--format", "fairseq")
    same(read(tmp_path / "b.pt")["model"], model)
    assert read(tmp_path / "b.pt")["cfg"] == state["cfg"]
    assert load(tmp_path / "export").encoder.config == replace(config, preset="base")


@pytest.mark.parametrize("shape", [{"depth": 8}, {"depth": 24, "heads": 4}])
def test_ours_there_and_back(command, make_export, small_model_config, tmp_path, shape):
    config, profile = replace(small_model_config, **shape, dropout=0.25), Profile(360.0, 4.0, "zscore")
    export = make_export(tmp_path / "ours", config, profile)
    command("export", export, tmp_path / "a.pt", "--format", "fairseq")
    command("import-fairseq", tmp_path / "a.pt", tmp_path / "back")
    same(load_file(export / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors"))
    back = load(tmp_path / "back")
    assert (back.profile, back.encoder.config) == (profile, replace(config, preset="base"))
    assert back.about["step"] == 7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--classes", "b,a,c"], "--classes b,a,c: the file itself says a,b,c; leave --classes out"),
        (["--classes", "a,b"], "--classes a,b: the file itself says a,b,c; leave --classes out"),
        (
            ["--profile", "zscore-500hz"],
            "--profile zscore-500hz: the file itself says mv, 500 Hz, 5 s; leave --profile",
        ),
        (["--profile", "mv-250hz"], "--profile mv-250hz: the file itself says mv, 500 Hz, 5 s; leave --profile out"),
    ],
)
def test_what_our_own_files_say_is_not_overruled(command, refusal, make_export, tmp_path, arguments, reason):
    names = ["a", "b", "c"]
    export = make_export(tmp_path / "ours", profile=Profile(500.0, 5.0, "mv"), classes=3)
    amend_export(export, classes=names)
    command("export", export, tmp_path / "a.pt", "--format", "fairseq")
    assert reason in refusal("import-fairseq", tmp_path / "a.pt", tmp_path / "back", *arguments)
    assert not (tmp_path / "back").exists()
    command("import-fairseq", tmp_path / "a.pt", tmp_path / "same", "--classes", "a,b,c", "--profile", "mv-500hz")
    back = load(tmp_path / "same")
    assert (back.about["classes"], back.profile) == (names, Profile(500.0, 5.0, "mv"))


def test_leads_that_a_model_knows_travel_along(command, make_export, tmp_path):
    export = make_export(tmp_path / "ours", leads=["I", "II", "V2"])
    printed = command("export", export, tmp_path / "a.pt", "--format", "fairseq")
    assert "note: trained with leads I,II,V2 alone; mask all others" in printed
    command("import-fairseq", tmp_path / "a.pt", tmp_path / "back")
    assert load(tmp_path / "back").leads == ("I", "II", "V2")


def test_no_projection_is_the_identity(command, make_export, small_model_config, tmp_path, read, written):
    square = replace(small_model_config, stem_channels=32)
    export = make_export(tmp_path / "ours", square)
    with pytest.raises(InputError, match="the reference projects no features where the stem's channels are the width"):
        export_checkpoint(export, tmp_path / "a.pt")
    weights = load_file(export / "model.safetensors")
    weights["encoder.feature_projection.weight"] = torch.eye(32)
    weights["encoder.feature_projection.bias"] = torch.zeros(32)
    contents = Contents(square, codes=Codes(2, 6, 8))
    cfg = cfg_for(contents, Profile(500.0, 5.0, "mv"))
    assert cfg["model"]["conv_feature_layers"] == "[(32, 2, 2)] * 4"
    state = {"cfg": cfg, "model": to_theirs(weights, contents)}
    assert not any("post_extract_proj" in name for name in state["model"])
    command("import-fairseq", written(tmp_path / "a.pt", state), tmp_path / "export")
    same(load_file(tmp_path / "export" / "model.safetensors"), weights)
    command("export", tmp_path / "export", tmp_path / "b.pt", "--format", "fairseq")
    same(read(tmp_path / "b.pt")["model"], state["model"])


def test_parts_are_where_the_reference_has_them(pretrained, tmp_path):
    ours, theirs = load_file(tmp_path / "ours" / "model.safetensors"), pretrained["model"]
    q_k_v = [theirs[f"encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(q_k_v), ours["encoder.layers.1.query_key_value.weight"])
    assert torch.equal(theirs["mask_emb"], ours["encoder.mask.token"])
    assert theirs["quantizer.vars"].shape == (1, 12, 4)
    assert pretrained["cfg"]["model"]["_name"] == "wav2vec2_cmsc"
    assert pretrained["optimizer_history"][-1]["num_updates"] == 7


@pytest.mark.parametrize(
    ("preset", "codes", "parameters"),
    [
        ("base", Codes(2, 320, 256), 90_883_072),
        ("base", None, 90_374_016),
        ("base8", Codes(2, 320, 256), 62_531_584),
        ("large", Codes(2, 320, 256), 311_940_352),
    ],
)
def test_parameters_of_the_published_sizes(preset, codes, parameters):
    places = layout(Contents(PRESETS[preset], codes=codes))
    counts = {
        sum(math.prod(place.shape) for place in places),
        sum(len(place.theirs) * math.prod(place.their_shape) for place in places),
    }
    assert len(counts) == 1
    assert abs(counts.pop() - parameters) <= (PRESETS[preset].width if codes is None else 0)


def test_fine_tuned_files(command, fine_tuned, tmp_path, written, smooth_ecg):
    path = written(tmp_path / "a.pt", fine_tuned)
    assert "fine-tuned on 3 classes" in command("import-fairseq", path, tmp_path / "export", "--classes", "a,b,c")
    model = load(tmp_path / "export")
    assert model.about["classes"] == ["a", "b", "c"]
    ours = load(tmp_path / "tuned")
    signal_RLT = smooth_ecg(500, 5)[None]
    np.testing.assert_array_equal(model.logits(recordings(signal_RLT)), ours.logits(recordings(signal_RLT)))
    assert model.encoder.mask.token.std() > 0, "a new mask token, of which the file has none"


def test_identification_files(command, make_export, tmp_path, read):
    export = make_export(tmp_path / "ours", persons=5)
    said = command("export", export, tmp_path / "a.pt", "--format", "fairseq")
    assert "fine-tuned on 5 persons (ArcFace)" in said
    state = read(tmp_path / "a.pt")
    weight = load_file(export / "model.safetensors")["arcface.weight"]
    assert torch.equal(state["model"]["kernel"], weight)
    assert (state["cfg"]["model"]["_name"], state["cfg"]["model"]["num_labels"]) == ("arcface", 5)
    command("import-fairseq", tmp_path / "a.pt", tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["arcface.weight"], weight)
    assert load(tmp_path / "back").head is None


# --- the profile ---


@pytest.mark.parametrize(
    ("task", "arguments", "profile", "why"),
    [
        ({"normalize": False}, [], Profile(500.0, 5.0, "mv"), "mv-500hz, since cfg.task.normalize is false; the file"),
        ({"normalize": True}, [], Profile(500.0, 5.0, "zscore"), "zscore-500hz, since cfg.task.normalize is true"),
        ({"normalize": False, "sample_rate": 250}, [], Profile(250.0, 5.0, "mv"), "mv-250hz, since cfg.task.normalize"),
        (
            {"normalize": True},
            ["--profile", "mv-250hz"],
            Profile(250.0, 5.0, "mv"),
            "mv-250hz, as given, although cfg.task.normalize is true",
        ),
        ({}, ["--profile", "zscore-500hz"], Profile(500.0, 5.0, "zscore"), "zscore-500hz, as given"),
        (
            {"normalize": False, "filter": True, "sample_rate": 500.0},
            ["--profile", "mv-500hz"],
            Profile(500.0, 5.0, "mv"),
            "mv-500hz, as given, although cfg.task.filter True",
        ),
    ],
)
def test_profiles(command, pretrained, tmp_path, written, task, arguments, profile, why):
    pretrained["cfg"]["task"] = task
    path = written(tmp_path / "a.pt", pretrained)
    assert f"profile: {why}" in command("import-fairseq", path, tmp_path / "export", *arguments)
    assert load(tmp_path / "export").profile == profile


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ({}, [], "cfg.task.normalize does not say how signals were prepared; give --profile, one of mv-500hz, zscore"),
        ({"normalize": "${x}"}, [], "cfg.task.normalize does not say"),
        ({"normalize": True, "sample_rate": 100}, [], "cfg.task.sample_rate 100, which no profile is"),
        ({"normalize": False, "filter": True}, [], "cfg.task.filter True: ecgscale does not prepare signals so"),
        ({"normalize": False, "mean_path": "m.npy"}, [], "cfg.task.mean_path 'm.npy': ecgscale does not prepare"),
        ({"sample_rate": 500}, ["--profile", "mv-250hz"], "--profile mv-250hz: cfg.task.sample_rate is 500; give"),
        ({"normalize": False, "leads_to_load": "[0,12]"}, [], "cfg.task.leads_to_load '[0,12]': no list of numbers"),
        ({"normalize": False, "leads_to_load": "lead I"}, [], "cfg.task.leads_to_load 'lead I': no list of numbers"),
        ({"normalize": False, "leads_to_load": [1, 1]}, [], "lead II stands 2 times"),
        ({"normalize": False}, ["--profile", "mv"], "--profile 'mv' is unknown; known are mv-500hz, zscore-500hz, mv-"),
        ({"normalize": False}, ["--classes", "a"], "--classes names 1, but the checkpoint has no classification head"),
    ],
)
def test_profiles_that_are_not_clear(refusal, pretrained, tmp_path, written, task, arguments, said):
    pretrained["cfg"]["task"] = task
    assert said in refusal("import-fairseq", written(tmp_path / "a.pt", pretrained), tmp_path / "export", *arguments)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("leads", ["0,1,6", "[1, 0, 6]", [6, 0, 1]])
def test_leads_that_the_reference_read_are_those_of_the_export(command, pretrained, tmp_path, written, leads):
    pretrained["cfg"]["task"] = {"normalize": False, "leads_to_load": leads, "leads_bucket": "[0, 1]"}
    said = command("import-fairseq", written(tmp_path / "a.pt", pretrained), tmp_path / "export")
    assert load(tmp_path / "export").about["leads"] == ["I", "II", "V1"]
    assert "note: trained with leads I,II,V1 alone; it is used with these" in said
    assert "note: cfg.task.leads_bucket '[0, 1]': it was trained with some of these leads at a time" in said


def test_what_is_of_training_alone_is_said(command, pretrained, tmp_path, written):
    pretrained["cfg"]["model"] |= {"activation_dropout": 0.1, "encoder_layerdrop": 0.05, "dropout_features": 0.3}
    said = command("import-fairseq", written(tmp_path / "a.pt", pretrained), tmp_path / "export")
    assert "note: cfg.model.activation_dropout 0.1 is of the reference's training alone" in said
    assert "note: cfg.model.encoder_layerdrop 0.05" in said
    assert "note: one dropout stands for dropout_input 0.1 and dropout_features 0.3" in said


# --- what is refused ---


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("extractor_mode", "layer_norm", "cfg.model.extractor_mode 'layer_norm' is another network"),
        ("in_d", 8, "cfg.model.in_d 8 is another network"),
        ("quantize_input", True, "cfg.model.quantize_input True"),
        ("target_glu", True, "cfg.model.target_glu True"),
        ("same_quantizer", True, "cfg.model.same_quantizer True"),
        ("quantize_targets", False, "cfg.model.quantize_targets False"),
        ("latent_dim", 5, "cfg.model.latent_dim 5"),
        ("latent_groups", 3, "make no quantizer"),
        ("encoder_attention_heads", "two", "cfg.model.encoder_attention_heads 'two' is no int"),
        ("encoder_attention_heads", 5, "model.width 32 is no multiple of model.heads 5"),
        ("encoder_layers", 10**9, "cfg.model.encoder_layers 1000000000: there are but"),
        ("encoder_layers", 1, "left over encoder.layers.1."),
        ("encoder_layers", 3, "missing encoder.layers.2.self_attn.q_proj.weight"),
        ("encoder_embed_dim", 64, "shape of mask_emb (32,) where cfg.model gives (64,)"),
        ("conv_pos", 8, "shape of conv_pos.pos_conv.0."),
        ("conv_bias", True, "missing feature_extractor.conv_layers.0.0.bias"),
        ("conv_feature_layers", "[(16, 3, 2)] * 4", "the conv stem of ecgscale has 4 equal ones"),
        ("conv_feature_layers", "[(16, 2, 2)] * 3", "the conv stem of ecgscale has 4 equal ones"),
        ("conv_feature_layers", "[(16, 2, 2)] * 10**12", "no list such as '[(256, 2, 2)] * 4'"),
        ("conv_feature_layers", "__import__('os').system('true')", "no list such as"),
        ("conv_feature_layers", 4, "no list such as"),
    ],
)
def test_another_network_is_refused_by_name(refusal, pretrained, tmp_path, written, key, value, said):
    pretrained["cfg"]["model"][key] = value
    line = refusal("import-fairseq", written(tmp_path / "a.pt", pretrained), tmp_path / "export")
    assert line.startswith(f"ecgscale: {tmp_path / 'a.pt'}: ")
    assert said in line
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("key", ["encoder_attention_heads", "layer_norm_first"])
def test_what_no_tensor_tells_must_be_said(refusal, pretrained, tmp_path, written, key):
    del pretrained["cfg"]["model"][key]
    line = refusal("import-fairseq", written(tmp_path / "a.pt", pretrained), tmp_path / "export")
    assert f"cfg.model.{key} is missing, and the shape of the model depends on it" in line


@pytest.mark.parametrize(
    "text", ["[(16, 2, 2)] * 2 + [(16, 2, 2)] * 2", "[(16,2,2),(16,2,2),(16,2,2),(16,2,2)]", "4 * [(16, 2, 2)]"]
)
def test_lists_of_layers(pretrained, text):
    pretrained["cfg"]["model"]["conv_feature_layers"] = text
    assert contents_of(pretrained["cfg"], pretrained["model"]).model.stem_channels == 16


@pytest.mark.parametrize("junk", [None, -1, 0, 1.5, "x", "${x}", [], {}, True, 10**30, float("nan")], ids=repr)
def test_whatever_a_cfg_says_ends_in_one_line(pretrained, tmp_path, written, junk):
    for group in ("model", "task"):
        for key, right in list(pretrained["cfg"][group].items()):
            pretrained["cfg"][group][key] = junk
            with suppress(InputError):
                import_checkpoint(written(tmp_path / "a.pt", pretrained), tmp_path / "export")
            pretrained["cfg"][group][key] = right
    pretrained["cfg"] = {"model": junk, "task": junk}
    with pytest.raises(InputError):
        import_checkpoint(written(tmp_path / "a.pt", pretrained), tmp_path / "export")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


LARGE = torch.zeros(1 << 16)


def with_tensor(state: dict, tensor: torch.Tensor) -> dict:
    return state | {"model": state["model"] | {"mask_emb": tensor}}


def laughs() -> list:
    """A list that is small in a pickle and has 10^12 values."""
    many: list = ["ha"] * 10
    for _ in range(11):
        many = [many] * 10
    return many


def endless() -> list:
    one: list = []
    one.append(one)
    return one


def without(state: dict, name: str) -> dict:
    return state | {"model": {key: t for key, t in state["model"].items() if key != name}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s, _: {"model": {"conv1.weight": torch.zeros(2)}, "cfg": s["cfg"]}, "are those of another system"),
        (lambda s, _: s["model"], "while a checkpoint of fairseq-signals is a dict with cfg and model"),
        (lambda s, _: [1, 2], "is list, while a checkpoint of fairseq-signals is a dict"),
        (lambda s, _: s | {"cfg": None}, "has no cfg.model, which says the shape of the model"),
        (lambda s, _: s | {"cfg": None, "args": Namespace(encoder_layers=2)}, "argparse.Namespace (an old `args`)"),
        (lambda s, p: s | {"extra_state": Bomb(p / "exploded")}, "holds code ("),
        (lambda s, _: without(s, "layer_norm.bias"), "missing layer_norm.bias"),
        (lambda s, _: s | {"model": s["model"] | {"more.weight": torch.zeros(2)}}, "left over more.weight"),
        (lambda s, _: s | {"model": s["model"] | {"mask_emb": torch.zeros(3)}}, "shape of mask_emb (3,)"),
        (lambda s, _: s | {"model": s["model"] | {"mask_emb": 3}}, "model.mask_emb is no plain tensor but int"),
        (lambda s, _: s | {"model": s["model"] | {"mask_emb": torch.zeros(32).double()}}, "mask_emb is torch.float64"),
        (lambda s, _: s | {"model": s["model"] | {"mask_emb": torch.full((32,), torch.nan)}}, "holds NaN or infinity"),
        (lambda s, _: s | {"model": {}}, "its 0 tensors"),
        (lambda s, _: with_tensor(s, torch.zeros(1).expand(1 << 34)), "17179869184 elements, more than the file"),
        (lambda s, _: with_tensor(s, torch.zeros(8).as_strided((1 << 16, 1 << 16), (0, 0))), "more than the file"),
        (lambda s, _: with_tensor(s, torch.zeros(1 << 40, device="meta")), "more than the file"),
        (lambda s, _: s | {"model": s["model"] | dict.fromkeys(map(str, range(1000)), LARGE)}, "more than the file"),
        (lambda s, _: s | {"cfg": s["cfg"] | {"more": laughs()}}, "cfg has more than 100000 values"),
        (lambda s, _: s | {"cfg": s["cfg"] | {"more": endless()}}, "or more than 32 in one another"),
    ],
)
def test_other_content_is_refused(refusal, pretrained, tmp_path, written, change, said):
    path = written(tmp_path / "a.pt", change(pretrained, tmp_path))
    line = refusal("import-fairseq", path, tmp_path / "export")
    assert line.startswith(f"ecgscale: {path}: ")
    assert said in line
    assert not (tmp_path / "export").exists()
    assert not (tmp_path / "exploded").exists()


def test_all_that_does_not_fit_is_listed(refusal, pretrained, tmp_path, written):
    model = {name: t for name, t in pretrained["model"].items() if not name.endswith("fc1.bias")}
    model = OrderedDict(model | {f"new.{i}": torch.zeros(1) for i in range(9)})
    line = refusal("import-fairseq", written(tmp_path / "a.pt", pretrained | {"model": model}), tmp_path / "export")
    assert "missing encoder.layers.0.fc1.bias, missing encoder.layers.1.fc1.bias, left over new.0, " in line
    assert line.endswith(" and 6 more\n")


def test_damaged_and_absent_files(refusal, pretrained, tmp_path, written):
    whole = written(tmp_path / "a.pt", pretrained).read_bytes()
    for name, content in (("half.pt", whole[: len(whole) // 2]), ("empty.pt", b""), ("text.pt", b"weights\n" * 50)):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: damaged or no checkpoint" in refusal("import-fairseq", tmp_path / name, tmp_path / "export")
    assert "nowhere.pt: no such file" in refusal("import-fairseq", tmp_path / "nowhere.pt", tmp_path / "export")
    assert f"{tmp_path}: is a folder" in refusal("import-fairseq", tmp_path, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_flipped_bit_is_seen(refusal, pretrained, tmp_path, written):
    """PyTorch does not look at the checksums of its zip."""
    path = written(tmp_path / "a.pt", pretrained)
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda one: one.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 1000 + entry.file_size // 2] ^= 1
    path.write_bytes(content)
    line = refusal("import-fairseq", path, tmp_path / "export")
    assert f"a.pt: damaged, its entry {entry.filename} misses its checksum" in line
    assert not (tmp_path / "export").exists()


def test_nothing_else_is_overwritten(command, refusal, make_export, pretrained, tmp_path, written):
    export, theirs = make_export(tmp_path / "ours"), written(tmp_path / "theirs.pt", pretrained)
    before = theirs.read_bytes()
    assert "theirs.pt: exists and is no .pt file that" in refusal("export", export, theirs, "--format", "fairseq")
    assert theirs.read_bytes() == before
    (tmp_path / "folder").mkdir()
    assert "folder: exists and is no export" in refusal("import-fairseq", theirs, tmp_path / "folder")
    for _ in range(2):
        command("import-fairseq", theirs, tmp_path / "again")
        command("export", export, tmp_path / "again.pt", "--format", "fairseq")
    assert "give a file that ends in .pt" in refusal("export", export, tmp_path / "out", "--format", "fairseq")
    assert "there is no folder" in refusal("export", export, tmp_path / "no" / "out.pt", "--format", "fairseq")
    assert not list(tmp_path.glob("*partial*"))


def test_only_the_conv_stem_goes_to_fairseq(refusal, make_export, small_model_config, tmp_path):
    patches = make_export(tmp_path / "ours", ModelConfig(**vars(small_model_config) | {"stem": "patch"}))
    line = refusal("export", patches, tmp_path / "a.pt", "--format", "fairseq")
    assert "model.stem patch: the reference knows the conv stem alone" in line
    assert not (tmp_path / "a.pt").exists()


def test_what_the_reference_has_no_place_for(refusal, make_export, without_checksums, tmp_path):
    export = without_checksums(make_export(tmp_path / "ours"))
    tensors = load_file(export / "model.safetensors")
    save_file(tensors | {"head.bank": torch.zeros(2)}, export / "model.safetensors")
    line = refusal("export", export, tmp_path / "a.pt", "--format", "fairseq")
    assert "the reference has no place for head.bank" in line
