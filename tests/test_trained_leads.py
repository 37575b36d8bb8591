"""Does a model that knows some leads alone see no others, wherever it is used, and is that said?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.errors import InputError
from ecgscale.export import amend_export
from ecgscale.inference import load
from ecgscale.inspection import summarise_model
from ecgscale.lead_names import LEADS
from ecgscale.simulate import Simulation

THREE = ("I", "II", "V2")
SAID = "the model was trained with I,II,V2 alone"


@pytest.fixture
def of_three(small_export) -> Path:
    amend_export(small_export, leads=list(THREE))
    return small_export


def test_other_leads_are_masked_and_that_is_said(of_three, smooth_ecg, caplog):
    model, signal_LT = load(of_three), smooth_ecg(500, 5)
    expected = model.embed(signal_LT[[0, 1, 7]], 500, THREE).record_embedding
    assert not [line for line in caplog.messages if "masked" in line]
    np.testing.assert_array_equal(model.embed(signal_LT, 500, LEADS).record_embedding, expected)
    assert caplog.messages[-1:] == [f"leads III,aVR,aVL,aVF,V1,V3,V4,V5,V6 are masked, as in training: {SAID}"]
    with pytest.raises(InputError, match=f"none of its leads V5,V6 is left: {SAID}"):
        model.embed(signal_LT[10:], 500, LEADS[10:])
    assert f"leads       {', '.join(THREE)}; any subset" in summarise_model(of_three)


def test_files_and_data_sets_too(of_three, smooth_ecg, tmp_path, caplog):
    np.save(tmp_path / "ecg.npy", smooth_ecg(500, 5))
    ingest(Simulation(patients=2, rate_hz=500, duration_s=5), tmp_path / "set", IngestOptions(rate_hz=500))
    out, model = tmp_path / "out.npz", load(of_three)
    for source, options in ((tmp_path / "ecg.npy", ["--rate-hz", "500"]), (tmp_path / "set", [])):
        assert main(["embed", str(of_three), str(source), str(out), *options]) == 0
        assert f"masked, as in training: {SAID}" in caplog.text
        caplog.clear()
    simulation = Simulation(patients=2, rate_hz=500, duration_s=5)
    found = np.load(out)
    for name, embedding_D in zip(found["name"].tolist(), found["record_embedding"], strict=True):
        record = simulation.read(name)
        expected = model.embed(record.millivolts()[[0, 1, 7]], 500, THREE).record_embedding[0]
        np.testing.assert_allclose(embedding_D, expected, rtol=0, atol=1e-5)


def test_records_without_any_of_them_are_named(of_three, tmp_path, capsys):
    class Chest(Simulation):
        def read(self, item):
            record = super().read(item)
            return replace(record, signal_LT=record.signal_LT[9:], scale_L=record.scale_L[9:], leads=LEADS[9:])

    ingest(Chest(patients=2, rate_hz=500, duration_s=5), tmp_path / "set", IngestOptions(rate_hz=500))
    assert main(["embed", str(of_three), str(tmp_path / "set"), str(tmp_path / "out.npz")]) == 2
    assert f"none of its leads V4,V5,V6 is left: {SAID}" in capsys.readouterr().err
