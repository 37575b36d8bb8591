"""Rates of this machine, and the table that holds predictions against it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ecgscale.cost import Costs, costs_of
from ecgscale.dry_run import PARTS
from ecgscale.errors import InputError
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import objective_config
from ecgscale.plan import check, command, measure
from ecgscale.plan.config import ClusterConfig, PlanConfig
from ecgscale.plan.memory import Parallel
from ecgscale.plan.speed import READ_S, Rates, micro_step, update_s
from ecgscale.plan.trial import Times
from ecgscale.training.engine import EngineConfig
from ecgscale.training.loop import TrainConfig

ONE, MANY = Parallel(0, 1, "fp32", "cpu"), Parallel(1, 2048, "bf16", "cuda")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "WIDTHS", (64, 128))
    monkeypatch.setattr(measure, "_LEAST_S", 0.0)


def test_rates_are_measured(quick):
    rates = measure.measure_rates(PRESETS["tiny"], objective_config(), EngineConfig(), samples=320, rows=2)
    assert set(rates.products_flops_per_s) == {64, 128}
    assert min(rates.products_flops_per_s.values()) > 0
    assert set(PARTS) <= set(rates.seconds_per_byte)
    assert rates.update_s_per_parameter > 0
    assert micro_step(Costs(PRESETS["tiny"], objective_config(), 320), ONE, rates, 2).total > 0


def test_rows_are_enough_when_a_row_takes_no_less():
    def launched(rows: int) -> float:
        return max(6e-3, rows * 1e-4)  # a GPU that is kept waiting by its host

    def filled(rows: int) -> float:
        if rows > 32:
            raise torch.OutOfMemoryError
        return launched(rows)

    assert measure.enough_rows(launched, 8) == 64
    assert measure.enough_rows(filled, 8) == 32
    assert measure.enough_rows(lambda rows: rows * 1e-4, 8) == 8


def test_what_is_short_is_done_often_between_two_looks_at_the_clock(monkeypatch):
    done, looked = [], []
    monkeypatch.setattr(measure, "now_s", lambda _: looked.append(0) or len(done) * 1e-5)
    assert measure._seconds(lambda: done.append(0), torch.device("cpu")) == pytest.approx(1e-5)
    assert len(looked) < len(done) / 100


def test_what_a_step_takes_beyond_its_products_is_found_again():
    model = replace(PRESETS["tiny"], depth=1, pre_norm=True)
    seconds = {"stem": 3.0, "position": 2.0, "layers": 5.0, "rest": 7.0}
    costs = Costs(model, objective_config(), 2500)
    rates = measure.rates_of(costs, "cpu", "fp32", 8, {64: 1e15}, seconds)
    parts = micro_step(costs, ONE, rates, 8).parts
    rest = parts["rest"] + parts["loss"]
    assert [parts["stem"], parts["position"], parts["layers"], rest] == pytest.approx([3, 2, 5, 7], rel=1e-3)


@pytest.mark.parametrize("given_gb", [0.0, 64.0])
def test_a_cpu_has_its_memory_without_the_reserve(monkeypatch, given_gb):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "measure_rates", lambda *_: Rates("", {64: 1e12}, {}, 0.0))
    whole = given_gb * 1e9 or command.psutil.virtual_memory().total
    config = PlanConfig(cluster=ClusterConfig(memory_gb=given_gb, reserve_gb=0.5))
    assert command.this_machine(config).memory_bytes == pytest.approx(whole - 0.5e9)


@pytest.mark.parametrize(
    ("stage", "precision", "device"), [(0, "bf16", "cuda"), (1, "bf16", "cuda"), (0, "fp32", "cuda")]
)
def test_only_stage_0_in_bf16_reads_each_parameter_back(stage, precision, device):
    sizes, free = Costs(PRESETS["base"], objective_config(), 2500).sizes, Rates("", {64: 1e12}, {}, 0.0)
    read = len(sizes) * READ_S if stage == 0 and precision == "bf16" else 0.0
    assert update_s(sizes, Parallel(stage, 8, precision, device), free) == pytest.approx(read)
    assert update_s(sizes, Parallel(stage, 8, precision, "cpu"), free) == 0


@pytest.fixture
def no_gpu(monkeypatch):
    """And rates without measuring any."""
    rates = Rates("", {64: 1e12}, dict.fromkeys(PARTS, 1e-12), 1e-12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure, "measure_rates", lambda *_: rates)


def test_what_a_cpu_cannot_hold_is_not_offered_to_gpus(no_gpu):
    small = ClusterConfig(memory_gb=6.0, reserve_gb=3.0)  # eight machines could share what it lacks
    config = PlanConfig(model=PRESETS["large"], train=TrainConfig(global_batch=64), cluster=small)
    with pytest.raises(InputError, match=r"segments per CPU does not fit: .*; nothing .*or more memory$"):
        command.run(config, None, as_json=False, measure=True)


def test_a_cpu_is_no_gpu(no_gpu):
    config = PlanConfig(model=PRESETS["tiny"], train=TrainConfig(global_batch=8))
    page = command.run(config, None, as_json=False, measure=True)
    assert "CPU-hours" in page
    assert not re.search(r"GPU|kWh| W |of a machine", page)
    assert "kWh" in command.run(replace(config, cluster=ClusterConfig(watts=100)), None, as_json=False, measure=True)


def test_an_unknown_gpu_is_refused_before_it_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H900", total_memory=80e9))
    monkeypatch.setattr(measure, "measure_rates", lambda *_: pytest.fail("measured"))
    with pytest.raises(InputError, match="'H900' is in no table"):
        command.this_machine(PlanConfig())


def test_contrast_is_in_fp32_and_everything_that_is_kept_costs_time():
    costs, parallel = Costs(replace(PRESETS["base"], pre_norm=True), objective_config(name="cmsc"), 2500), MANY
    rates = Rates.of_device("x", 1000e12, 0.5, 1e12, 0.0, True, fp32_slower=15.0)
    parts = micro_step(costs, parallel, rates, 8).parts
    kept = costs.kept("cuda", "bf16", 8, ranks=2048)
    products_s = 3 * 2 * 8192**2 * costs.model.width / 500e12
    assert parts["loss"] == pytest.approx(15 * products_s + 6 * kept.parts["loss"] / 1e12)
    free = Rates.of_device("x", 1e30, 0.5, 1e12, 0.0, True)
    bytes_s = sum(micro_step(costs, parallel, free, 8).parts.values())
    assert bytes_s == pytest.approx(6 * kept.total / 1e12)


def test_a_gpu_is_checked_against_what_is_predicted_for_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "MEMORY_CASES", check.MEMORY_CASES[1:2])
    monkeypatch.setattr(check, "TIME_CASES", check.TIME_CASES[:1])
    monkeypatch.setattr(check, "peak_bytes", lambda _trial, _threads, device: asked.append(device) or {"update": 1})
    monkeypatch.setattr(check, "timed", lambda _: Times(1.0, 1.0))
    monkeypatch.setattr(check, "measure_rates", lambda *_: Rates("", {64: 1e12}, dict.fromkeys(PARTS, 1e-9), 0.0))
    monkeypatch.setattr(check, "ROUNDS", 2)
    memory, time = check.check_all()[1]
    assert asked == ["cuda"]
    assert memory.predicted == (check.predicted_memory(check.MEMORY_CASES[0], "cuda").peak,)
    assert memory.predicted != (check.predicted_memory(check.MEMORY_CASES[0]).peak,)
    one = check.TIME_CASES[0]
    cpu = micro_step(costs_of(one.model, one.objective, one.samples), ONE, check.measure_rates(), one.rows)
    assert len(time.predicted) == len(time.measured) == 2
    assert max(time.predicted) < cpu.total  # less is kept


def test_what_is_checked_as_text_and_for_programs():
    rates = Rates("of a test", {64: 1e12}, {"stem": 1e-9}, 0.0)
    found = [
        check.Checked("peak bytes", "tiny", 1, "fp32", 32, (335e6,), (340e6,)),
        check.Checked("step seconds", "tiny", 0, "fp32", 16, (0.22, 0.44, 0.16), (0.2, 0.2, 0.4)),
    ]
    page = check.text(rates, found)
    assert page.splitlines()[1].split() == ["peak", "MB", "tiny", "1", "fp32", "32", "335.0", "340.0", "-1.5%"]
    begin, rounds = page.splitlines()[2].split("+10.0%")
    assert begin.split() == ["step", "ms", "tiny", "0", "fp32", "16", "220.0", "200.0"]
    assert rounds.strip() == "-60.0% to +120.0%"
    assert page.endswith("Times by rates of a test.")
    read = json.loads(json.dumps(check.tree(rates, found)))
    assert read["rates"]["products_flops_per_s"] == {"64": 1e12}
    assert [case["off"] for case in read["cases"]] == pytest.approx([-5 / 340, 0.1])
