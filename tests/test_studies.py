"""Results of studies: what is written is JSON, and what earlier versions wrote is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ecgscale.errors import InputError
from ecgscale.files import parse_json, sealed
from ecgscale.studies import read_result, write_result

FOUND = {"12": {"auroc": {"value": float("nan"), "low": [0.5, float("inf")]}}}
FINITE = {"12": {"auroc": {"value": None, "low": [0.5, None]}}}


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", FOUND)
    assert parse_json((tmp_path / "result.json").read_bytes()).items() >= FINITE.items()
    assert read_result(tmp_path / "result.json") == FINITE


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    for tree in (sealed(FOUND | {"format": "ecgscale-result/1"}), FOUND):
        (tmp_path / "result.json").write_text(json.dumps(tree, indent=1))
        assert read_result(tmp_path / "result.json") == FINITE


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_damaged_results_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_result(tmp_path / "result.json")
    assert str(refused.value).startswith(f"{tmp_path / 'result.json'}: damaged, ")
    assert str(refused.value).endswith(f"; remove {tmp_path}")


def test_no_result_is_nothing(tmp_path: Path) -> None:
    assert read_result(tmp_path / "result.json") == {}
