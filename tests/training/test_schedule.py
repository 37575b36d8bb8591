"""Learning rates at the points that matter, and between them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgscale.config import PretrainConfig, load
from ecgscale.errors import InputError
from ecgscale.training.schedule import SCHEDULES, learning_rate_factor

STEPS, WARMUP, FINAL = 1000, 100, 0.01


def factor(step: int, schedule: str) -> float:
    return learning_rate_factor(step, STEPS, schedule, WARMUP, FINAL)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_a_line_from_the_first_step(schedule):
    assert factor(0, schedule) == 0.01, "the first step learns already"
    assert factor(49, schedule) == 0.5
    assert factor(99, schedule) == 1
    assert factor(100, schedule) == 1


@pytest.mark.parametrize(
    ("schedule", "middle", "end"),
    [
        ("constant", 1.0, 1.0),
        ("linear", (1 + FINAL) / 2, FINAL),
        ("cosine", (1 + FINAL) / 2, FINAL),
    ],
)
def test_middle_and_end(schedule, middle, end):
    assert factor(WARMUP + (STEPS - WARMUP) // 2, schedule) == pytest.approx(middle)
    assert factor(STEPS, schedule) == pytest.approx(end)
    assert factor(10 * STEPS, schedule) == pytest.approx(end), "and stays there"


def test_cosine_is_flat_at_both_ends():
    quarter = factor(WARMUP + (STEPS - WARMUP) // 4, "cosine")
    assert quarter == pytest.approx(FINAL + (1 - FINAL) * (1 + math.cos(math.pi / 4)) / 2)
    assert quarter > factor(WARMUP + (STEPS - WARMUP) // 4, "linear")
    assert factor(WARMUP + 3 * (STEPS - WARMUP) // 4, "cosine") < factor(WARMUP + 3 * (STEPS - WARMUP) // 4, "linear")


def test_tri_stage_holds_for_a_fifth_and_falls_by_equal_ratios():
    assert [factor(step, "tri_stage") for step in (100, 200, 300)] == [1, 1, 1]
    assert factor(301, "tri_stage") < 1
    assert factor(650, "tri_stage") == pytest.approx(math.sqrt(FINAL))
    assert factor(1000, "tri_stage") == pytest.approx(FINAL)
    ratios = [factor(step + 1, "tri_stage") / factor(step, "tri_stage") for step in (300, 500, 900)]
    assert ratios == pytest.approx([FINAL ** (1 / 700)] * 3)


def test_a_long_warm_up_leaves_no_plateau():
    factors = [learning_rate_factor(step, 100, "tri_stage", 50, FINAL) for step in (49, 50, 51, 100)]
    assert factors[:2] == [1, 1]
    assert factors[2] < 1
    assert factors[3] == pytest.approx(FINAL)


def test_final_zero_ends_at_zero_or_next_to_it():
    assert learning_rate_factor(10, 10, "linear", 0, 0.0) == 0
    assert learning_rate_factor(10, 10, "cosine", 0, 0.0) == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(10, 10, "tri_stage", 0, 0.0) == pytest.approx(1e-8), "a ratio never reaches zero"


@settings(max_examples=100)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    final=st.floats(0, 1),
)
def test_rises_in_warm_up_never_rises_after_it_and_stays_in_range(schedule, steps, warmup, final):
    factors = [learning_rate_factor(step, steps, schedule, warmup, final) for step in range(steps)]
    rising, falling = factors[:warmup], factors[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert all(0 < value <= 1 for value in rising)
    assert all(min(final, 1e-8) - 1e-12 <= value <= 1 for value in falling)
    if falling:
        assert falling[0] == 1


def test_a_schedule_of_ones_own_counts_from_the_first_step() -> None:
    given = ["--train.schedule=own_parts:steps_down", "--train.steps=100", "--train.warmup_steps=4"]
    train = load(PretrainConfig, given).train
    assert [train.learning_rate_factor(step) for step in (0, 3, 4, 49, 50, 99)] == [0.25, 1, 1, 1, 0.1, 0.1]
    assert train.learning_rate_factor(50, steps=200) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cosin", "train.schedule 'cosin' is unknown; did you mean 'cosine'?"),
        ("own_parts:step_down", "own_parts has no function step_down; did you mean own_parts:steps_down?"),
        ("own_parts:QUEUE", "own_parts has no function QUEUE"),
        ("nowhere:at_all", "train.schedule 'nowhere:at_all': cannot import nowhere"),
        ("own_parts:rises_below_zero", "own_parts:rises_below_zero: gives -1 at step 0; give 0 or more"),
        ("math:sqrt", "train.schedule math:sqrt: fails at step 0 ("),
        ("", "train.schedule '' is unknown; known are constant, linear"),
    ],
)
def test_a_schedule_that_is_none_is_refused_at_once(name, message) -> None:
    with pytest.raises(InputError) as refused:
        load(PretrainConfig, ["--train.schedule", name])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
