"""Real runs: world sizes, ZeRO stages, kill and resume, skipped steps, wrong run folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ecgscale.cli import main
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.simulate import Simulation
from ecgscale.training import checkpoint
from small_jobs import NO_DROPOUT, events, losses, small

# fp32 sums over ranks are added up in another order: 1e-7 relative per loss, which six updates by Adam amplify.
TOLERANCE = 2e-5
PATCH_STEM = ["--model.stem=patch", "--model.patch_samples=25", "--model.stem_bias=true"]
REFERENCE_RULES = ["--objective.time_mask_rule=reference", "--objective.global_form=nt_xent", "--train.lanes=2"]


PROJECTED = ["--train.projected_recordings=2"]


def job(shards: Path, run: Path, *more: str) -> list[str]:
    return ["pretrain", *small(f"--data.shards={shards}", f"--run.dir={run}", *more)]


@pytest.fixture(scope="module")
def one_process(shards, jobs, tmp_path_factory) -> Path:
    """Runs of one process that others are compared with."""
    folder = tmp_path_factory.mktemp("one")
    jobs.run(
        1,
        job(shards, folder / "whole", *NO_DROPOUT, "--train.checkpoint_every=3", "--train.keep_last=9", *PROJECTED),
        job(shards, folder / "accumulated", *NO_DROPOUT, "--train.contrast_batch=4", "--engine.zero_stage=0"),
        job(shards, folder / "reference", *NO_DROPOUT, *REFERENCE_RULES),
        job(shards, folder / "dropout", "--train.checkpoint_every=2"),
        job(shards, folder / "local", *NO_DROPOUT, "--objective.name=wav2vec2"),
        job(shards, folder / "global", *NO_DROPOUT, "--objective.name=cmsc"),
        job(shards, folder / "patch", *NO_DROPOUT, *PATCH_STEM),
    )
    return folder


def test_stages_on_two_processes_equal_one(shards, jobs, one_process, tmp_path) -> None:
    more = {"whole": [], "accumulated": ["--train.contrast_batch=4"], "reference": REFERENCE_RULES}
    more |= {"patch": PATCH_STEM, "local": ["--objective.name=wav2vec2"], "global": ["--objective.name=cmsc"]}
    combinations = [(stage, kind) for stage in range(4) for kind in ("whole", "accumulated")]
    combinations += [(1, "reference"), (2, "local"), (3, "global"), (3, "patch")]
    jobs.run(
        2,
        *(
            job(shards, tmp_path / f"{kind}-{stage}", *NO_DROPOUT, *more[kind], f"--engine.zero_stage={stage}")
            for stage, kind in combinations
        ),
    )
    for stage, kind in combinations:
        expected = losses(one_process / kind)
        assert len(expected) == 6
        assert losses(tmp_path / f"{kind}-{stage}") == pytest.approx(expected, rel=TOLERANCE), (stage, kind)


@pytest.mark.usefixtures("interpreted_kernels")
def test_each_stem_trains_alike_with_each_kernel(shards, jobs, one_process, tmp_path) -> None:
    stems = {"whole": [], "patch": PATCH_STEM}
    short = ["--train.steps=2", "--train.validation_recordings=1"]  # Triton's interpreter is slow
    kinds = [job(shards, tmp_path / kind, *NO_DROPOUT, *stem, *short) for kind, stem in stems.items()]
    said = jobs.run(1, *kinds, ECGSCALE_KERNELS="triton")
    for kind in stems:
        plain = {step: loss for step, loss in losses(one_process / kind).items() if step <= 2}
        assert losses(tmp_path / kind) == pytest.approx(plain, rel=TOLERANCE), kind
    assert "conv stem, triton kernels on cpu" in said
    assert "patch stem, triton kernels on cpu" in said


def test_kernels_that_cannot_run_are_refused(shards, jobs, tmp_path) -> None:
    said = jobs.run(1, job(shards, tmp_path / "run"), code=2, ECGSCALE_KERNELS="fast")
    assert said == "ecgscale: ECGSCALE_KERNELS=fast: give reference or triton, or leave it unset\n"
    assert not (tmp_path / "run").exists()


def test_segments_of_too_few_tokens_are_refused(shards, jobs, tmp_path) -> None:
    patches = ["--model.stem=patch", "--model.patch_samples=300"]
    said = jobs.run(1, job(shards, tmp_path / "run", *patches), code=2)
    assert "a segment of 2.5 s gives 2 tokens of 300 samples" in said
    assert not (tmp_path / "run").exists()
    said = jobs.run(1, job(shards, tmp_path / "run", *patches, "--objective.name=cmsc", "--train.steps=1"))
    assert "patch stem, reference kernels" in said


def test_losses_fall(one_process) -> None:
    values = losses(one_process / "whole")
    assert values[6] < values[1] - 0.3


def test_killed_run_goes_on_with_the_same_bits(shards, jobs, one_process, tmp_path) -> None:
    run = tmp_path / "killed"
    again = job(shards, run, "--train.checkpoint_every=2")
    jobs.killed_after(5, run, 1, again)
    assert checkpoint.latest(run / "checkpoints").step == 4
    jobs.run(1, again)
    assert losses(run) == losses(one_process / "dropout")
    assert sum(event.get("step") == 5 and "train/loss" in event for event in events(run)) == 2


def test_an_optimizer_and_a_schedule_of_ones_own_go_on_with_the_same_bits(shards, jobs, tmp_path) -> None:
    own = ["--engine.optimizer=own_parts:Lion", "--engine.optimizer_options.decay=0.1", "--engine.learning_rate=1e-4"]
    own += ["--train.schedule=own_parts:steps_down", "--train.checkpoint_every=2"]
    whole, killed = (job(shards, tmp_path / name, *own) for name in ("whole", "killed"))
    jobs.run(1, whole)
    jobs.killed_after(5, tmp_path / "killed", 1, killed)
    state = checkpoint.latest(tmp_path / "killed" / "checkpoints").state
    assert state["optimizer"] == {"slots": ["average"], "scalars": {"count": 4}, "group": {"rounds": 4}}
    jobs.run(1, killed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    rates = [event["train/learning_rate"] for event in events(tmp_path / "whole") if "train/learning_rate" in event]
    assert rates == pytest.approx([1e-4] * 3 + [1e-5] * 3)


def test_checkpoint_goes_on_at_another_world_size_and_stage(shards, jobs, one_process, tmp_path) -> None:
    changed = []
    for stage in (0, 3):
        run = tmp_path / f"changed-{stage}"
        shutil.copytree(one_process / "whole", run)
        shutil.rmtree(run / "checkpoints" / "step-00000006")
        changed.append(
            job(
                shards,
                run,
                *NO_DROPOUT,
                "--train.checkpoint_every=3",
                "--train.keep_last=9",
                f"--engine.zero_stage={stage}",
            )
        )
        (run / "events.jsonl").unlink()
    jobs.run(2, *changed)
    expected = losses(one_process / "whole")
    for stage in (0, 3):
        went_on = losses(tmp_path / f"changed-{stage}")
        assert list(went_on) == [4, 5, 6]
        assert went_on == pytest.approx({step: expected[step] for step in went_on}, rel=TOLERANCE)


def test_bf16_resumes_with_the_same_bits(shards, jobs, tmp_path) -> None:
    runs = []
    for stage in range(4):
        more = ["--engine.precision=bf16", f"--engine.zero_stage={stage}", "--engine.activation_checkpointing=true"]
        whole, parted = tmp_path / f"whole-{stage}", tmp_path / f"parted-{stage}"
        runs.append(job(shards, whole, *more, "--train.steps=4"))
        runs += [job(shards, parted, *more, f"--train.steps={steps}") for steps in (2, 4)]
    jobs.run(1, *runs)
    for stage in range(4):
        assert len(losses(tmp_path / f"whole-{stage}")) == 4
        assert losses(tmp_path / f"parted-{stage}") == losses(tmp_path / f"whole-{stage}"), stage


def test_fine_tuning_on_two_processes_equals_one_and_resumes(jobs, one_process, tmp_path) -> None:
    data = tmp_path / "data"
    ingest(Simulation(patients=48, duration_s=6, rate_hz=250), data, IngestOptions(rate_hz=250, test_fraction=0.2))
    common = [
        f"--init.model={one_process / 'whole'}",
        f"--data.shards={data}",
        "--data.min_record_s=5",
        "--task.label=rhythm",
    ]
    common += ["--task.kind=singlelabel", "--task.min_positives=2", "--train.global_batch=8", "--train.log_every=1"]
    common += ["--engine.learning_rate=1e-3", "--train.checkpoint_every=2", "--engine.whole_below=0"]
    runs = {f"{precision}-{stage}": (stage, precision) for stage in (1, 3) for precision in ("fp32", "bf16")}

    def tune(name: str, steps: int, world: int) -> list[str]:
        stage, precision = runs[name]
        more = [f"--engine.zero_stage={stage}", f"--engine.precision={precision}", f"--train.steps={steps}"]
        return ["finetune", *common, *more, f"--run.dir={tmp_path / f'{name}-{world}'}"]

    jobs.run(1, *(tune(name, steps, 1) for name in runs for steps in (2, 4)))
    jobs.run(2, *(tune(name, 4, 2) for name in runs))
    for name, (_, precision) in runs.items():
        one, two = losses(tmp_path / f"{name}-1"), losses(tmp_path / f"{name}-2")
        assert len(one) == 4
        assert two == pytest.approx(one, rel=TOLERANCE if precision == "fp32" else 0.02), name
    undisturbed = [*tune("fp32-1", 4, 1)[:-1], f"--run.dir={tmp_path / 'undisturbed'}"]
    jobs.run(1, undisturbed)
    assert losses(tmp_path / "undisturbed") == losses(tmp_path / "fp32-1-1")


class Poisoned:
    """The simulated set, with one recording whose millivolts overflow."""

    dataset = "poisoned"

    def __init__(self, simulation, item: str) -> None:
        self.simulation, self.item = simulation, item

    def items(self) -> list[str]:
        return self.simulation.items()

    def read(self, item: str):
        record = self.simulation.read(item)
        if item == self.item:
            record.scale_L[:] = np.float32(3e38)
        return record


def test_non_finite_steps_are_skipped_on_all_ranks_and_counted(jobs, tmp_path) -> None:
    simulation = Simulation(patients=8, duration_s=6, rate_hz=250)
    options = IngestOptions(rate_hz=250, validation_fraction=0)
    ingest(Poisoned(simulation, simulation.items()[0]), tmp_path / "data", options)
    more = ["--objective.lead_mask_probability=0", "--train.validate_every=0"]
    runs = [tmp_path / f"stage-{stage}" for stage in range(4)]
    jobs.run(2, *(job(tmp_path / "data", run, *more, f"--engine.zero_stage={s}") for s, run in enumerate(runs)))
    for run in runs:  # 16 recordings are two batches per epoch, one of which holds the poisoned one
        skipped = [event["step"] for event in events(run) if event["event"] == "skipped"]
        assert len(skipped) == 3
        finite = [step for step, loss in losses(run).items() if loss is not None]
        assert sorted(skipped + finite) == [1, 2, 3, 4, 5, 6]
        state = checkpoint.latest(run / "checkpoints").state
        assert (state["skipped"], state["optimizer_steps"]) == (3, 3)
    # A run can be saved when all its steps were skipped, and go on where the next batch is not finite.
    always = ["--train.checkpoint_every=1", "--train.keep_last=9"]
    stages = [[*more, *always, f"--engine.zero_stage={stage}"] for stage in range(4)]
    saved = [tmp_path / f"saved-{stage}" for stage in range(4)]
    steps = [f"--train.steps={n}" for n in (1, 2, 3)]
    jobs.run(
        1,
        *(job(tmp_path / "data", run, *more_of, n) for run, more_of in zip(saved, stages, strict=True) for n in steps),
    )
    for run in saved:
        assert losses(run).keys() == {1, 2, 3}
        assert checkpoint.latest(run / "checkpoints").state["skipped"] in (1, 2)
    line = jobs.run(1, job(tmp_path / "data", tmp_path / "stops", *more, "--train.max_skipped=1"), code=2)
    assert "1 steps in a row had a non-finite gradient" in line


class TestWrongRunFolder:
    @pytest.fixture
    def run(self, one_process, tmp_path) -> Path:
        return Path(shutil.copytree(one_process / "whole", tmp_path / "run"))

    @staticmethod
    def refused(capsys, arguments: list[str]) -> str:
        assert main(arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    def test_of_another_config(self, run, shards, capsys) -> None:
        line = self.refused(capsys, job(shards, run, *NO_DROPOUT, "--model.depth=3"))
        assert "config.yaml" in line
        assert "model.depth 2, now it is 3" in line

    def test_that_is_a_file(self, shards, capsys, tmp_path) -> None:
        (tmp_path / "taken").write_text("")
        line = self.refused(capsys, job(shards, tmp_path / "taken", *NO_DROPOUT))
        assert "taken" in line

    def test_of_other_data(self, run, capsys, tmp_path) -> None:
        simulation = Simulation(patients=24, duration_s=6, rate_hz=250, seed=5)
        ingest(simulation, tmp_path / "other", IngestOptions(rate_hz=250))
        same = ["--train.checkpoint_every=3", "--train.keep_last=9"]
        line = self.refused(capsys, job(tmp_path / "other", run, *NO_DROPOUT, *same, "--train.steps=8"))
        assert "other data than data.shards" in line

    @pytest.mark.parametrize("damage", ["missing", "bit", "truncated", "state", "digit"])
    def test_with_a_damaged_checkpoint(self, damage, run) -> None:
        newest = run / "checkpoints" / "step-00000006"
        victim = newest / ("state.json" if damage in ("state", "digit") else "tensors-00000-of-00001.safetensors")
        content = bytearray(victim.read_bytes())
        if damage == "missing":
            victim.unlink()
        elif damage == "digit":
            victim.write_bytes(content.replace(b'"optimizer_steps": 6', b'"optimizer_steps": 7'))
        elif damage == "truncated":
            victim.write_bytes(content[:-100])
        else:
            content[len(content) // 2] ^= 1
            victim.write_bytes(content if damage == "bit" else content[:200])
        with pytest.raises(ValueError, match=victim.name):
            checkpoint.latest(run / "checkpoints")


def test_full_disk_leaves_no_checkpoint(shards, tmp_path) -> None:
    """A real failure to write: the kernel refuses files above 500 kB."""
    limited = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); sys.argv = ['ecgscale', *sys.argv[1:]]; "
    limited += "runpy.run_module('ecgscale.cli', run_name='__main__')"
    arguments = [*job(shards, tmp_path / "run", "--train.steps=2", "--model.ffn_width=1024")]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1  # the machine's fault, which the launcher may try again
    assert "cannot write the checkpoint" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_run_folder_holds_what_it_should(one_process) -> None:
    run = one_process / "whole"
    expected = {
        ".writer",
        "config.yaml",
        "checkpoints",
        "tensorboard",
        "events.jsonl",
        "export",
        "run.id",
        "trained_on.keys",
    }
    assert {path.name for path in run.iterdir()} == expected
    state = json.loads((run / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert (state["step"], state["position"], state["world_size"]) == (3, 24, 1)
    named = {name for event in events(run) for name in event}
    expected = {
        f"train/{part}" for part in ("loss", "local", "cmsc", "code_perplexity", "gradient_norm", "learning_rate")
    }
    expected |= {f"throughput/{what}" for what in ("ecg_per_s", "tokens_per_s", "loader_wait_share")}
    assert expected | {"memory/host_rss_gb", "validation/loss", "validation/cmsc"} <= named


def test_tensorboard_holds_scalars_config_and_a_picture(one_process) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(one_process / "whole" / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert len(board.Scalars("train/loss")) == 6
    assert {"validation/loss", "throughput/ecg_per_s", "train/learning_rate"} <= set(tags["scalars"])
    assert tags["images"] == ["input/masked_ecg"]
    assert "config/text_summary" in tags["tensors"]
    [named] = (one_process / "whole" / "tensorboard").rglob("metadata.tsv")
    assert all(line.startswith("patient ") and "rhythm " in line for line in named.read_text().splitlines())
    assert len(named.read_text().splitlines()) == 2
