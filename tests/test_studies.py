"""Are results of studies read as they were written, or not at all?"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ecgscale.errors import InputError
from ecgscale.studies import read_result, write_result

FOUND = {"12": {"auroc": {"value": 0.93125, "low": 0.9}}, "2": {"auroc": {"value": 0.5, "low": float("nan")}}}


def test_what_was_written_comes_back(tmp_path):
    write_result(tmp_path / "result.json", FOUND)
    found = read_result(tmp_path / "result.json")
    assert math.isnan(found["2"]["auroc"].pop("low"))
    assert found == FOUND | {"2": {"auroc": {"value": 0.5}}}
    assert read_result(tmp_path / "none.json") == {}


def test_results_of_earlier_versions_have_no_hash(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"data": "0" * 64}))
    assert read_result(tmp_path / "result.json") == {"data": "0" * 64}


def test_no_flipped_bit_is_believed(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, {"12": {"auroc": 0.93}})
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for at in range(len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << rng.integers(8)
        if not whole[at : at + 1].isspace():  # of which one is as good as another
            path.write_bytes(flipped)
            with pytest.raises(InputError, match=r"result\.json: damaged"):
                read_result(path)
