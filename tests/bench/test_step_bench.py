"""The step bench: its baseline is the method, ways take real steps in processes, what does not fit is said. No time
is asserted."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from ecgscale.bench.measure import Round
from ecgscale.bench.step import (
    STRONG,
    WEAK,
    NothingFitsError,
    bench_step,
    bound_of,
    largest,
    measure_case,
    mfu_bound,
    scaled,
)
from ecgscale.bench.step_case import Axes, Case, StepConfig, shard_stream
from ecgscale.bench.step_ranks import Effort, FailedError, Group, Taken, TooLargeError, _Failed, tells_of_memory
from ecgscale.bench.step_ways import DDP, OURS, PRODUCT, STRAIGHTFORWARD, equality
from ecgscale.bench.straightforward import Straightforward, can_be_written, named_as_here, same_draws
from ecgscale.cli import main
from ecgscale.cost import step_flops
from ecgscale.data.batch import synthetic_batch
from ecgscale.errors import InputError
from ecgscale.objectives import build_objective, objective_config
from ecgscale.training.ranks import Ranks

SMALL = [
    "--model.stem_channels=16", "--model.width=32", "--model.depth=2", "--model.heads=2", "--model.ffn_width=64",
    "--model.position_kernel=16", "--model.position_groups=4", "--objective.codes=16", "--objective.code_width=16",
    "--objective.negatives=20",
]  # fmt: skip
OBJECTIVE = objective_config(codes=16, code_width=16, negatives=20)
HERE = Ranks(0, 1, torch.device("cpu"))


def bench(part: str, out: Path, *options: str) -> int:
    return main(["bench", part, "--quick", "--preset=tiny", "--threads=1", f"--out={out}", *SMALL, *options])


def written(out: Path) -> dict:
    (path,) = out.glob("*.json")
    return json.loads(path.read_text())


def scalars(out: Path) -> dict[str, float]:
    """By names without the keys that all cases of this file have."""
    found = {name: value for section in written(out)["sections"] for name, value in section["scalars"].items()}
    return {re.sub(r"/keys_[0-9a-f]{8}", "", name): value for name, value in found.items()}


# --- the straightforward way ---


@pytest.mark.parametrize(
    ("shape", "objective", "samples"),
    [
        ({}, OBJECTIVE, 640),
        ({"pre_norm": True, "stem_bias": True, "stem_gradient_scale": 1.0}, OBJECTIVE, 1003),
        ({"stem_channels": 32}, replace(OBJECTIVE, lead_mask_probability=0.0, code_groups=4), 640),
    ],
)
def test_straightforward_losses_and_gradients_equal_those_of_the_objective(
    small_model_config, shape, objective, samples
):
    """Dropout is off; the sums are added up in another order in fp32."""
    model = replace(small_model_config, dropout=0.0, attention_dropout=0.0, feature_dropout=0.0, **shape)
    torch.manual_seed(0)
    ours = build_objective(model, objective, seed=3, rate_hz=500)
    plain = Straightforward(model, objective)
    plain.load_state_dict(named_as_here(ours.state_dict(), model, objective))
    batch = synthetic_batch(6, samples)
    draws = ours.draw(batch, share=False)
    loss, _ = ours.losses(batch, draws, step=40_000, share=False)
    plain_loss = plain.loss(batch, same_draws(draws, 12), step=40_000)
    assert plain_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    plain_loss.backward()
    expected = named_as_here({name: p.grad for name, p in ours.named_parameters()}, model, objective)
    found = {name: p.grad for name, p in plain.named_parameters()}
    assert found.keys() == expected.keys()
    largest_norm = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest_norm, name


def test_equality_sees_a_difference(small_model_config, monkeypatch):
    case = Case(StepConfig(small_model_config, OBJECTIVE), batch=2, samples=640)
    found = equality(case, HERE)
    assert found.loss < 1e-6
    assert 0 < found.gradient < 1e-5

    def wrong(tensors, model, objective):
        named = named_as_here(tensors, model, objective)
        return named | {"final_proj.bias": named["final_proj.bias"] + 0.1}

    monkeypatch.setattr("ecgscale.bench.step_ways.named_as_here", wrong)
    assert equality(case, HERE).loss > 1e-4

    def not_a_number(tensors, model, objective):
        named = named_as_here(tensors, model, objective)
        return named | {"final_proj.bias": named["final_proj.bias"] * math.nan}

    monkeypatch.setattr("ecgscale.bench.step_ways.named_as_here", not_a_number)
    with pytest.raises(InputError, match="not finite"):
        equality(case, HERE)


def test_what_the_straightforward_way_draws_is_what_the_method_asks_for(small_model_config):
    torch.manual_seed(0)
    batch = synthetic_batch(40, 2500)
    plain = Straightforward(small_model_config, OBJECTIVE)
    keep_BL, place_BM, negative_BMK, gumbel_BMGV = plain.draw(batch)
    assert place_BM.shape == (40, 55)  # 0.35 of 156
    assert all(len({n for n in row if 0 <= n < 156}) == 55 for row in place_BM.tolist())
    assert place_BM.sort(dim=1).values.unique(dim=0).shape[0] == 40
    assert 0.4 < keep_BL.mean() < 0.6
    assert keep_BL.unique().tolist() == [0, 1]
    own = torch.arange(55)[:, None]
    assert not (negative_BMK == own).any()
    assert negative_BMK.unique().tolist() == list(range(55))
    assert gumbel_BMGV.shape == (40, 55, 2, 16)
    assert gumbel_BMGV.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert plain(batch).isfinite()


def test_only_the_method_of_the_paper_is_written_straightforwardly(small_model_config):
    assert can_be_written(small_model_config, objective_config())
    assert not can_be_written(replace(small_model_config, stem="patch"), objective_config())
    for other in ({"name": "cmsc"}, {"global_form": "nt_xent"}, {"augmentations": ["emg"]}):
        assert not can_be_written(small_model_config, objective_config(**other))


# --- cases ---


def test_every_combination_is_a_case_of_its_own():
    axes = Axes(
        preset=["tiny", "small"], stem=["conv", "patch"], batch=[1, 2], precision=["fp32", "bf16"], ranks=[1, 2]
    )
    cases = axes.cases({"model.dropout": 0}, "cpu", 0, 2500)
    assert len(cases) == len({case.key for case in cases}) == len({case.title for case in cases}) == 32
    assert all(case.config.model.dropout == 0 for case in cases)
    case = cases[0]
    assert case.flops() == step_flops(case.config.model, case.config.objective, 2, 2500, 2)


def test_what_does_not_go_together_is_left_out(capsys):
    axes = Axes(preset=["tiny"], zero_stage=[1, 3], compile=[False, True])
    cases = axes.cases({}, "cpu", 1, 2500)
    assert [(case.config.engine.zero_stage, case.config.engine.compile) for case in cases] == [
        (1, False), (1, True), (3, False),
    ]  # fmt: skip
    assert "left out: engine.compile: not with engine.zero_stage 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch=0"], "--batch 0: give 1 or more"),
        (["--objective.name=foo", "--preset=tiny"], "objective.name 'foo' is unknown"),
        (["--ranks=0"], "--ranks 0: give 1 or more"),
        (["--checkpointing=9", "--preset=tiny"], "engine.activation_checkpointing 9: the model has 3 layers"),
        (["--preset=nothing"], "model.preset 'nothing' is unknown"),
        (["--samples=10"], "--samples 10: a token has 16"),
        (["--device=cuda"], "PyTorch sees no GPU"),
        (["--model.widht=3"], "did you mean model.width?"),
        (["--checkpointing=many"], "--checkpointing \"['many']\": give a list of"),
        (["--find-batch"], "needs --memory-gb"),
        (["--rounds=0"], "--rounds 0: give 1 or more"),
        (["--memory-gb=2"], "--memory-gb 2 is for --find-batch"),
        (["--find-batch", "--memory-gb=2", "--batch", "1", "2"], "--batch 1 2 with --find-batch"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, refusal, options, said):
    assert said in refusal("bench", "step", "--out", tmp_path, *options)


def test_scaling_shares_batches_out():
    case = Axes(preset=["tiny"], batch=[6]).cases({}, "cpu", 1, 2500)[0]
    assert [(one.ranks, one.batch) for one in scaled(case, [1, 2, 4], WEAK)] == [(1, 6), (2, 6), (4, 6)]
    assert [(one.ranks, one.batch) for one in scaled(case, [1, 2, 4], STRONG)] == [(1, 24), (2, 12), (4, 6)]
    with pytest.raises(InputError, match=r"--ranks 4 cannot share 30"):
        scaled(case, [1, 4, 5], STRONG)


def test_bounds_are_those_of_the_base_preset():
    fp32, bf16 = Axes(precision=["fp32", "bf16"]).cases({}, "cpu", 2, 2500)
    assert (bound_of(fp32, STRAIGHTFORWARD), bound_of(bf16, STRAIGHTFORWARD)) == (1.4, 2.2)
    assert bound_of(fp32, DDP) is None
    for other in ({"batch": 4}, {"threads": 1}, {"samples": 5000}, {"overrides": "--model.depth 2"}):
        assert bound_of(replace(fp32, **other), STRAIGHTFORWARD) is None
    for axis in ({"checkpointing": [2]}, {"compile": [True]}):
        (other,) = Axes(**axis).cases({}, "cpu", 2, 2500)
        assert bound_of(other, STRAIGHTFORWARD) is None


@pytest.mark.parametrize(
    ("gpu", "bounds"), [("NVIDIA H100 80GB HBM3", (0.98, 5.0, 0.45)), ("NVIDIA A100", (None,) * 3)]
)
def test_bounds_of_a_gpu_are_those_of_an_h100(monkeypatch, gpu, bounds):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
    (case,) = Axes(precision=["bf16"]).cases({}, "cuda", 2, 2500)
    assert (bound_of(case, DDP), bound_of(case, STRAIGHTFORWARD), mfu_bound(case)) == bounds


def test_the_peak_of_the_device_is_no_other_case():
    keys = {"model.dropout": 0, "engine.peak_tflops": 312}
    (one,) = Axes().cases(keys, "cpu", 1, 2500)
    (other,) = Axes().cases({"engine.peak_tflops": 312, "model.dropout": 0}, "cpu", 1, 2500)
    assert one.overrides == other.overrides == "--model.dropout 0"
    assert one.config.engine.peak_tflops == 312


def test_the_largest_batch_is_part_of_no_name():
    """Or a larger one would be another case, and nothing could be compared."""
    (case,) = Axes(preset=["tiny"], batch=[40]).cases({}, "cpu", 1, 2500)
    assert case.key == "tiny/conv/b40/fp32/zero1/r1/cpu1"
    assert replace(case, found="largest_in_2gb").key == "tiny/conv/largest_in_2gb/fp32/zero1/r1/cpu1"


@pytest.fixture
def turns(monkeypatch) -> Taken:
    """What is taken for measured, without any step; to be filled."""
    taken = Taken()
    monkeypatch.setattr("ecgscale.bench.step.take_turns", lambda *_: taken)
    monkeypatch.setattr("ecgscale.bench.step.largest_batch", lambda *_: 40)
    return taken


def test_a_found_batch_is_a_number_of_a_case_that_its_limit_names(turns, tmp_path):
    turns.rounds[OURS], turns.peak_bytes[OURS] = [Round(40, 1.0, 1.0)], 10**9
    cases = Axes(preset=["tiny"]).cases({}, "cpu", 1, 2500)
    (section,) = bench_step(tmp_path, cases, [], Effort.least(), find_within_gb=2.0).sections
    assert section.scalars["tiny/conv/largest_in_2gb/fp32/zero1/r1/cpu1/ecgscale/largest_batch"] == 40
    assert all("/largest_in_2gb/" in name for name in section.scalars)
    better = {name.rpartition("/")[2]: meaning.better for name, meaning in section.meanings.items()}
    assert (better["step_ms"], better["peak_gb"]) == ("", ""), "of a larger batch they are more"
    assert (better["ecg_per_s"], better["largest_batch"]) == ("higher", "higher")


def test_every_number_says_what_it_means(turns, tmp_path):
    for way in (OURS, DDP, PRODUCT):
        turns.rounds[way], turns.peak_bytes[way] = [Round(8, 1.0, 1.0)], 10**9
    (case,) = Axes(preset=["tiny"]).cases({}, "cpu", 1, 2500)
    section = measure_case(case, [DDP], Effort.least())
    assert set(section.meanings) == set(section.scalars)
    baselines = {name for name, meaning in section.meanings.items() if not meaning.ours}
    assert baselines == {name for name in section.scalars if "/ddp/" in name or "/product/" in name}
    assert {meaning.case for meaning in section.meanings.values()} == {case.key}
    assert section.meanings[f"{case.key}/ecgscale/step_ms"].better == "lower"


def test_a_product_alone_is_no_measurement(turns, tmp_path):
    turns.rounds[PRODUCT], turns.failed[OURS] = [Round(8, 1.0, 1.0)], "out of memory"
    with pytest.raises(InputError, match=r"^bench step: out of memory$"):
        bench_step(tmp_path, Axes(preset=["tiny"]).cases({}, "cpu", 1, 2500), [], Effort.least())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [NothingFitsError("nothing fits"), FailedError("rank 0 ended with code 1")])
def test_a_search_that_fails_is_one_line(tmp_path, refusal, monkeypatch, error):
    def failing(case: Case, within_gb: float) -> int:
        raise error

    monkeypatch.setattr("ecgscale.bench.step.largest_batch", failing)
    assert f"bench step: {error}" in refusal("bench", "step", "--find-batch", "--preset=tiny", "--out", tmp_path)


def test_alone_nothing_else_holds_memory(monkeypatch):
    asked: list[str] = []

    def turns(wanted, effort, title) -> Taken:
        asked.extend(wanted)
        return Taken({OURS: [Round(8, 1.0, 1.0)]}, {OURS: 10**9})

    monkeypatch.setattr("ecgscale.bench.step.take_turns", turns)
    (case,) = Axes(preset=["tiny"]).cases({}, "cpu", 1, 2500)
    section = measure_case(case, (DDP, STRAIGHTFORWARD), Effort.least(), alone=True)
    assert asked == [OURS]
    assert [row[0] for row in section.rows] == ["ecgscale"]
    assert "Alone on the GPU" in section.notes[0]


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_errors_of_memory_are_known(said, memory):
    assert tells_of_memory(RuntimeError(said)) == memory


def _leave(rank: int, how: str, end: Connection) -> None:
    """A rank 0 that only loses the other, and another that is killed, fails or says why."""
    if rank == 0:
        while end.recv() != "end":
            pass
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "said":
        end.send(_Failed("no room", too_large=True))
    os._exit(3)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 warns where threads are forked
@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("killed", TooLargeError, "killed by the system"),
        ("failed", FailedError, "rank 1 ended with code 3"),
        ("said", TooLargeError, "no room"),
    ],
)
def test_the_rank_that_ended_is_blamed(monkeypatch, how, kind, said):
    """Also by a question that it cannot get any more."""
    monkeypatch.setattr("ecgscale.bench.step_ranks._LAST_WORD_S", 0.2)
    case = Case(StepConfig(), batch=1, ranks=2)
    monkeypatch.setattr("ecgscale.bench.step_ranks._context", lambda device: multiprocessing.get_context("fork"))
    monkeypatch.setattr(
        "ecgscale.bench.step_ranks._run_rank", lambda case, way, rank, port, end: _leave(rank, how, end)
    )
    with Group(case, OURS) as group:
        group._ranks[1].join()
        with pytest.raises(FailedError, match=said) as raised:
            group.take(1)
        assert raised.type is kind


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_the_largest_that_fits_is_found_with_few_trials(most):
    for limit in range(most + 2):
        tried: list[int] = []

        def fits(n: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(n)
            return n <= limit

        assert largest(fits, most) == min(limit, most)
        assert len(tried) == len(set(tried)) <= 2 * math.ceil(math.log2(most + 1)) + 1
        assert max(tried, default=0) <= max(1, 2 * limit)


# --- real processes ---


def test_step_measures_every_way_and_names_what_does_not_fit(tmp_path):
    """The first case asks for 8 PB."""
    huge, small = 10**15, 2
    options = ["--against=straightforward", "--samples=640", "--batch", str(huge), str(small)]
    assert bench("step", tmp_path, *options) == 0
    report = written(tmp_path)
    first, second = report["sections"]
    assert [row[1] for row in first["rows"]] == ["out of memory: tried to allocate 8000000000000000 bytes"] * 2
    assert [row[0] for row in second["rows"]] == ["ecgscale", "straightforward PyTorch, fp32"]
    assert all(check["passed"] for check in second["checks"])
    assert {check["what"].split(",")[0] for check in second["checks"]} == {"loss", "gradients"}
    found, label = scalars(tmp_path), "tiny/conv/b2/fp32/zero1/r1/cpu1/samples_640"
    for way in ("ecgscale", "straightforward"):
        per_s, step_ms = found[f"{label}/{way}/ecg_per_s"], found[f"{label}/{way}/step_ms"]
        assert per_s * step_ms == pytest.approx(1000 * small)
        assert 0.05 < found[f"{label}/{way}/peak_gb"] < 5
        assert found[f"{label}/{way}/tflops"] / found[f"{label}/product/tflops"] == pytest.approx(
            found[f"{label}/{way}/of_product"]
        )
    ratio = found[f"{label}/ecgscale/ecg_per_s"] / found[f"{label}/straightforward/ecg_per_s"]
    assert found[f"{label}/ecgscale_over_straightforward"] == pytest.approx(ratio)
    (settings,) = [each for name, each in second["settings"].items() if name.endswith("/ecgscale")]
    assert {name: settings[name] for name in ("batch", "precision", "ranks")} == {
        "batch": 2,
        "precision": "fp32",
        "ranks": 1,
    }
    assert report["machine"]["commit"]
    assert report["machine"]["command"].split()[0] == "ecgscale"


def test_ddp_takes_an_objective_without_masked_tokens(tmp_path):
    options = ["--quick", "--preset=tiny", "--threads=1", "--samples=640", "--batch=2", f"--out={tmp_path}"]
    model = [option for option in SMALL if option.startswith("--model")]
    assert main(["bench", "step", *options, *model, "--objective.name=cmsc", "--against", "ddp"]) == 0
    assert sum(name.endswith("/ddp/ecg_per_s") for name in scalars(tmp_path)) == 1


def test_scaling_measures_one_rank_and_two(tmp_path):
    assert bench("scaling", tmp_path, "--samples=640", "--batch=1", "--kind=weak", "--ranks", "1", "2") == 0
    found = scalars(tmp_path)
    labels = [f"weak/tiny/conv/b1/fp32/zero1/r{ranks}/cpu1/samples_640/ecgscale" for ranks in (1, 2)]
    one, two = (found[f"{label}/ecg_per_s"] for label in labels)
    assert [found[f"{label}/efficiency"] for label in labels] == [1, pytest.approx(two / one / 2)]


def test_a_limit_below_the_least_is_refused(tmp_path, capsys):
    assert bench("step", tmp_path, "--find-batch", "--memory-gb=0.02") == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("ecgscale: bench step: not even a batch of 1 fits into 0.02 GB; give more memory")
    )


def test_batches_of_a_data_set_are_read_as_in_pretraining(shards):
    case = Case(StepConfig(), batch=3, samples=625, ranks=2, shards=str(shards))
    first, second = (shard_stream(case, rank) for rank in (0, 1))
    batches = [stream.micro_batch(0, 0) for stream in (first, second)]
    assert [batch.signal_BLT.shape for batch in batches] == [(6, 12, 625)] * 2
    assert len({*batches[0].record_B.tolist(), *batches[1].record_B.tolist()}) == 6
    assert not batches[0].padded
