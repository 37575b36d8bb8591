"""Does the command do what its help says, and end every mistake in one line?"""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from ecgscale import __version__
from ecgscale.cli import COMMANDS, main
from ecgscale.config import PretrainConfig
from ecgscale.config import load as load_config
from ecgscale.errors import InputError
from ecgscale.inference import load
from ecgscale.lead_names import LEADS

ARGUMENTS = {
    "ingest": "source out --layout --dataset --labels --label-columns --record-column --patient-key --ignore-leads"
    " --rename-leads --source-rate-hz --source-leads --unit --mv-per-count --rate-hz --records-per-shard --payload"
    " --validation-fraction --test-fraction --split-by --validation-values --test-values --workers --part --merge"
    " --restart --append",
    "simulate": "out --patients --records-per-patient --duration-s --noise --seed --rate-hz --records-per-shard"
    " --payload --part --merge",
    "index": "folder --dataset --rate-hz --leads --rename-leads --mv-per-count --patient-key --label-keys"
    " --label-columns --signal-ext --meta-ext --split-by --workers",
    "verify": "shards",
    "inspect": "folder --plot",
    "pretrain": "--config --data.shards --model.preset --objective.name --engine.zero_stage --train.steps --run.dir",
    "finetune": "--config --data.shards --init.model --task.label --task.protocol --train.steps --run.dir",
    "evaluate": "model --data.shards --split --leads --out",
    "export": "model out --format",
    "import-fairseq": "checkpoint out --profile --classes",
    "embed": "model input output --tokens --rate-hz --leads --ignore-leads --rename-leads --unit --mv-per-count",
    "bench": "stream",
    "reproduce": "--config --methods --protocols --lead_sets --seeds --run.dir --part --merge --dry-run",
    "scaling-law": "--config --sizes --tokens --learning_rate_factors --loss --predict --part --merge --dry-run",
    "plan": "--config --model.preset --cluster.device --cluster.nodes --length.epochs --out --json --measure --check",
}


@pytest.fixture
def command(capsys):
    """Runs the command line: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def ecg_LT(smooth_ecg):
    return smooth_ecg(500, 10)


@pytest.fixture
def write_record(smooth_ecg):
    """Writes a WFDB record in 16-bit counts of 1 µV; returns its path without suffix."""

    def write(folder: Path, name: str = "r", seed: int = 0, leads=LEADS, rate_hz: int = 500) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        counts_LT = np.rint(1000 * smooth_ecg(rate_hz, 10, seed)[: len(leads)]).astype("<i2")
        lines = [f"{name} {len(leads)} {rate_hz} {counts_LT.shape[1]}"]
        for lead, count_T in zip(leads, counts_LT, strict=True):
            checksum = int(count_T.sum(dtype=np.int64)) % 65536
            lines.append(f"{name}.dat 16 1000(0)/mV 16 0 {count_T[0]} {checksum} 0 {lead}")
        (folder / f"{name}.hea").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.dat").write_bytes(counts_LT.T.tobytes())
        return folder / name

    return write


# --- the command ---


def test_overview_names_every_subcommand(command):
    for arguments in ((), ("--help",), ("-h",)):
        code, out, err = command(*arguments)
        assert (code, err) == (0, "")
        for name, subcommand in COMMANDS.items():
            assert f"  {name} " in out
            assert subcommand.summary in out
    assert "--debug" in out
    assert command("--version") == (0, f"ecgscale {__version__}\n", "")


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_leave_their_cores_to_others(command, monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    command("--version")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_every_subcommand_is_listed_here():
    assert ARGUMENTS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_subcommand(command, name):
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: ecgscale {name} ")
    for argument in ARGUMENTS[name].split():
        assert any(line.split()[:1] == [argument] for line in out.splitlines()), argument


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrian"], "unknown command 'pretrian'; known are ingest, "),
        (["ingest", "a"], "ingest: the following arguments are required: out; see `ecgscale ingest --help`"),
        (["embed"], "model, input, output"),
        (["verify", "a", "b"], "verify: unexpected argument 'b'"),
        (["reproduce", "absent.yaml"], "absent.yaml: cannot read: No such file"),
        (["evaluate", "m"], "--data.shards"),
        (["evaluate", "m", "--data.shards", "a", "--split", "dev"], "'dev'"),
        (["simulate", "out", "--patients", "many"], "simulate: --patients 'many': give a whole number (int)"),
        (["simulate", "out", "--pati", "3"], "unknown option --pati; did you mean --part?"),
        (["pretrain", "--config", "absent.yaml"], "absent.yaml: "),
        (["pretrain", "--train.stpes", "3"], "unknown key train.stpes; did you mean train.steps?"),
        (["finetune", "--model.width", "3"], "unknown key model"),
        (["finetune", "--init"], "--init.model: a value is missing"),
        (["verify", "nowhere"], "nowhere is no data set"),
        (["inspect", "nowhere"], "nowhere is no data set (manifest.json), no export (config.json) and no run folder"),
        (["export", "nowhere", "out"], "nowhere: neither an export"),
        (["embed", "nowhere", "x.npy", "out.npz"], "nowhere: neither an export"),
        (
            ["embed", "nowhere", "x.hea", "out.npz", "--leads", "I"],
            "--leads goes with an .npy, not with WFDB records",
        ),
        (
            ["embed", "nowhere", "x.hea", "out.npz", "--unit", "V"],
            "x.hea: --unit goes with an .npy, not with WFDB",
        ),
        (
            ["embed", "nowhere", "x.npy", "out.npz", "--ignore-leads", "I"],
            "x.npy: --ignore-leads goes with WFDB",
        ),
        (["evaluate", "m", "--data.shards", "a", "--leads", "12,6"], "m: neither an export"),
    ],
)
def test_slips_end_in_one_line(refusal, arguments, said):
    assert said in refusal(*arguments)


@pytest.mark.parametrize("arguments", [["verify", "nowhere"], ["verify"], ["pretrian"]])
def test_debug_raises(arguments):
    with pytest.raises(InputError):
        main([*arguments, "--debug"])
    with pytest.raises(InputError):
        main(["--debug", *arguments])


def test_an_error_of_several_lines_becomes_one(refusal, monkeypatch):
    def fail(argv: list[str]) -> None:
        raise InputError("first\nsecond")

    monkeypatch.setitem(COMMANDS, "verify", fail)
    assert refusal("verify", "a") == "ecgscale: first second\n"


# --- values ---


def test_what_words_give_can_be_written_down_and_run(tmp_path, capsys):
    words = ["--patients=3", "--rate-hz=100", "--workers=1"]
    assert main(["simulate", str(tmp_path / "words" / "set"), *words]) == 0
    values = COMMANDS["simulate"].read([str(tmp_path / "values" / "set"), *words])
    assert values.keys() == {"out", "patients", "rate_hz", "workers"}, "defaults are left to the machine that runs it"
    COMMANDS["simulate"].run(json.loads(json.dumps(values)))
    written = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "set").iterdir()} for name in ("words", "values")
    ]
    assert written[0] == written[1]


def test_a_config_is_resolved_before_it_is_handed_on(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("train: {steps: 7}")
    values = COMMANDS["pretrain"].read(["--config", str(path), "--objective.name=cmsc"])
    path.unlink()
    config = load_config(PretrainConfig, ["--train.steps=7", "--objective.name=cmsc"])
    assert json.loads(json.dumps(values)) == json.loads(json.dumps(asdict(config)))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["reproduce", "--part", "2/3"], {"part": "2/3"}),
        (["reproduce", "--merge"], {"merge": True}),
        (["plan", "--json", "--out", "best.yaml"], {"json": True, "out": "best.yaml"}),
        (
            ["bench", "step", "--batch", "1", "2", "--model.dropout", "0"],
            {"batch": [1, 2], "keys": {"model.dropout": 0}},
        ),
        (["bench", "kernel", "--only", "stems"], {"part": "kernel", "only": ["stems"]}),
    ],
)
def test_options_and_keys_are_values_too(tmp_path, words, expected):
    method = {"name": "ours", "pretrain": "p.yaml"}
    task = {"name": "rhythm", "finetune": "f.yaml", "shards": ["a"]}
    (tmp_path / "all.yaml").write_text(json.dumps({"methods": [method], "tasks": [task]}))
    name, *rest = words
    values = COMMANDS[name].read([*rest, str(tmp_path / "all.yaml")] if name == "reproduce" else rest)
    assert values == json.loads(json.dumps(values))
    assert {key: values[key] for key in expected} == expected


def test_a_study_does_a_part_or_merges(refusal, tmp_path):
    assert "--part, --merge and --dry-run: give one of them" in refusal("reproduce", "--merge", "--dry-run")
    assert "--part '3/2': give 1/N to N/N" in refusal("reproduce", "x.yaml", "--part", "3/2")


# --- embed ---


def test_embed_a_record(command, small_export, write_record, ecg_LT, tmp_path):
    path = write_record(tmp_path / "ecgs")
    code, out, _ = command("embed", small_export, path, tmp_path / "one.npz")
    assert (code, out) == (0, f"{tmp_path / 'one.npz'}: 1 recordings, width 32\n")
    found = dict(np.load(tmp_path / "one.npz", allow_pickle=False))
    assert found.keys() == {"record_embedding", "name"}
    assert found["name"].tolist() == ["r"]
    millivolts = np.rint(1000 * ecg_LT) / 1000
    expected = load(small_export).embed(millivolts, 500, LEADS).record_embedding
    np.testing.assert_allclose(found["record_embedding"], expected, rtol=0, atol=1e-4)
    assert command("embed", small_export, path.with_suffix(".hea"), tmp_path / "two.npz")[0] == 0
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_embed_a_folder_of_different_records(command, small_export, write_record, tmp_path):
    write_record(tmp_path / "ecgs" / "b", "z", seed=2, leads=LEADS[:3])
    write_record(tmp_path / "ecgs" / "a", "y", seed=1, rate_hz=250)
    write_record(tmp_path / "ecgs", "x", leads=(*LEADS[:2], "vx"))
    code, out, _ = command("embed", small_export, tmp_path / "ecgs", tmp_path / "out.npz", "--tokens")
    assert code == 0
    assert "2 recordings" in out
    assert "1 could not be read" in out
    assert "x.hea" in out
    assert "'vx'" in out
    found = np.load(tmp_path / "out.npz", allow_pickle=False)
    assert found["name"].tolist() == ["a/y", "b/z"]
    assert [reason.split(": ")[0] for reason in found["rejected"].tolist()] == [str(tmp_path / "ecgs" / "x.hea")]
    given = ("embed", small_export, tmp_path / "ecgs", tmp_path / "out.npz", "--tokens", "--ignore-leads", "vx")
    assert command(*given)[0] == 0
    found = dict(np.load(tmp_path / "out.npz", allow_pickle=False))
    assert found["name"].tolist() == ["a/y", "b/z", "x"]
    assert found["record_embedding"].shape == (3, 32)
    assert found["tokens"].shape == (3, 312, 32)
    np.testing.assert_allclose(found["tokens"].mean(axis=1), found["record_embedding"], rtol=0, atol=1e-5)


def test_embed_an_npy(command, small_export, ecg_LT, tmp_path):
    np.save(tmp_path / "two.npy", ecg_LT)
    np.save(tmp_path / "three.npy", np.stack([ecg_LT[1::-1], ecg_LT[1::-1] / 2]))
    out, model = tmp_path / "out.npz", load(small_export)
    assert command("embed", small_export, tmp_path / "two.npy", out, "--rate-hz", 500)[0] == 0
    found = np.load(out, allow_pickle=False)
    assert found["name"].tolist() == ["two[0]"]
    np.testing.assert_array_equal(found["record_embedding"], model.embed(ecg_LT, 500, LEADS).record_embedding)
    given = ("embed", small_export, tmp_path / "three.npy", out, "--rate-hz", 500, "--leads", "II,I")
    assert command(*given)[0] == 0
    found = np.load(out, allow_pickle=False)
    assert found["name"].tolist() == ["three[0]", "three[1]"]
    renamed = (*given[:-1], "D2,I", "--rename-leads", "d2=II")
    assert command(*renamed)[0] == 0
    np.testing.assert_array_equal(np.load(out, allow_pickle=False)["record_embedding"], found["record_embedding"])
    np.save(tmp_path / "counts.npy", np.rint(200 * ecg_LT).astype(np.int16))
    assert (
        command("embed", small_export, tmp_path / "counts.npy", out, "--rate-hz", 500, "--mv-per-count", 0.005)[0] == 0
    )
    counted = np.load(out, allow_pickle=False)["record_embedding"]
    np.testing.assert_allclose(counted, model.embed(ecg_LT, 500, LEADS).record_embedding, rtol=0, atol=0.05)
    first = model.embed(ecg_LT[:2], 500, ("I", "II")).record_embedding[0]
    np.testing.assert_allclose(found["record_embedding"][0], first, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("array", "options", "said"),
    [
        (np.zeros((12, 500)), [], "says no sample rate; give --rate-hz"),
        (np.zeros((12, 500)), ["--rate-hz", "0"], "sampling rate 0 Hz"),
        (np.zeros((12, 500)), ["--rate-hz", "fast"], "--rate-hz 'fast': give a number (float)"),
        (np.zeros((3, 500)), ["--rate-hz", "500"], "of shape (3, 500); give --leads"),
        (np.zeros(500), ["--rate-hz", "500"], "of shape (500,); give --leads"),
        (np.zeros((3, 500)), ["--rate-hz", "500", "--leads", "I,II"], "shape (1, 3, 500)"),
        (np.zeros((2, 500)), ["--rate-hz", "500", "--leads", "I,X"], "unknown lead 'X'"),
        (np.zeros((2, 500)), ["--rate-hz", "500", "--leads", "I,D2"], "--rename-leads='D2=II' reads it as a lead"),
        (np.zeros((12, 500)), ["--rate-hz", "500", "--rename-leads", "D2=II"], "is about names in --leads; give both"),
        (np.zeros((2, 500)), ["--rate-hz", "500", "--leads", "I,I"], "lead I stands 2 times"),
        (np.full((12, 500), np.nan), ["--rate-hz", "500"], "NaN"),
        (np.eye(12, 5), ["--rate-hz", "500"], "5 samples"),
        (np.zeros((12, 500)), ["--rate-hz", "500"], "all samples are zero"),
        (np.zeros((12, 500), np.int16), ["--rate-hz", "500"], "integers (int16) say no unit; give --mv-per-count"),
        (np.eye(12, 500, dtype=np.int32), ["--rate-hz", "500", "--mv-per-count", "-1"], "mv_per_count -1"),
        (1e-3 * np.eye(12, 500), ["--rate-hz", "500"], "are they volts? Then give --unit V"),
        (1e3 * np.eye(12, 500), ["--rate-hz", "500", "--unit", "V"], "an ECG stays within"),
        (np.full((12, 500), "x"), ["--rate-hz", "500"], "type <U1"),
    ],
)
def test_embed_names_what_is_wrong_with_an_npy(refusal, small_export, tmp_path, array, options, said):
    path, out = tmp_path / "ecg.npy", tmp_path / "out.npz"
    np.save(path, array)
    line = refusal("embed", small_export, path, out, *options)
    assert said in line
    assert str(path) in line or "--rate-hz " in line
    assert not out.exists()


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def npy_with(tmp_path: Path, kind: str) -> bytes:
    whole = tmp_path / "whole.npy"
    np.save(whole, np.zeros((12, 500)))
    content = whole.read_bytes()
    if kind == "pickled objects":
        np.save(whole, np.array([Bomb(tmp_path / "exploded")], object), allow_pickle=True)
        return whole.read_bytes()
    return {
        "a pickle": pickle.dumps(Bomb(tmp_path / "exploded")),
        "nothing": b"",
        "half of it": content[: len(content) // 2],
        "a lie about its size": content.replace(b"(12, 500), }" + b" " * 9, b"(12, 500000000000), }"),
        "a zip": b"PK\x03\x04" + bytes(60),
        "text": b"0.1,0.2\n",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["pickled objects", "a pickle", "nothing", "half of it", "a lie about its size", "a zip", "text"]
)
def test_embed_refuses_an_npy_that_holds(refusal, small_export, tmp_path, kind):
    path = tmp_path / "ecg.npy"
    path.write_bytes(npy_with(tmp_path, kind))
    line = refusal("embed", small_export, path, tmp_path / "out.npz", "--rate-hz", 500)
    assert f"{path}: not a readable .npy of numbers" in line
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out.npz").exists()


def test_embed_names_files_that_are_not_there(refusal, small_export, write_record, tmp_path):
    path = write_record(tmp_path / "ecgs")
    (tmp_path / "empty").mkdir()
    for source, said in (("absent", "absent"), ("absent.npy", "absent.npy"), ("empty", "empty")):
        assert said in refusal("embed", small_export, tmp_path / source, tmp_path / "out.npz", "--rate-hz", 500)
    assert "out.txt: the output is an .npz file" in refusal("embed", small_export, path, tmp_path / "out.txt")
    nowhere = tmp_path / "nowhere" / "out.npz"
    assert f"{nowhere}: cannot write" in refusal("embed", small_export, path, nowhere)
    path.with_suffix(".dat").write_bytes(b"\0" * 24)
    assert f"{path}.hea" in refusal("embed", small_export, path, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


# --- data sets ---


def test_simulate_verify_inspect_and_plot(command, refusal, tmp_path):
    shards = tmp_path / "shards"
    given = ("simulate", shards, "--patients", 8, "--duration-s", 5, "--rate-hz", 250, "--workers", 1)
    code, out, _ = command(*given, "--records-per-shard", 10)
    assert (code, out) == (0, f"{shards}: 16 records in 2 shards, 0 rejected\n")
    assert f"{shards}: holds a data set already" in refusal(*given)
    assert command("verify", shards)[:2] == (0, f"{shards}: 16 records in 2 shards, all checksums right\n")
    code, out, _ = command("inspect", shards)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["records"].startswith("16 in 2 shards")
    assert lines["patients"] == "8"
    assert lines["rate"] == "250 Hz"
    assert lines["leads"] == ", ".join(f"{lead} 16" for lead in LEADS)
    assert lines["hours"] == f"{16 * 5 / 3600:.2f}; recordings of 5 to 5 s"
    assert command("inspect", shards, "--plot", 15, tmp_path / "r.png")[0] == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    for number in ("16", "-1", "first"):
        assert "--plot" in refusal("inspect", shards, "--plot", number, "r.png")
    tar = sorted(shards.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    assert str(tar) in refusal("verify", shards)
