"""What a JSON says about amplitude agrees with the scale that the counts are read by, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.data.amplitude import check_amplitude
from ecgscale.data.amplitude_names import HEADS, meaning
from ecgscale.data.json_keys import squashed
from ecgscale.errors import InputError
from ecgscale.lead_names import LEADS

SCALE_L = (0.005,) * 12  # mV per count: 200 counts per mV
SCALES_L = tuple(0.001 * (1 + row) for row in range(12))
EDF = {"digital_max": 32767, "digital_min": -32768}
WFDB = {"adc_gain": [200.0] * 12, "baseline": [0] * 12, "adc_zero": [1024] * 12, "adc_res": [16] * 12}

OF_SCALE: list[tuple[Any, Any]] = [  # what agrees, what does not
    ({"signal": {"gain": 200}}, {"signal": {"gain": 1000}}),
    ({"signal": {"gain": 0.2, "units": "uV"}}, {"signal": {"gain": 200, "units": "uV"}}),
    ({"units": "uV", "signal": {"gain": 0.2}}, {"units": "uV", "signal": {"gain": 200}}),
    ({"signals": [{"gain": 200}] * 12}, {"signals": [{"gain": 200}] * 11 + [{"gain": 100}]}),
    ({"gain": {"I": 200, "V6": 200}}, {"gain": {"I": 200, "V6": 100}}),
    ({"gain": {"value": 0.2, "unit": "uV"}}, {"gain": {"value": 200, "unit": "uV"}}),
    ({"gain": {"in whatever form": [200]}}, {"gain": {"in whatever form": [100]}}),
    ({"channels": {"I": {"gain": 200}}}, {"channels": {"I": {"gain": 100}}}),
    ({"name": "I", "gain_II": 200}, {"name": "I", "gain_II": 100}),
    ({"h": [[{"gain": 200}]]}, {"h": [[{"gain": 100}]]}),
    ({"adcGain": 200}, {"ADC gain": 100}),
    ({"gain": "200/mV"}, {"gain": "1000 adu/mV"}),
    ({"gain": "10 mm/mV"}, {"gain": "100"}),
    ({"gain_uv": 5}, {"gain_uv": 200}),
    ({"scale": 5}, {"scale": 1}),
    ({"scale": {"uv": 5}}, {"scale": {"mv": 5}}),
    ({"resolution": 0.005}, {"resolution": 16}),
    ({"resolution": "high"}, {"resolution": "1 uV"}),
    ({"amplitude_resolution": 5000}, {"amplitude_resolution": 4.88}),
    ({"lsb": "5 µV"}, {"lsb": "1uV/LSB"}),
    ({"uv_per_count": 5}, {"uv_per_count": 1}),
    ({"uV/bit": 5}, {"uV/bit": 200}),
    ({"mvPerLsb": 0.005}, {"mvPerLsb": 200}),
    ({"nv_per_lsb": 5000}, {"nv_per_lsb": 5}),
    ({"counts_per_mv": 200}, {"counts_per_mv": 0.005}),
    ({"units_per_count": 5, "units": "uV"}, {"units_per_count": 5, "units": "mV"}),
    ({"AmplitudeUnits": "MICROVOLTS", "AmplitudeUnitsPerBit": 5}, {"AmplitudeUnitsPerBit": 4.88}),
    ({"rescale_slope": 5}, {"rescale_slope": 2}),
    ({"physical_max": 163.84, "physical_min": -163.84, **EDF}, {"physical_max": 10, "physical_min": -10, **EDF}),
    (
        {"dimension": "V", "phys_max": 0.16384, "phys_min": -0.16384, "dig_max": 32767, "dig_min": -32768},
        {"gain": -200},
    ),
    ({"units": ["mV"] * 12}, {"units": ["mV"] * 11 + ["uV"]}),
    ({"mv_per_count": 0.005, "units": "uV"}, {"mv_per_count": 0.005, "units": ["mV"] * 11 + ["uV"]}),
    ({"name": "I", "units": {"I": "mV", "II": "mV"}}, {"units": {"I": "mV", "II": "uV"}}),
    ({"h": {"units": "counts"}}, {"h": {"units": "counts", "gain": 200}}),
    ({"gain": 200, "h": {"units": "mV"}}, {"gain": 200, "h": {"units": "uV"}}),
    ({"gain": 0.2, "units": "uV", "h": {"unit": "uV"}}, {"gain": 0.2, "units": "uV", "h": {"unit": "mV"}}),
    ({"gain": 200, "r": {"value": 1300, "unit": "uV"}}, {"gain": 200, "r": {"amplitude_unit": "uV"}}),
    ({"gain": None, "scale": float("nan")}, {"scale": 10**400}),
    ({"gain": "NA"}, {"gain": 0}),
]


def refusal(fields: dict, scale_L: tuple[float, ...] = SCALE_L, label_keys: frozenset[str] = frozenset()) -> str:
    """Empty where it is none."""
    try:
        check_amplitude(fields, LEADS, scale_L, label_keys)
    except InputError as error:
        reason = str(error)
    else:
        return ""
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize(("right", "wrong"), OF_SCALE)
def test_a_scale_is_the_one_that_counts_are_read_by(right: dict, wrong: dict) -> None:
    assert refusal(right) == ""
    assert "write " in refusal(wrong)
    assert "mv_per_count" in refusal(wrong)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        *(({key: 3}, "0 mV is not the count 0") for key in ("offset", "offset_uv", "dcOffset", "intercept", "bias")),
        *(({key: 3}, "0 mV is not the count 0") for key in ("zero", "ADC Zero", "zero_level_mv", "rescale_intercept")),
        ({"a": [{"dc": {"offset": [0] * 11 + [3]}}]}, "a.dc.offset is [0, 0"),
        ({"offset": {"I": 0, "II": 3}}, "offset.II is 3"),
        ({"offset": "0.5 mV"}, "0 mV is not"),
        ({"baseline": "512"}, "0 mV is not"),
        ({"physical_max": 100.0, "physical_min": 0.0, **EDF}, "not the scale"),
        ({"physical_max": 327.68, "physical_min": 0.005, **EDF}, "0 mV is not"),
        *(({"polarity": value}, "upside down") for value in (-1, "-", "-1", "inverted", "odd", [1] * 11 + [-1])),
        *(({"h": {"inverted": value}}, "upside down") for value in (True, 1, "yes", ["aVR"], {"aVR": True})),
        *(({key: -1}, "upside down") for key in ("sign", "signal_sign")),
        *(({key: True}, "upside down") for key in ("flipped", "is_flipped", "flipped_leads", "upside_down")),
        *(({key: True}, "are no mV") for key in ("normalized", "isNormalised", "zscore", "z-score", "standardized")),
        *(({key: True}, "are no mV") for key in ("normalize", "Normalise")),
        *(({"normalization": word}, "are no mV") for word in ("zscore", "min-max")),
    ],
)
def test_what_the_counts_are_not_is_refused(said: dict, reason: str) -> None:
    assert reason in refusal(said)


@pytest.mark.parametrize(
    "said",
    [
        *({key: 0} for key in ("offset", "zero", "dc_offset", "adc_zero", "inverted", "normalized")),
        *({"polarity": value} for value in (1, "normal", "Positive", "+", "1", [1] * 12, "NA")),
        *({key: False} for key in ("inverted", "flipped", "zscore", "normalized")),
        *({"inverted": value} for value in ("no", [], None)),
        {"sign": "Wellens"},
        {"sign": 1},
        {"zscore": -1.3},
        {"normalization": "none"},
        {"baseline": "second visit"},
        {"baseline": {"age": 61, "weight": 80}},
        {"baseline_drift": " , I-V1", "static_noise": 1, "normal_ecg": True},
        {"offset": "2 weeks"},
        {"qrs": {"onset": 100, "offset": 180}, "qrs_offset": 180, "t_offset": 3},
        {"pain_scale": 7, "weight_unit": "kg", "weight_gain": 2, "image_resolution": 300, "unit": "ICU"},
        {"units": {"weight": "kg", "height": "cm"}},
        {"resolution": {"time_ms": 2, "amplitude_uv": 5}},
        {"resolution_bits": 16, "adc_resolution": 16, "adc": {"bits": 16, "resolution": 16, "zero": 0}},
        {"byte_offset": [24] * 12, "rows_per_lead": 1, "zero_count": 5},
        {"labels": {"inverted": True, "offset": 3, "gain": 7}},
        WFDB | {"units": ["mV"] * 12},
    ],
)
def test_what_says_nothing_of_amplitude_is_passed_over(said: dict) -> None:
    assert refusal(said) == ""


def test_what_the_user_calls_a_label_is_one() -> None:
    said = {"inverted": True, "scale": 7}
    assert refusal(said)
    assert refusal(said, label_keys=frozenset(said)) == ""


@pytest.mark.parametrize(
    ("gains", "reason"),
    [
        ([1 / scale for scale in SCALES_L], ""),
        ({lead: 1 / scale for lead, scale in zip(LEADS, SCALES_L, strict=True)}, ""),
        ([{"name": LEADS[row], "gain": 1 / SCALES_L[row]} for row in reversed(range(12))], ""),
        ([{"gain": 1 / scale} for scale in SCALES_L], ""),
        ([1 / scale for scale in reversed(SCALES_L)], "0.001 mV per count"),
        ([{"name": LEADS[row], "gain": 1000} for row in range(12)], "0.002 mV per count"),
    ],
)
def test_each_lead_has_its_scale(gains: Any, reason: str) -> None:
    key = "channels" if isinstance(gains, list) and isinstance(gains[0], dict) else "gain"
    told = refusal({key: gains}, SCALES_L)
    assert reason in told
    assert bool(reason) == bool(told)


@given(st.sampled_from(sorted(HEADS)), st.sampled_from(["adc", "ecg", "signal", "lead"]), st.sampled_from(" _-"))
def test_words_around_a_head_do_not_hide_it(head: str, word: str, between: str) -> None:
    for key in (f"{word}{between}{head}", f"{head}{between}{word}".upper(), word + head.title()):
        about = meaning(squashed(key))
        assert squashed(key) == "adcresolution" or (about is not None and about.topic == HEADS[head])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["mV", "5uV", "\n"])
KEYS = st.sampled_from([*HEADS, "I", "onset", "x", "name", *EDF, "physical_max", "physical_min", "gain\n"])
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)


@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    refusal({"x": value})
