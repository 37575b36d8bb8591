"""What follows a step, case by case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgscale.training.boundary import Wish
from ecgscale.training.following import Actions, Standing, after
from ecgscale.training.train_config import TrainConfig

TRAIN = TrainConfig(steps=12, log_every=2, validate_every=4, checkpoint_every=3)

# step, wish: what follows
CASES = {
    (1, Wish.GO_ON): "",
    (2, Wish.GO_ON): "log",
    (3, Wish.GO_ON): "save",
    (4, Wish.GO_ON): "log validate",
    (6, Wish.GO_ON): "log save",
    (12, Wish.GO_ON): "log validate save",
    (1, Wish.SAVE): "save",
    (4, Wish.SAVE): "log validate save",
    (12, Wish.SAVE): "log validate save",
    (1, Wish.STOP): "save stop",
    (2, Wish.STOP): "log save stop",
    (3, Wish.STOP): "save stop",
    (4, Wish.STOP): "log save validation_due stop",
    (12, Wish.STOP): "log save validation_due stop",
}


@pytest.mark.parametrize(("step", "wish"), CASES)
def test_what_follows_a_step(step, wish) -> None:
    actions = after(step, wish, TRAIN)
    assert " ".join(name for name in Actions._fields if getattr(actions, name)) == CASES[step, wish]


def test_without_a_rhythm_the_last_step_alone_is_validated() -> None:
    train = TrainConfig(steps=5, validate_every=0, checkpoint_every=100, log_every=100)
    followed = [after(step, Wish.GO_ON, train) for step in range(1, 6)]
    assert [any(actions) for actions in followed] == [False] * 4 + [True]
    assert followed[-1] == Actions(log=True, validate=True, save=True, validation_due=False, stop=False)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(Wish), st.integers(0, 9), st.integers(1, 9))
def test_what_is_done_is_saved_before_a_run_ends(step, steps, wish, validate_every, checkpoint_every) -> None:
    train = TrainConfig(steps=steps, validate_every=validate_every, checkpoint_every=checkpoint_every)
    actions = after(min(step, steps), wish, train)
    assert actions.stop == (wish is Wish.STOP)
    if actions.stop or step >= steps:
        assert actions.save
    assert not (actions.validate and actions.validation_due)
    assert (actions.validate or actions.validation_due) == after(min(step, steps), Wish.GO_ON, train).validate


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    standing = Standing()
    for updated in (True, False, False, True, False):
        standing = standing.stepped(updated)
    assert standing == Standing(step=5, skipped=3, skipped_in_a_row=1)
    assert (standing.updates, standing.proven) == (2, 3)
    assert Standing(3, 3, 3).proven == 0


def test_a_validation_that_was_due_is_not_due_after_the_next_step() -> None:
    before = Standing.of({"step": 4, "skipped": 1, "skipped_in_a_row": 0, "validation_due": True})
    assert before == Standing(4, 1, 0, validation_due=True)
    assert before.stepped(True) == Standing(5, 1)
    assert Standing.of({"step": 4, "skipped": 0, "skipped_in_a_row": 0}) == Standing(4), "of an earlier version"
