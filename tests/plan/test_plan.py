"""`ecgscale plan` as people and programs see it."""

from __future__ import annotations

import json

import pytest
import yaml

from ecgscale import config
from ecgscale.cli import main
from ecgscale.config import PretrainConfig
from ecgscale.cost import Costs, step_flops
from ecgscale.model.presets import PRESETS
from ecgscale.objectives import objective_config
from ecgscale.plan.failures import effective_share
from ecgscale.plan.memory import Parallel
from ecgscale.plan.speed import Rates, micro_step, update_s

BASE = ["plan", "--config", "configs/pretrain/base.yaml", "--length.recordings", "94525"]
LARGE_ON_SMALL = [
    "plan", "--model.preset", "gigantic", "--engine.precision", "bf16", "--cluster.device", "RTX 3090",
    "--train.global_batch", "512",
]  # fmt: skip
UNKNOWN = ["plan", "--cluster.device", "H900"]
ALL_RATES = [
    "--cluster.memory_gb=80", "--cluster.peak_tflops=1000", "--cluster.memory_gb_per_s=3000",
    "--cluster.link_gb_per_s=400", "--cluster.watts=700",
]  # fmt: skip


@pytest.fixture
def planned(capsys, monkeypatch, request):
    """What `ecgscale plan … --json` says."""
    monkeypatch.chdir(request.config.rootpath)

    def run(*arguments: object) -> dict:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_plan_adds_up(planned):
    plan = planned(*BASE, "--cluster.nodes", 2)
    way, length = plan["recommended"], plan["length"]
    assert plan["parameters"] == 90_883_072
    assert plan["storage"]["checkpoint_bytes"] == 12 * 90_883_072
    assert length["epochs"] == pytest.approx(200, rel=0.01)
    assert plan["gpu_hours"] == pytest.approx(16 * plan["hours"])
    assert plan["hours"] == pytest.approx(length["steps"] * way["step_s"] / 3600 / plan["survival"]["effective"])
    assert plan["kwh"] == pytest.approx(plan["gpu_hours"] * (700 + 150) * 1.2 / 1000)
    survival, save_s = plan["survival"], plan["storage"]["save_s"]
    assert survival["daly_s"] > survival["interval_s"] == 1800
    assert survival["effective"] == effective_share(1800, save_s, 300, survival["between_failures_s"])
    train = plan["pretraining"]["train"]
    assert (train["checkpoint_every_s"], train["checkpoint_every"]) == (1800, train["keep_every"])
    flops = step_flops(PRESETS["base"], objective_config(), 64, 2500, 1024)
    assert way["mfu"] == pytest.approx(flops / way["step_s"] / 989.5e12)
    assert way["fits"]
    assert {(one["zero_stage"], one["offload"]) for one in plan["ways"]} >= {(0, False), (3, False), (3, True)}
    assert all((one["step_s"] is None) == one["offload"] for one in plan["ways"])


def test_it_is_simulated_up_to_4096_gpus(planned):
    scaled = planned(*BASE)["scaled"]
    assert [one["gpus"] for one in scaled] == [8 * 2**i for i in range(10)]
    efficiencies = [one["efficiency"] for one in scaled]
    assert efficiencies == sorted(efficiencies, reverse=True)
    for one in scaled:
        assert one["survival"]["simulated"] == pytest.approx(one["survival"]["effective"], abs=0.01)
    assert scaled[-1]["survival"]["effective"] < scaled[0]["survival"]["effective"]


def test_the_recommended_config_is_one_for_pretrain(planned, tmp_path, capsys):
    out = tmp_path / "new" / "plan.yaml"
    plan = planned(*BASE, "--cluster.nodes", 16, "--length.epochs", 3, "--out", out)
    loaded = config.load(PretrainConfig, ["--config", str(out)])
    assert loaded.engine.zero_stage == plan["recommended"]["zero_stage"]
    assert loaded.train.steps == plan["length"]["steps"] == 3 * (94525 // 512)
    without = planned("plan", "--model.preset=tiny", "--train.steps=170")["pretraining"]["train"]
    assert without["checkpoint_every"] == 170, "checkpoints come by the clock, and at the end"
    assert loaded.train.lanes_for(128) % 128 == 0
    assert loaded.model == PRESETS["base"]
    assert not set(yaml.safe_load(out.read_text())) & {"cluster", "length"}


def test_layers_are_checkpointed_where_nothing_else_fits(planned, tmp_path):
    out = tmp_path / "plan.yaml"
    plan = planned("plan", "--model.preset=large", "--engine.precision=bf16", "--cluster.device=L40S",
                   "--train.global_batch=2048", "--out", out)  # fmt: skip
    layers = plan["recommended"]["checkpointed_layers"]
    assert 0 < layers < 24
    assert config.load(PretrainConfig, ["--config", str(out)]).engine.activation_checkpointing == layers
    assert plan["recommended"]["memory"]["activations"]["layers"] < max(
        one["memory"]["activations"]["layers"] for one in plan["ways"]
    )


def test_stage_3_needs_an_element_of_every_parameter_for_each_rank(planned):
    few, many = (planned(*BASE, "--train.global_batch=256", "--train.contrast_batch=256", "--cluster.nodes", nodes)
                 for nodes in (16, 32))  # fmt: skip
    assert 3 in [way["zero_stage"] for way in few["ways"]]
    assert 3 not in [way["zero_stage"] for way in many["ways"]]


def test_stage_3_is_not_compiled(planned):
    plan = planned(*BASE, "--engine.compile=true")
    assert {way["zero_stage"] for way in plan["ways"]} == {0, 1, 2}


def test_failures_that_stop_only_the_largest_clusters(planned):
    scaled = planned(*BASE, "--cluster.mtbf_hours=100", "--cluster.restart_s=1800")["scaled"]
    assert scaled[0]["survival"]["effective"] > 0.8
    assert scaled[-1]["survival"]["effective"] == 0 == scaled[-1]["recordings_per_s"]


def test_a_page_for_people(capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert main(BASE) == 0
    page = capsys.readouterr().out
    for said in ("Recommended: ZeRO", "MFU", "GPU-hours", "kWh", "by Daly", "4,096", "not measured"):
        assert said in page


def test_a_data_set_says_how_much_is_read(planned, shards):
    plan = planned("plan", "--model.preset=tiny", "--data.shards", shards, "--data.segment_s=2.5",
                   "--data.min_record_s=5", "--train.global_batch=8", "--length.epochs=2",
                   "--cluster.gpus_per_node=2")  # fmt: skip
    length = plan["length"]
    assert length["rate_hz"] == 250
    assert length["plain_bytes"] == 12 * 6 * 250 * 2
    assert 0.1 < length["stored_bytes"] / length["plain_bytes"] < 1.5
    assert length["steps"] == 2 * (length["recordings"] // 8)


def test_what_cannot_fit_is_refused_with_what_would(refusal):
    said = refusal(*LARGE_ON_SMALL)
    assert "does not fit" in said
    assert "GB more than the 22.8 GB" in said
    assert "what fits: train.contrast_batch" in said
    assert "what fits: cluster.nodes 2" in refusal(*LARGE_ON_SMALL, "--train.lanes=512")
    said = refusal(*LARGE_ON_SMALL, "--cluster.memory_gb=4")
    assert "nothing that was tried fits: more GPUs need a larger train.contrast_batch" in said


def test_a_device_that_no_table_has_needs_its_rates(refusal, planned):
    said = refusal(*UNKNOWN)
    assert "'H900'" in said
    assert "cluster.memory_gb, cluster.peak_tflops" in said
    plan = planned(*UNKNOWN, *ALL_RATES)
    assert plan["cluster"]["peak_flops"] == 1000e12


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cluster.nodes=3"], "24 GPUs cannot share"),
        (["--train.lanes=4"], "8 ranks do not divide the 4 lanes"),
        (["--train.global_batch=512", "--train.lanes=48"], "train.lanes 48 does not divide the contrast batch of 512"),
        (["--cluster.mtbf_hours=0.01"], "never reaches its next checkpoint"),
        (["--cluster.nodes=0"], "cluster.nodes 0: give 1 or more"),
        (["--cluster.matmul_efficiency=1.5"], "cluster.matmul_efficiency 1.5: give a share"),
        (["--cluster.mtbf_hours=0"], "cluster.mtbf_hours 0: give a positive number"),
        (["--cluster.reserve_gb=90"], "cluster.reserve_gb 90: leaves nothing"),
        (["--cluster.device=V100", "--engine.precision=bf16"], "no bf16 in hardware"),
        (["--length.epochs=3"], "give length.recordings or data.shards"),
        (["--length.recordings=100"], "more than the 100 recordings"),
        (["--init", "runs/x"], "init.model runs/x"),
        (["--cluster.node=3"], "did you mean cluster.nodes?"),
        (["--model.preset=bas"], "model.preset 'bas' is unknown"),
        (["--check", "--cluster.nodes=3"], "takes --json only"),
        (["--check", "--out=plan.yaml"], "unexpected '--out'"),
        (["--check", "--measure"], "unexpected '--measure'"),
    ],
)
def test_refusals(refusal, arguments, expected):
    assert expected in refusal("plan", *arguments)


def test_time_follows_from_rates():
    costs, parallel = Costs(PRESETS["base"], objective_config(), 2500), Parallel(1, 4, "bf16", "cuda")
    slow = Rates.of_device("x", 1e12, 0.5, 1e12, 0.0, True)
    fast = Rates.of_device("x", 4e12, 0.5, 4e12, 0.0, True)
    one, quick = micro_step(costs, parallel, slow, 8), micro_step(costs, parallel, fast, 8)
    assert one.total == pytest.approx(4 * quick.total)
    assert sum(one.parts.values()) > one.flops / 0.5e12  # products alone
    assert 2 * micro_step(costs, parallel, slow, 8, 6).recompute == pytest.approx(
        micro_step(costs, parallel, slow, 8, 12).recompute
    )
    assert update_s(costs.sizes, parallel, slow) == pytest.approx(90_883_072 / 4 * 36 / 1e12, rel=1e-6)


def test_rates_between_two_widths():
    rates = Rates("", {64: 1.0, 1024: 5.0}, {}, 0.0, 1.0)
    assert [rates.products(width) for width in (16, 64, 256, 1024, 4096)] == [1, 1, 3, 5, 5]
