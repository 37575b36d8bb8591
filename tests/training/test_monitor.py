"""What runs write down of their steps, on one rank and on two: real processes."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from ecgscale.config import PretrainConfig, load
from ecgscale.cost import encoder_flops, step_flops
from ecgscale.errors import InputError
from ecgscale.model.encoder import ECGEncoder
from ecgscale.training.clock import PARTS
from ecgscale.training.engine import EngineConfig
from ecgscale.training.metrics import Work, device_peak, throughput
from small_jobs import SMALL, events

PEAK_TFLOPS = 0.05
TRACE = "pt.trace.json.gz"
AMOUNTS = {"ecg": 8, "segments": 16, "tokens": 16 * 39}  # of a step: 2.5 s at 250 Hz are 39 tokens of 16 samples
COMMON = {f"throughput/{what}_per_s{each}" for what in AMOUNTS for each in ("", "_per_device")}
COMMON |= {"throughput/loader_wait_share", "throughput/tflops_per_device", "step/seconds", "step/collectives"}
COMMON |= {f"step/{part}_share" for part in PARTS} | {"memory/host_rss_gb", "memory/host_peak_gb"}
OF_SEVERAL = {f"straggler/{what}" for what in ("slowest_s", "median_s", "slowdown", "rank")}


@pytest.fixture(scope="module")
def runs(shards, jobs, tmp_path_factory) -> Path:
    """A run of one rank in two micro-steps and one of two ranks, for a peak that is given, and what they said."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, *more: str) -> list[str]:
        few = ["--train.steps=4", "--train.log_every=2", f"--engine.peak_tflops={PEAK_TFLOPS}"]
        return ["pretrain", *SMALL, *few, f"--data.shards={shards}", f"--run.dir={folder / name}", *more]

    jobs.run(1, job("one", "--train.contrast_batch=4"))
    said = jobs.run(2, job("two", "--train.profile_step=2", "--train.profile_steps=1"))
    (folder / "said").write_text(said)
    return folder


def logged(run: Path) -> list[dict]:
    return [event for event in events(run) if "train/loss" in event]


@pytest.mark.parametrize(("name", "others"), [("one", set()), ("two", OF_SEVERAL)])
def test_scalars_have_these_names(runs, name, others) -> None:
    for event in logged(runs / name):
        named = {key for key in event if key.startswith(("throughput/", "step/", "memory/", "straggler/"))}
        assert named == COMMON | others | {"throughput/mfu"}
    board = EventAccumulator(str(runs / name / "tensorboard"))
    board.Reload()
    assert COMMON | others <= set(board.Tags()["scalars"])
    assert [point.step for point in board.Scalars("step/forward_share")] == [2, 4]
    assert board.Scalars("throughput/mfu")[-1].value == pytest.approx(logged(runs / name)[-1]["throughput/mfu"])


@pytest.mark.parametrize(("name", "ranks"), [("one", 1), ("two", 2)])
def test_shares_add_up_and_rates_agree(runs, name, ranks) -> None:
    for event in logged(runs / name):
        shares = {part: event[f"step/{part}_share"] for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(shares[part] > 0 for part in PARTS if part != "communication")
        assert shares["forward"] > shares["transfer"]
        for what, amount in AMOUNTS.items():
            rate = event[f"throughput/{what}_per_s"]
            assert rate == pytest.approx(amount / event["step/seconds"])
            assert event[f"throughput/{what}_per_s_per_device"] == pytest.approx(rate / ranks)


@pytest.mark.parametrize(("name", "ranks", "contrast"), [("one", 1, 4), ("two", 2, 8)])
def test_mfu_is_model_flops_by_time_by_peak(runs, name, ranks, contrast) -> None:
    config = load(PretrainConfig, SMALL)
    rows, micro_steps = 2 * contrast // ranks, 8 // contrast
    flops = step_flops(config.model, config.objective, rows, samples=625, contrast_rows=2 * contrast)
    flops_per_step = micro_steps * flops
    for event in logged(runs / name):
        tflops = flops_per_step / event["step/seconds"] / 1e12
        assert event["throughput/tflops_per_device"] == pytest.approx(tflops)
        assert event["throughput/mfu"] == pytest.approx(tflops / PEAK_TFLOPS)


def test_a_frozen_stem_has_no_backward_pass(small_model_config, make_batch) -> None:
    encoder, batch = ECGEncoder(small_model_config), make_batch(torch.ones(2, 12, 640, dtype=torch.int16))
    counted, reckoned = [], []
    for learned in (True, False):
        encoder.stem.requires_grad_(learned)
        with FlopCounterMode(display=False) as counter:
            encoder(batch)[0].sum().backward()
        counted.append(counter.get_total_flops())
        reckoned.append(encoder_flops(encoder, rows=2, samples=640))
    assert reckoned[0] - reckoned[1] == counted[0] - counted[1] > 0


def test_no_mfu_where_the_peak_is_unknown() -> None:
    rates = throughput(Work(8, 16, 624, flops=3e12), steps=2, elapsed_s=4.0, world_size=1)
    assert rates["throughput/tflops_per_device"] == 1.5
    assert "throughput/mfu" not in rates
    assert device_peak(EngineConfig(), torch.device("cpu")) is None
    assert device_peak(EngineConfig(peak_tflops=2), torch.device("cpu")) == 2e12
    with pytest.raises(InputError, match="peak_tflops -1: give 0 or more"):
        EngineConfig(peak_tflops=-1)


def test_progress_line_says_mfu(runs) -> None:
    assert "ECG/s, MFU " in (runs / "said").read_text()


def test_collectives_are_timed_on_two_ranks_and_absent_on_one(runs) -> None:
    for event in logged(runs / "one"):
        assert (event["step/collectives"], event["step/communication_share"]) == (0.0, 0.0)
    for event in logged(runs / "two"):
        # The quantizer's and CMSC's gathers, forward and backward, the gradients and the wishes of ranks.
        assert event["step/collectives"] >= 6
        assert 0 < event["step/communication_share"] < 1


def test_each_rank_writes_a_trace_and_the_first_a_table(runs) -> None:
    names = sorted(path.name for path in (runs / "two" / "profile").iterdir())
    assert names == [f"rank-{n}.steps-2-2.{kind}" for n, kind in ((0, TRACE), (0, "txt"), (1, TRACE))]
    for name in (names[0], names[2]):
        with gzip.open(runs / "two" / "profile" / name) as file:
            named = {event["name"] for event in json.load(file)["traceEvents"]}
        assert {"ProfilerStep#2", "communication", "gloo:all_reduce"} <= named
        assert "ProfilerStep#3" not in named


SLOW = """
import sys, time
from pathlib import Path

import torch

from ecgscale import progress
from ecgscale.training.metrics import Work
from ecgscale.training.monitor import Monitor
from ecgscale.training.ranks import start_ranks

ranks = start_ranks()
monitor = Monitor(Path(sys.argv[1]), ranks, 0, 2, "slow", "", Work(recordings=4, segments=8, tokens=80))
for step in range(2):
    with monitor.clock("forward"):
        time.sleep(0.25 if ranks.rank == 1 else 0.05)
    with monitor.clock("backward"):
        torch.distributed.all_reduce(torch.ones(4))
        time.sleep(0.05)
    monitor.count()
monitor.log(2, [{"loss": torch.tensor(float(ranks.rank))}], {}, {"data/skipped": 1.0 + ranks.rank})
monitor.close()
progress.at(2, "")  # what a run says at its end, or its ranks do not leave together
"""


def test_a_rank_that_is_slow_is_named(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, str(tmp_path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    (event,) = events(tmp_path)
    assert event["straggler/rank"] == 1
    assert 0.3 <= event["straggler/slowest_s"] < event["step/seconds"] + 0.05
    assert event["straggler/median_s"] == pytest.approx(np.mean([0.1, 0.3]), abs=0.05)
    assert event["straggler/slowdown"] > 1.2
    assert event["step/communication_share"] > 0.15  # rank 0 waits 0.2 s of each step of 0.3 s
    assert (event["train/loss"], event["data/skipped"]) == (0.5, 3.0)
    assert "rank 1 is 1." in said[0]
    assert "times slower (forward)" in said[0]
