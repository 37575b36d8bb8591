"""Are results of studies read as they were written, or not at all?"""

from __future__ import annotations

import json

import numpy as np
import pytest

from ecgscale.config import PretrainConfig
from ecgscale.errors import InputError
from ecgscale.files import parse_json, sealed
from ecgscale.studies import config_of, read_result, write_result

FOUND = {"12": {"auroc": {"value": 0.93125, "low": 0.9}}, "2": {"auroc": {"value": 0.5, "low": [float("nan"), 1]}}}
AS_JSON = FOUND | {"2": {"auroc": {"value": 0.5, "low": [None, 1]}}}  # which knows no NaN


def test_what_was_written_comes_back(tmp_path):
    write_result(tmp_path / "result.json", FOUND)
    assert parse_json((tmp_path / "result.json").read_bytes()).items() >= AS_JSON.items()
    assert read_result(tmp_path / "result.json") == AS_JSON
    assert read_result(tmp_path / "none.json") == {}


def test_results_of_earlier_versions_have_no_hash(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"data": "0" * 64}))
    assert read_result(tmp_path / "result.json") == {"data": "0" * 64}


def test_results_of_earlier_versions_may_hold_nan(tmp_path):
    for tree in (sealed(FOUND | {"format": "ecgscale-result/1"}), FOUND):
        (tmp_path / "result.json").write_text(json.dumps(tree, indent=1))
        assert read_result(tmp_path / "result.json") == AS_JSON


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_what_is_no_result_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_result(tmp_path / "result.json")
    assert str(refused.value).startswith(f"{tmp_path / 'result.json'}: damaged, ")
    assert str(refused.value).endswith(f"; remove {tmp_path}")


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


def test_the_config_of_a_run_takes_values_as_they_are(tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text("train: {steps: 5, seed: 1}\n")
    values = {"data.shards": ["one,two", "--three"], "train.seed": 2, "run.dir": "--folder"}
    config = config_of(PretrainConfig, str(file), ["train.seed=3", "--train.steps=7"], values, "methods, a")
    assert config.data.shards == ["one,two", "--three"]
    assert (config.train.steps, config.train.seed, config.run.dir) == (7, 2, "--folder")
    with pytest.raises(InputError, match=r"^methods, a: unknown key train.step; did you mean train.steps\?"):
        config_of(PretrainConfig, str(file), ["train.step=7"], values, "methods, a")
