"""The clock of steps: parts add up to the whole, collectives are taken out of what is around them."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from ecgscale.training.clock import PARTS, StepClock

CPU = torch.device("cpu")


@pytest.fixture
def clock() -> StepClock:
    return StepClock(CPU)


@pytest.fixture
def one_rank():
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    if dist.is_initialized():  # by a command that a test before has run in this process: DeepSpeed keeps hold of it
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parts_add_up_to_the_whole(clock) -> None:
    clock.take()
    began = time.perf_counter()
    for _ in range(3):
        time.sleep(0.01)
        with clock("forward"):
            time.sleep(0.03)
            with clock("communication"):
                time.sleep(0.02)
    whole = time.perf_counter() - began
    seconds, _ = clock.take()
    assert sum(seconds.values()) == pytest.approx(whole, abs=2e-3)
    assert seconds["forward"] >= 0.09
    assert seconds["communication"] >= 0.06
    assert seconds["other"] >= 0.03
    assert set(seconds) == set(PARTS)
    assert {part for part, spent in seconds.items() if not spent} == {
        "loader_wait",
        "transfer",
        "backward",
        "optimizer",
    }


def test_taking_begins_anew(clock) -> None:
    with clock("backward"):
        time.sleep(0.01)
    assert clock.take()[0]["backward"] >= 0.01
    assert clock.take()[0]["backward"] == 0.0


def test_a_part_that_goes_on_is_divided_where_it_was_asked(clock) -> None:
    with clock("forward"):
        time.sleep(0.01)
        first, _ = clock.take()
        time.sleep(0.01)
    second, _ = clock.take()
    assert first["forward"] >= 0.01
    assert second["forward"] >= 0.01


def test_what_is_paused_is_left_out_also_inside(clock) -> None:
    clock.take()
    began = time.perf_counter()
    with clock.pause():
        time.sleep(0.05)
    whole = time.perf_counter() - began
    assert sum(clock.take()[0].values()) < whole - 0.05 + 5e-3


def test_an_error_ends_its_part(clock) -> None:
    with pytest.raises(ZeroDivisionError), clock("forward"):
        raise ZeroDivisionError
    clock.take()
    time.sleep(0.01)
    seconds, _ = clock.take()
    assert seconds["forward"] == 0.0
    assert seconds["other"] >= 0.01


@pytest.mark.usefixtures("one_rank")
def test_collectives_are_counted_once_and_taken_out_of_the_part_around(clock) -> None:
    x, of_all = torch.ones(8), [None]
    with clock.timing_collectives():
        clock.take()
        with clock("backward"):
            dist.all_reduce(x)  # waits inside for its own end
            dist.broadcast(x, src=0, async_op=True).wait()
            dist.all_gather([torch.empty(8)], x)
        seconds, collectives = clock.take()
        assert collectives == 3
        assert seconds["communication"] > 0.0
        assert seconds["backward"] > 0.0
        dist.all_gather_object(of_all, "whole")  # two all-gathers: of the length and of the bytes
        assert clock.take()[1] == 2
        with clock.pause():
            dist.all_reduce(x)
        assert clock.take()[1] == 0


@pytest.mark.usefixtures("one_rank")
def test_collectives_are_left_alone_afterwards(clock) -> None:
    with clock.timing_collectives():
        pass
    dist.all_reduce(torch.ones(1))
    seconds, collectives = clock.take()
    assert (seconds["communication"], collectives) == (0.0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and ECGSCALE_GPU=1")
def test_a_gpu_is_timed_by_its_own_events_and_not_waited_for() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    clock = StepClock(device)
    clock.take()
    torch.cuda.set_sync_debug_mode("error")
    try:
        began = time.perf_counter()
        for _ in range(50):
            with clock("forward"):
                a @ a
            with clock("optimizer"):
                pass
        host_s = time.perf_counter() - began
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds, _ = clock.take()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - began, rel=0.2)
    assert seconds["forward"] > 0.9 * sum(seconds.values())
    assert host_s < 0.5 * seconds["forward"]
