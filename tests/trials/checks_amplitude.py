"""Cases about amplitudes: units, missing samples, flat leads, leads that do not fit together."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
from case_check import Said, case, ecgscale

from ecgscale.data.shard_set import ShardSet
from ecgscale.export import Profile, about_model, write_export
from ecgscale.model.encoder import ECGEncoder, ModelConfig


def ingest(source: Path, out: Path, *options: object) -> Said:
    said = ecgscale("ingest", source, out, "--workers", 1, *options)
    assert said.code in (0, 2), said.text
    return said


def rejected(out: Path) -> dict[str, str]:
    """Record -> reason."""
    with (out / "rejected.csv").open(newline="") as file:
        return {row["record"]: row["reason"] for row in csv.DictReader(file)}


def remarked(out: Path) -> dict[str, str]:
    """Record -> all that is remarked about it, kinds and details."""
    remarks: dict[str, str] = {}
    with (out / "remarks.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            remarks[row["record"]] = f"{remarks.get(row['record'], '')} {row['remark']}: {row['details']}"
    return remarks


def peaks(folder: Path) -> dict[str, float]:
    """Record -> largest deviation from a lead's median in the file, as it stands there."""
    arrays = {path.stem: np.load(path).astype(np.float64) for path in folder.glob("*.npy")}
    return {name: float(np.abs(x_LT - np.median(x_LT, axis=-1, keepdims=True)).max()) for name, x_LT in arrays.items()}


@case("volts")
def volts(folder: Path, scratch: Path) -> str:
    npy = ingest(folder / "npy", scratch / "npy", "--source-rate-hz", 500, "--source-leads", "I,II")
    code = ingest(folder / "code", scratch / "code")
    for said in (npy, code):
        assert "are they volts?" in said.text, said.text
        assert "--unit V" in said.text, said.text
    options = ("--source-rate-hz", 500, "--source-leads", "I,II", "--unit", "V", "--restart")
    right = ingest(folder / "npy", scratch / "npy", *options)
    assert right.code == 0, right.text
    assert "volts" not in right.text, right.text
    n = len(list((folder / "npy").glob("*.npy")))
    assert f"{n} records in 1 shards, 0 rejected" in right.out, right.out
    return npy.err.strip() or npy.out.strip()


@case("mixed-units")
def mixed_units(folder: Path, scratch: Path) -> str:
    ingest(folder / "npy", scratch / "npy", "--source-rate-hz", 500, "--source-leads", "I,II")
    named = {*rejected(scratch / "npy"), *remarked(scratch / "npy")}
    wrong = {name for name, peak in peaks(folder / "npy").items() if peak > 50}
    assert named == wrong, (named, wrong)
    ingest(folder / "wfdb", scratch / "wfdb")
    named = {*rejected(scratch / "wfdb"), *remarked(scratch / "wfdb")}
    assert named == {path.stem for path in (folder / "wfdb").glob("*.hea")} - {"right"}, named
    tars = shutil.copytree(folder / "tars", scratch / "tars", copy_function=shutil.copyfile)
    tars.chmod(0o755)
    said = ecgscale("index", tars, "--workers", 1)
    assert said.code == 0, said.text
    assert "no ECG by their scale" in said.out, said.text
    return f"{sorted(wrong)} of the arrays, {sorted(named)} of the headers; {said.out.splitlines()[1]}"


@case("sentinel-values")
def sentinel_values(folder: Path, scratch: Path) -> str:
    ingest(folder / "npy", scratch / "npy", "--source-rate-hz", 500, "--source-leads", "I,II")
    reasons = rejected(scratch / "npy")
    assert reasons.keys() == {name for name, peak in peaks(folder / "npy").items() if peak > 1000}, reasons
    ingest(folder / "wfdb", scratch / "wfdb")
    reasons |= rejected(scratch / "wfdb")
    assert "f32" in reasons, reasons
    assert all("most likely a code for missing ones" in reason for reason in reasons.values()), reasons
    return f"rejected {sorted(reasons)}"


@case("flat-leads")
def flat_leads(folder: Path, scratch: Path) -> str:
    ingest(folder, scratch / "out")
    assert rejected(scratch / "out").keys() == {"zero", "seventeen"}, rejected(scratch / "out")
    remarks = remarked(scratch / "out")
    assert remarks.keys() == {"one_zero", "rail", "rail_half"}, remarks
    shards = ShardSet.open(scratch / "out")
    leads = {shards.record(i).name: len(shards.record(i).leads) for i in range(len(shards))}
    assert leads["fine"] == leads["one_zero"] + 1 == leads["rail"] + 1 == leads["rail_half"], leads
    return "; ".join(f"{name}:{remark}" for name, remark in remarks.items())


@case("lead-order")
def lead_order(folder: Path, scratch: Path) -> str:
    said = ingest(folder / "npy", scratch / "npy", "--source-rate-hz", 500)
    assert "is the order of the leads another? Then name them by --source-leads" in said.out, said.out
    order = "I,II,V1,V2,V3,V4,V5,V6,III,aVR,aVL,aVF"
    right = ingest(folder / "npy", scratch / "right", "--source-rate-hz", 500, "--source-leads", order)
    assert "do not hold" not in right.out, right.out
    said = ingest(folder / "wfdb", scratch / "wfdb")
    remarks = remarked(scratch / "wfdb")
    assert remarks.keys() == {"swapped"}, remarks
    assert "aVR = -(I + II)/2" in said.out, said.out
    return f"swapped:{remarks['swapped']}"


@case("embed-units")
def embed_units(folder: Path, scratch: Path) -> str:
    config = ModelConfig(preset="tiny", stem_channels=16, width=32, depth=2, ffn_width=64, heads=2, position_kernel=16)
    weights = {f"encoder.{name}": tensor for name, tensor in ECGEncoder(config).state_dict().items()}
    model = write_export(scratch / "model", weights, about_model(config, Profile(500.0, 5.0, "mv")))
    outcome = {}
    for path in sorted(folder.glob("*.npy")):
        out = scratch / f"{path.stem}.npz"
        outcome[path.stem] = ecgscale("embed", model, path, out, "--rate-hz", 500, "--leads", "I,II")
    assert outcome["mv"].code == 0, outcome["mv"].text
    for name, words in (
        ("uv", "--unit uV"),
        ("v", "--unit V"),
        ("counts", "give --mv-per-count"),
        ("zeros", "all samples are zero"),
    ):
        assert outcome[name].code == 2, outcome[name].text
        assert words in outcome[name].err, outcome[name].err
    expected = np.load(scratch / "mv.npz")["record_embedding"]
    for name, *options in (("uv", "--unit", "uV"), ("v", "--unit", "V"), ("counts", "--mv-per-count", 0.001)):
        out = scratch / f"{name}.npz"
        said = ecgscale("embed", model, folder / f"{name}.npy", out, "--rate-hz", 500, "--leads", "I,II", *options)
        assert said.code == 0, said.text
        difference = float(np.abs(np.load(out)["record_embedding"] - expected).max())
        assert difference < 0.02, (name, difference)
    return json.dumps({name: said.err.strip()[-60:] for name, said in outcome.items()})
