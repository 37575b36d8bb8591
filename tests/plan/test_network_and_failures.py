"""Communication against closed forms, and failures against a simulation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from ecgscale.cost import Costs
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import objective_config
from ecgscale.plan.failures import daly_interval_s, effective_share, simulated_share, young_interval_s
from ecgscale.plan.memory import Parallel
from ecgscale.plan.network import Network, collective_s, collectives_of, communication_s

WITHIN = Network(1, 8, 1e-6, 100e9, 0.0, 1.0)
GLOBAL = Costs(PRESETS["base"], objective_config(name="cmsc"), 2500)
LOCAL, BOTH = (Costs(PRESETS["base"], objective_config(name=name), 2500) for name in ("wav2vec2", "wav2vec2+cmsc"))


def volume(stage: int, accumulation: int = 1, ranks: int = 8) -> dict[tuple[str, str], int]:
    parallel = Parallel(stage, ranks, "bf16", "cuda", accumulation=accumulation)
    return {(one.kind, one.what): one.bytes for one in collectives_of(GLOBAL, parallel, 16)}


def test_a_ring_within_a_machine():
    size = 8e9
    part_s = 1e-6 + size / 8 / 100e9
    assert collective_s("all-gather", size, WITHIN) == pytest.approx(7 * part_s)
    assert collective_s("all-reduce", size, WITHIN) == pytest.approx(14 * part_s)


def test_large_tensors_between_machines_are_bound_by_the_adapters_and_small_ones_by_latency():
    network = Network(64, 8, 0.0, 1e15, 10e-6, 50e9)
    assert collective_s("all-reduce", 50e9, network) == pytest.approx(2 * 63 / 64, rel=0.01)
    assert collective_s("all-reduce", 8, network) == pytest.approx(2 * 6 * 10e-6, rel=0.01)  # a tree of 6 levels


def test_one_rank_sends_nothing():
    assert collectives_of(GLOBAL, Parallel(1, 1, "bf16", "cuda"), 128) == []
    assert communication_s([], Network(1, 1, 1e-6, 1e9, 1e-6, 1e9)) == 0


def test_volume_of_each_stage():
    n = sum(GLOBAL.sizes)
    assert volume(0)["all-reduce", "gradients"] == 2 * n
    assert ("all-gather", "weights") not in volume(0)
    assert volume(1)["all-gather", "weights"] == 2 * n
    assert volume(1, accumulation=4)["all-reduce", "gradients"] == 2 * n
    assert volume(2, accumulation=4)["all-reduce", "gradients"] == 4 * 2 * n
    third = volume(3)
    assert third["reduce-scatter", "gradients"] == 2 * n
    assert third["all-gather", "weights"] + third["all-gather", "small weights"] == 2 * n


def test_what_the_objective_sends():
    parallel = Parallel(0, 8, "bf16", "cuda")
    local, alone, both = (
        [(one.kind, one.bytes) for one in collectives_of(costs, parallel, 16) if one.what == "objective"]
        for costs in (LOCAL, GLOBAL, BOTH)
    )
    codes, embeddings = 4 * 2 * 320, 128 * 4 * 768
    assert sorted(local) == [("all-reduce", 4), *[("all-reduce", codes)] * 3]
    assert ("all-gather", embeddings) in alone
    assert ("all-reduce", embeddings) in alone, "their gradients"
    assert sorted(both) == sorted(local + alone)


def test_two_ranks_send_what_is_predicted():
    ways = [(0, 1), (1, 2), (2, 2), (3, 2)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(Path(__file__).parent / "sent_bytes.py"), json.dumps(ways)]
    environment = os.environ | {"MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, timeout=120, check=True).stdout
    costs = Costs(replace(PRESETS["tiny"], depth=2), objective_config(), 320)
    for (stage, accumulation), line in zip(ways, said.splitlines(), strict=True):
        sent = json.loads(line)
        parallel = Parallel(stage, 2, "fp32", "cpu", whole_below=1000, accumulation=accumulation)
        predicted = Counter()
        for one in collectives_of(costs, parallel, 4):
            predicted[one.kind] += one.bytes
        assert sent["all_reduce"] - predicted["all-reduce"] in range(0, 17)  # and a norm of the gradient
        assert sent["all_gather"] + sent.get("all_gather_into_tensor", 0) == predicted["all-gather"]
        assert sent.get("reduce_scatter_tensor", 0) == predicted["reduce-scatter"]


def test_a_ring_sends_what_its_ranks_lack():
    gradients = collectives_of(GLOBAL, Parallel(0, 8, "bf16", "cuda"), 16)[0]
    assert gradients.sent(8) == pytest.approx(2 * gradients.bytes * 7 / 8)


def test_young_and_daly_agree_where_failures_are_rare():
    assert young_interval_s(60, 1e6) == sqrt(2 * 60 * 1e6)
    assert daly_interval_s(60, 1e9) == pytest.approx(young_interval_s(60, 1e9), rel=1e-3)
    assert daly_interval_s(60, 20) == 20


@pytest.mark.parametrize("between_s", [2_000.0, 20_000.0])
def test_dalys_interval_is_the_best(between_s):
    best = daly_interval_s(60, between_s)
    shares = [effective_share(factor * best, 60, 300, between_s) for factor in (0.5, 0.8, 1.0, 1.25, 2.0)]
    assert max(shares) == shares[2]


@pytest.mark.parametrize(("between_s", "restart_s"), [(1_500.0, 300.0), (10_000.0, 600.0), (100_000.0, 60.0)])
def test_the_formula_agrees_with_drawn_failures(between_s, restart_s):
    interval = daly_interval_s(45, between_s)
    formula = effective_share(interval, 45, restart_s, between_s)
    drawn = [simulated_share(interval, 45, restart_s, between_s, 30_000, seed) for seed in range(3)]
    assert sum(drawn) / 3 == pytest.approx(formula, rel=0.01)
    assert 1 - sum(drawn) / 3 == pytest.approx(1 - formula, rel=0.03), "of what is lost too"
    assert drawn[0] == simulated_share(interval, 45, restart_s, between_s, 30_000, seed=0)


def test_a_run_that_never_reaches_its_next_checkpoint_keeps_nothing():
    assert effective_share(1e6, 60, 300, 100) == 0
    assert simulated_share(100, 60, 1800, 88, 3_000, seed=0) == 0
    drawn = simulated_share(100, 60, 300, 88, 300_000, seed=0)
    assert effective_share(100, 60, 300, 88) == pytest.approx(drawn, rel=0.1)
