"""State means state: what a module or an optimizer keeps is saved as it is and comes back, whatever it is."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch, synthetic_batch
from ecgscale.errors import InputError
from ecgscale.export import export_engine
from ecgscale.objectives.objective import Objective
from ecgscale.training.engine import Engine, EngineConfig
from ecgscale.training.module_state import own_after_step, standing_in
from ecgscale.training.ranks import start_ranks
from own_parts import MOMENTUM, Teaching

PROGRAM = "training.kept_states:main"
LION = {"optimizer": "own_parts:Lion", "optimizer_options": {"decay": 0.1}}
# Sums over ranks are added up in another order, and a step by AdamW or Lion is as large for a small gradient.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}

ENGINES = {
    f"{precision}-{stage}-{whole_below}": {"precision": precision, "zero_stage": stage, "whole_below": whole_below}
    for precision, stage, whole_below in product(("fp32", "bf16"), range(4), (0, 20))
    if stage == 3 or not whole_below
}
ENGINES |= {f"{name}-lion": engine | LION for name, engine in ENGINES.items() if not engine["whole_below"]}


def task(run: Path, engine: dict[str, object], until: int, *save: int) -> list[str]:
    return [json.dumps({"run": str(run), "engine": engine, "until": until, "save": save})]


def kept(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    files = sorted((run / f"step-{step:08d}").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def runs(jobs, tmp_path_factory) -> Path:
    """For each engine: six steps on 2 ranks and on 1; killed on 2 ranks, then on 1, and ended on 2; and others."""
    folder = tmp_path_factory.mktemp("runs")
    whole = [task(folder / name / "whole-2", engine, 6, 2, 6) for name, engine in ENGINES.items()]
    killed = [task(folder / name / "killed", engine, 4, 2) for name, engine in ENGINES.items()]
    jobs.run(2, *whole, *killed, ["kill"], code=-9, program=PROGRAM)
    for name in ENGINES:
        for other in ("same", "other-stage"):
            shutil.copytree(folder / name / "killed", folder / name / other)
    alone = [task(folder / name / "whole-1", engine, 6, 6) for name, engine in ENGINES.items()]
    killed = [task(folder / name / "killed", engine, 5, 4) for name, engine in ENGINES.items()]
    jobs.run(1, *alone, *killed, ["kill"], code=-9, program=PROGRAM)
    ending = [task(folder / name / run, engine, 6, 6) for run in ("killed", "same") for name, engine in ENGINES.items()]
    for name, engine in ENGINES.items():
        other_stage = engine | {"zero_stage": (int(engine["zero_stage"]) + 1) % 4}
        ending.append(task(folder / name / "other-stage", other_stage, 6, 6))
    jobs.run(2, *ending, program=PROGRAM)
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_all_state_comes_back_to_the_bit(name, runs) -> None:
    whole, same = kept(runs / name / "whole-2", 6), kept(runs / name / "same", 6)
    slots = {"average"} if "lion" in name else {"exp_avg", "exp_avg_sq"}
    assert {key.split(".")[0] for key in whole} == {"weight", "buffer", *slots}
    assert same.keys() == whole.keys()
    assert all(torch.equal(same[key], whole[key]) for key in whole)
    state = json.loads((runs / name / "same" / "step-00000006" / "state.json").read_text())["optimizer"]
    assert state["scalars"] == ({"count": 5} if "lion" in name else {"step": 5.0})


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("other", ["whole-1", "killed", "other-stage"])
def test_state_is_the_same_on_other_ranks_and_stages(name, other, runs) -> None:
    expected, changed = kept(runs / name / "whole-2", 6), kept(runs / name / other, 6)
    assert changed.keys() == expected.keys()
    tolerance = TOLERANCE[name.split("-")[0]]
    for key, tensor in expected.items():
        assert changed[key].dtype == tensor.dtype, key
        torch.testing.assert_close(changed[key], tensor, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", ENGINES)
def test_buffers_keep_their_types_and_the_first_ranks_values(name, runs) -> None:
    tensors = kept(runs / name / "killed", 6)
    buffers = {key.removeprefix("buffer."): tensor for key, tensor in tensors.items() if key.startswith("buffer.")}
    assert buffers.keys() == {"queue", "place", "mean", "updates", "of_a_rank", "filled"}
    assert buffers["updates"].tolist() == [5, 5], "the skipped step is no update"
    assert buffers["updates"].dtype == torch.int32
    assert buffers["mean"].dtype == torch.float64
    assert buffers["mean"].any()
    assert buffers["place"].item() == 6 * 8 % 24
    assert buffers["filled"].all()
    assert buffers["of_a_rank"].item() == 1


# --- one rank, in this process ---


def engine_of(module: nn.Module, stage: int = 1, precision: str = "fp32", accumulation: int = 1) -> Engine:
    config = EngineConfig(zero_stage=stage, precision=precision, whole_below=0)
    return Engine(module, config, start_ranks(), accumulation, micro_batch=2)


def one_step(engine: Engine, step: int = 0) -> None:
    batch = engine.put(synthetic_batch(2, 2))
    engine.backward(engine.forward(batch, step=step)[0])
    assert engine.step(1e-2, step)


PLACES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


class Squares(nn.Module):
    """Its gradient grows with the batch's values and is the same in each micro-step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, batch: ECGBatch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        value_BL = (1e-2 * batch.signal_BLT.float().mean(-1)).to(self.layer.weight.dtype)
        loss = self.layer(value_BL).float().square().mean()
        return loss, {"loss": loss.detach()}


@pytest.mark.parametrize(("stage", "precision"), PLACES)
def test_the_gradient_of_a_step_is_the_mean_over_its_micro_steps(stage, precision) -> None:
    """AdamW hides a gradient that is twice as large, but clipping and other optimizers do not."""
    norms = []
    for accumulation in (1, 2):
        torch.manual_seed(0)
        engine = engine_of(Squares(), stage, precision, accumulation)
        batch = engine.put(synthetic_batch(2, 2))
        for _ in range(accumulation):
            engine.backward(engine.forward(batch, step=0)[0])
            assert engine.step(1e-2)
        norms.append(engine.gradient_norm())
    assert norms[0] > 1e-3
    assert norms[1] == pytest.approx(norms[0], rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize(("stage", "precision"), PLACES)
def test_what_follows_a_step_sees_the_weights_after_it(stage, precision) -> None:
    """A teacher that averages the weights of before the update lags one step behind."""
    engine = engine_of(Teaching(), stage, precision)
    before = {name: tensor.clone() for name, tensor in engine.module_state().items()}
    one_step(engine)
    after = engine.module_state()
    for name in (name for name in before if name.startswith("teacher.") and "weight" in name):
        student = name.replace("teacher.", "student.")
        assert (after[student] - before[student]).abs().max() > 1e-3
        expected = before[name].lerp(after[student], 1 - MOMENTUM)
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7, msg=name)


class WritesIntoTheStudent(Teaching):
    def after_step(self, step: int) -> None:
        self.student[0].weight.mul_(0.5)


@pytest.mark.parametrize(("stage", "precision"), PLACES)
def test_what_is_trained_is_not_written_after_a_step(stage, precision) -> None:
    with pytest.raises(InputError, match=r"^WritesIntoTheStudent.after_step writes into student.0.weight, which"):
        one_step(engine_of(WritesIntoTheStudent(), stage, precision))


class WritesInForward(Teaching):
    """Sets its teacher in the forward pass, as no after_step knows."""

    def forward(self, batch: ECGBatch, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            self.teacher[2].bias.fill_(0.3)
        return super().forward(batch, step)

    after_step = None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])  # at stage 3 DeepSpeed drops what is written there
def test_a_frozen_parameter_is_as_the_forward_pass_left_it(stage, precision) -> None:
    engine = engine_of(WritesInForward(), stage, precision)
    untouched = engine.weight("teacher.0.weight").clone()
    one_step(engine)
    written = torch.full((5,), 0.3, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    assert torch.equal(engine.weight("teacher.2.bias"), written.float())
    assert torch.equal(engine.weight("teacher.0.weight"), untouched), "fp32, also where the model computes in bf16"


class Exported(nn.Module):
    """An encoder with state of its own: an export holds what is of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Teaching()
        self.forward, self.after_step = self.encoder.forward, self.encoder.after_step


@pytest.mark.parametrize(("stage", "precision"), PLACES)
def test_an_export_holds_what_is_frozen_and_kept_as_it_is_now(stage, precision, tmp_path) -> None:
    engine = engine_of(Exported(), stage, precision)
    begun = engine.weight("encoder.teacher.0.weight").clone()
    for step in range(3):
        one_step(engine, step)
    export_engine(tmp_path, engine, {}, 3)
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert torch.equal(weights["encoder.teacher.0.weight"], engine.weight("encoder.teacher.0.weight"))
    assert not torch.equal(weights["encoder.teacher.0.weight"], begun)
    assert torch.equal(weights["encoder.queue"], engine.untrained.buffer("encoder.queue"))
    assert weights["encoder.place"].item() == 6


class DoesNothing(Objective):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    def loss(self, *_: object) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros(()), {}


def test_nothing_is_gathered_for_an_objective_that_keeps_nothing() -> None:
    assert own_after_step(DoesNothing()) is None
    assert own_after_step(nn.Linear(1, 1)) is None
    assert own_after_step(Teaching()) is not None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
        self.other.weight = self.one.weight


def test_a_parameter_that_modules_share_is_stood_in_for_in_each() -> None:
    module, stand_in = Tied(), nn.Parameter(torch.zeros(2, 2))
    own = module.one.weight
    with standing_in(module, {"one.weight": stand_in}):
        assert module.one.weight is stand_in
        assert module.other.weight is stand_in
        assert [name for name, _ in module.named_parameters()] == ["one.weight", "one.bias", "other.bias"]
    assert module.one.weight is own
    assert module.other.weight is own
