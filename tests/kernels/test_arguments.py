"""What the ops refuse, and who decides what runs."""

from __future__ import annotations

import re

import pytest
import torch

from ecgscale_kernels import LeadDraw, backend, dispatch, forced, lead_masked_conv_stem, lead_masked_patch_embed

SIGNAL = "(2, 3, 50)"


def draw(**fields) -> LeadDraw:
    return LeadDraw(0, 4, 0.5, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))._replace(**fields)


def z(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


INT64 = torch.int64
AWAY_B = z(2, dtype=INT64, device="meta")
# What is wrong, and what the message says: the argument, its shape, and what it is held against.
BOTH = [
    ({"signal_BLT": z(3, 50)}, ["signal_BLT", "(3, 50)"]),
    ({"signal_BLT": z(2, 3, 50, dtype=torch.int32)}, ["signal_BLT", SIGNAL, "int32", "int16 or float16"]),
    ({"signal_BLT": z(2, 3, 100)[..., ::2]}, ["signal_BLT", SIGNAL, "strides (300, 100, 2)", ".contiguous()"]),
    ({"signal_BLT": z(2, 0, 50)}, ["signal_BLT", "(2, 0, 50)", "one lead"]),
    ({"gain_BL": z(2, 4)}, ["gain_BL", "(2, 4)", "(2, 3)", SIGNAL]),
    ({"offset_BL": z(3, 3)}, ["offset_BL", "(3, 3)", "(2, 3)", SIGNAL]),
    ({"gain_BL": z(2, 3, dtype=torch.int16)}, ["gain_BL", "(2, 3)", "int16"]),
    ({"offset_BL": z(2, 3, dtype=torch.int16)}, ["offset_BL", "(2, 3)", "int16"]),
    ({"gain_BL": z(2, 3, device="meta")}, ["gain_BL", "(2, 3)", SIGNAL, "on meta", "on cpu"]),
    ({"offset_BL": z(2, 3, device="meta")}, ["offset_BL", "(2, 3)", SIGNAL, "on meta", "on cpu"]),
    ({"lead_draw": draw(probability=1.5)}, ["lead_draw.probability", "1.5", "between 0 and 1"]),
    ({"lead_draw": draw(probability=-0.1)}, ["lead_draw.probability", "-0.1", "between 0 and 1"]),
    ({"lead_draw": draw(probability=float("nan"))}, ["lead_draw.probability", "nan", "between 0 and 1"]),
    ({"lead_draw": draw(segment_B=z(3, dtype=INT64))}, ["lead_draw.segment_B", "(3,)", "(2,)", SIGNAL]),
    ({"lead_draw": draw(position_B=z(2, 1, dtype=INT64))}, ["lead_draw.position_B", "(2, 1)", "(2,)", SIGNAL]),
    ({"lead_draw": draw(segment_B=z(2))}, ["lead_draw.segment_B", "(2,)", "float32", "int64"]),
    ({"lead_draw": draw(position_B=z(2, dtype=torch.int32))}, ["lead_draw.position_B", "(2,)", "int32", "int64"]),
    ({"lead_draw": draw(segment_B=AWAY_B)}, ["lead_draw.segment_B", "(2,)", SIGNAL, "on meta", "on cpu"]),
    ({"lead_draw": draw(position_B=AWAY_B)}, ["lead_draw.position_B", "(2,)", SIGNAL, "on meta", "on cpu"]),
]
PATCH = [
    ({"weight_DLP": z(9, 4, 7)}, ["weight_DLP", "(9, 4, 7)", "(width, 3,", SIGNAL]),
    ({"weight_DLP": z(9, 21)}, ["weight_DLP", "(9, 21)", "(width, 3,", SIGNAL]),
    ({"weight_DLP": z(0, 3, 7)}, ["weight_DLP", "(0, 3, 7)", "without zeros", SIGNAL]),
    ({"weight_DLP": z(9, 3, 0)}, ["weight_DLP", "(9, 3, 0)", "without zeros", SIGNAL]),
    ({"weight_DLP": z(9, 3, 51)}, ["weight_DLP", "(9, 3, 51)", "51 samples is longer", SIGNAL]),
    ({"weight_DLP": z(9, 3, 7, dtype=torch.int16)}, ["weight_DLP", "(9, 3, 7)", "int16"]),
    ({"weight_DLP": z(9, 3, 7, device="meta")}, ["weight_DLP", "(9, 3, 7)", SIGNAL, "on meta", "on cpu"]),
    ({"bias_D": z(8)}, ["bias_D", "(8,)", "(9,)", "weight_DLP (9, 3, 7)", SIGNAL]),
    ({"lead_LD": z(9, 3)}, ["lead_LD", "(9, 3)", "(3, 9)", "weight_DLP (9, 3, 7)", SIGNAL]),
    ({"position_ND": z(8, 9)}, ["position_ND", "(8, 9)", "(7, 9)", "weight_DLP (9, 3, 7)", SIGNAL]),
    ({"mask_token_D": z(1)}, ["mask_token_D", "(1,)", "(9,)", "weight_DLP (9, 3, 7)", SIGNAL]),
    ({"masked_BN": z(2, 8, dtype=torch.bool)}, ["masked_BN", "(2, 8)", "(2, 7)", "weight_DLP (9, 3, 7)", SIGNAL]),
    ({"masked_BN": z(2, 7)}, ["masked_BN", "(2, 7)", "float32", "bool"]),
    ({"bias_D": z(9, dtype=torch.float16)}, ["bias_D", "(9,)", "float16", "float32"]),
    ({"lead_LD": z(3, 9, dtype=torch.float64)}, ["lead_LD", "(3, 9)", "float64", "float32"]),
    ({"position_ND": z(7, 9, device="meta")}, ["position_ND", "(7, 9)", SIGNAL, "on meta", "on cpu"]),
    ({"masked_BN": None}, ["masked_BN", "mask_token_D", "both or neither"]),
    ({"mask_token_D": None}, ["masked_BN", "mask_token_D", "both or neither"]),
]
WEIGHTS = [z(6, 3, 2), z(5, 6, 2), z(7, 5, 2)]
STEM = [
    ({"weights": [], "biases": []}, ["0 weights", "0 biases"]),
    ({"biases": [None, None]}, ["3 weights", "2 biases"]),
    ({"signal_BLT": z(2, 3, 7)}, ["signal_BLT", "(2, 3, 7)", "3 blocks", "8 samples"]),
    ({"weights": [z(6, 4, 2), *WEIGHTS[1:]]}, ["weights[0]", "(6, 4, 2)", "(channels, 3, 2)", SIGNAL]),
    ({"weights": [*WEIGHTS[:2], z(7, 6, 2)]}, ["weights[2]", "(7, 6, 2)", "(channels, 5, 2)", SIGNAL]),
    ({"weights": [*WEIGHTS[:2], z(7, 5, 3)]}, ["weights[2]", "(7, 5, 3)", "(channels, 5, 2)", SIGNAL]),
    ({"weights": [*WEIGHTS[:2], z(7, 10)]}, ["weights[2]", "(7, 10)", "(channels, 5, 2)", SIGNAL]),
    ({"weights": [*WEIGHTS[:2], z(0, 5, 2)]}, ["weights[2]", "(0, 5, 2)", "(channels, 5, 2)", SIGNAL]),
    ({"weights": [*WEIGHTS[:2], z(7, 5, 2, dtype=torch.float16)]}, ["weights[2]", "(7, 5, 2)", "float16", "float32"]),
    ({"weights": [one.short() for one in WEIGHTS]}, ["weights[0]", "(6, 3, 2)", "int16"]),
    ({"weights": [*WEIGHTS[:2], z(7, 5, 2, device="meta")]}, ["weights[2]", "(7, 5, 2)", SIGNAL, "on meta", "on cpu"]),
    ({"biases": [None, z(6), None]}, ["biases[1]", "(6,)", "(5,)", "weights[1] (5, 6, 2)"]),
    ({"biases": [None, z(5, dtype=torch.float16), None]}, ["biases[1]", "(5,)", "float16", "float32"]),
    ({"biases": [None, z(5, device="meta"), None]}, ["biases[1]", "(5,)", SIGNAL, "on meta", "on cpu"]),
    ({"norm_weight_C": z(5)}, ["norm_weight_C", "(5,)", "(6,)", "weights[0] (6, 3, 2)"]),
    ({"norm_bias_C": z(7)}, ["norm_bias_C", "(7,)", "(6,)", "weights[0] (6, 3, 2)"]),
    ({"norm_bias_C": z(6, dtype=torch.float64)}, ["norm_bias_C", "(6,)", "float64", "float32"]),
    ({"norm_weight_C": z(6, device="meta")}, ["norm_weight_C", "(6,)", SIGNAL, "on meta", "on cpu"]),
]


@pytest.mark.parametrize(
    ("op", "wrong", "said"),
    [(op, *one) for op, many in (("patch", BOTH + PATCH), ("stem", BOTH + STEM)) for one in many],
    ids=lambda value: value if isinstance(value, str) else value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_in_one_line(op, wrong, said) -> None:
    arguments = {"signal_BLT": z(2, 3, 50, dtype=torch.int16), "gain_BL": z(2, 3), "offset_BL": z(2, 3)}
    if op == "patch":
        arguments |= {"weight_DLP": z(9, 3, 7), "mask_token_D": z(9), "masked_BN": z(2, 7, dtype=torch.bool)}
        run = lead_masked_patch_embed
    else:
        arguments |= {"weights": WEIGHTS, "biases": [None] * 3, "norm_weight_C": z(6), "norm_bias_C": z(6)}
        run = lead_masked_conv_stem
    assert len(run(**arguments | {"lead_draw": draw()})) == 2, "nothing is wrong but what is put in"
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (every part of the message is looked at)
        run(**arguments | wrong)
    message = str(refused.value)
    assert "\n" not in message
    missing = [part for part in said if part not in message]
    assert not missing, message


# --- what runs ---


def test_a_cpu_runs_plain_pytorch_unless_told_otherwise(monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert backend("cpu") == "reference"
    assert backend("cuda") == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert backend("cpu") == backend("cuda") == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend("cpu") == backend("cuda") == "triton"
    with forced("reference"):
        assert backend("cuda") == "reference"
        with forced("triton"):
            assert backend("cpu") == "triton"
    assert backend("cuda") == "triton"


def test_what_cannot_run_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "nonsense")
    with pytest.raises(ValueError, match=r"^ECGSCALE_KERNELS=nonsense: give reference or triton, or leave it unset$"):
        backend("cpu")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^ECGSCALE_KERNELS=triton: cpu tensors need TRITON_INTERPRET=1; or"):
        lead_masked_patch_embed(z(2, 3, 50), z(2, 3), z(2, 3), z(9, 3, 7))
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("ECGSCALE_KERNELS=triton: Triton is not installed; pip install")):
        backend("cuda")
    monkeypatch.delenv(dispatch.VARIABLE)
    assert backend("cuda") == "reference"
