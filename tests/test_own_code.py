"""What comes from a folder outside the packages, through all that ours goes through: one class of each kind."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import ecgscale
from conftest import TOYS, export_weights
from ecgscale.cli import main
from ecgscale.config import PretrainConfig
from ecgscale.config import load as load_config
from ecgscale.data.ingest import IngestOptions, ingest
from ecgscale.data.shard_set import ShardSet
from ecgscale.errors import InputError
from ecgscale.export import write_export
from ecgscale.inspection import summarise_model
from ecgscale.simulate import Simulation
from ecgscale.training.checkpoint import Checkpoint, latest
from ecgscale_launch.sweep_table import figures
from small_jobs import events, losses

OBJECTIVE, ENCODER = "toylab.amplitude:Amplitude", "toylab.recurrent:Recurrent"
TEACHER = "toylab.teacher:Follow"
LAYOUT = "toylab.csv_folder:CsvFolder"
TASK = "toylab.how_many:HowMany"
OWN_TASK = [f"--task.kind={TASK}", "--task.most=3"]
OWN_OBJECTIVE = [f"--objective.name={OBJECTIVE}", "--objective.mixtures=4"]
OWN_ENCODER = [f"--model.encoder={ENCODER}", "--model.width=8", "--model.depth=2"]
OPTIMIZER, SCHEDULE = "toylab.heavy_ball:HeavyBall", "toylab.halving:halving"
OWN_UPDATE = [
    f"--engine.optimizer={OPTIMIZER}",
    "--engine.optimizer_options.friction=0.2",
    f"--train.schedule={SCHEDULE}",
]
OWN = [*OWN_OBJECTIVE, *OWN_ENCODER, *OWN_UPDATE]
OURS = ["--model.preset=tiny", "--model.depth=1", "--model.dropout=0", "--model.attention_dropout=0"]
SHORT = [
    "--data.segment_s=2.5", "--data.min_record_s=5", "--train.global_batch=8", "--train.log_every=1",
    "--train.checkpoint_every=2", "--train.keep_last=9", "--train.projected_recordings=2",
    "--train.validation_recordings=2", "--engine.learning_rate=1e-2", "--engine.whole_below=0",
]  # fmt: skip
STEPS = 4
ROOT = Path(__file__).parents[1]
TOLERANCE = 2e-5  # fp32 sums over ranks are added up in another order, which Adam amplifies


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the user has the package on the path: nothing of it is imported yet."""
    forget()
    monkeypatch.syspath_prepend(str(TOYS))
    yield
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "toylab"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "simulated"
    chosen = IngestOptions(rate_hz=250, validation_fraction=0.25, test_fraction=0.25)
    ingest(Simulation(patients=32, duration_s=6, rate_hz=250), out, chosen)
    return out


def job(shards: Path, run: Path, *more: str, steps: int = STEPS) -> list[str]:
    return ["pretrain", *SHORT, f"--train.steps={steps}", f"--data.shards={shards}", f"--run.dir={run}", *more]


@pytest.fixture(scope="module")
def runs(shards, jobs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    said = jobs.run(
        1,
        job(shards, folder / "whole", *OWN),
        job(shards, folder / "objective", *OWN_OBJECTIVE, *OURS, steps=1),
        job(shards, folder / "encoder", *OWN_ENCODER, "--objective.name=cmsc", steps=1),
    )
    (folder / "said").write_text(said)
    return folder


def test_losses_on_two_ranks_equal_those_on_one_and_a_killed_run_goes_on(shards, jobs, runs, tmp_path):
    stages = {
        stage: job(shards, tmp_path / f"stage-{stage}", *OWN, f"--engine.zero_stage={stage}") for stage in range(4)
    }
    jobs.run(2, *stages.values())
    expected = losses(runs / "whole")
    assert len(expected) == STEPS
    assert expected[STEPS] < expected[1]
    for stage in stages:
        assert losses(tmp_path / f"stage-{stage}") == pytest.approx(expected, rel=TOLERANCE), stage
    killed = tmp_path / "killed"
    again = job(shards, killed, *OWN, "--engine.zero_stage=3")
    jobs.killed_after(3, killed, 2, again)
    assert latest(killed / "checkpoints").step == 2
    jobs.run(1, again)
    assert losses(killed) == pytest.approx(expected, rel=TOLERANCE)
    assert [event["step"] for event in events(killed) if "train/loss" in event].count(3) == 2, "was done again"


def test_a_teacher_begins_as_the_encoder_does_and_follows_it(shards, jobs, runs, tmp_path):
    init = runs / "objective" / "export"
    own = [f"--objective.name={TEACHER}", "--objective.teacher_momentum=0.75", f"--init.model={init}"]
    said = jobs.run(2, job(shards, tmp_path / "run", *own, "--engine.zero_stage=3", steps=1))
    assert "new: teacher, predictor" in said
    begun = load_file(init / "model.safetensors")
    saved = Checkpoint.open(tmp_path / "run" / "checkpoints" / "step-00000001").tensors("weight")
    names = [name.partition(".")[2] for name in saved if name.startswith("teacher.")]
    moved = [name for name in names if not torch.equal(saved[f"encoder.{name}"], begun[f"encoder.{name}"])]
    assert len(moved) > len(names) / 2
    for name in names:
        expected = begun[f"encoder.{name}"].lerp(saved[f"encoder.{name}"], 0.25)
        torch.testing.assert_close(saved[f"teacher.{name}"], expected, rtol=0, atol=1e-6)


def tensor_bytes(checkpoint: Path) -> int:
    """Without the headers of its files."""
    sizes = [(path.stat().st_size, path.read_bytes()[:8]) for path in checkpoint.glob("*.safetensors")]
    return sum(size - 8 - int.from_bytes(header, "little") for size, header in sizes)


@pytest.mark.usefixtures("on_path")
def test_a_plan_knows_what_of_an_objective_is_trained(shards, jobs, tmp_path, capsys):
    jobs.run(1, job(shards, tmp_path / "run", *OWN_OBJECTIVE, *OURS, steps=1))
    written = tensor_bytes(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert main(["plan", *OWN_OBJECTIVE, *OURS, "--cluster.gpus_per_node=2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["storage"]["checkpoint_bytes"] == written == 12 * plan["parameters"] - 8 * 4 * 12, "the mixture"
    assert plan["recommended"]["fits"]


BENCH = ["bench", "step", "--quick", "--batch=2", "--samples=250", "--threads=1"]


def test_a_bench_takes_steps_of_an_objective_and_an_encoder_with_their_optimizer(jobs, tmp_path):
    optimizer = [option for option in OWN_UPDATE if "engine" in option]
    jobs.run(1, [*BENCH, f"--out={tmp_path}", *OWN_OBJECTIVE, *OWN_ENCODER, *optimizer])
    (report,) = tmp_path.glob("*.json")
    (section,) = json.loads(report.read_text())["sections"]
    (own,) = {(case["preset"], case["objective"]) for case in section["settings"].values()}
    assert own == (ENCODER, OBJECTIVE)
    ways = {name.split("/")[-2] for name in section["scalars"] if name.endswith("ecg_per_s")}
    assert ways == {"ddp", "ecgscale"}, "the method of the paper has another encoder"


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--preset=tiny", *OWN_ENCODER], f"model.preset belongs to transformer, not to {ENCODER}"),
        (["--checkpointing=1", *OWN_OBJECTIVE, *OWN_ENCODER], "activation_checkpointing 1: the model has 0 layers"),
        (OWN_ENCODER, f"model.encoder {ENCODER}: does not go with objective.name wav2vec2+cmsc"),
    ],
)  # fmt: skip
def test_a_bench_refuses_what_an_encoder_has_not(given, said, tmp_path, refusal):
    assert said in refusal(*BENCH, f"--out={tmp_path}", *given)


def test_each_is_one_file_that_the_packages_do_not_know():
    files = [path for path in (TOYS / "toylab").glob("*.py") if path.stem not in ("__init__", "unfinished")]
    named = {name.partition(":")[0] for name in (OBJECTIVE, TEACHER, ENCODER, LAYOUT, TASK, OPTIMIZER, SCHEDULE)}
    assert {f"toylab.{path.stem}" for path in files} == named
    assert not [path for path in files if "toylab" in path.read_text()], "none leans on another"
    ours = [path for folder in ("ecgscale", "kernels", "launch", "configs") for path in (ROOT / folder).rglob("*")]
    assert not [path for path in ours if path.suffix in (".py", ".yaml") and "toylab" in path.read_text()]


def test_the_log_and_the_config_say_whose_code_it_is(runs):
    said = (runs / "said").read_text()
    assert f"objective.name {OBJECTIVE} from {TOYS / 'toylab' / 'amplitude.py'}" in said
    assert f"model.encoder {ENCODER} from {TOYS / 'toylab' / 'recurrent.py'}" in said
    config = yaml.safe_load((runs / "whole" / "config.yaml").read_text())
    assert config["objective"] == {"name": OBJECTIVE, "lead_mask_probability": 0.5, "mixtures": 4}
    assert config["model"] == {"encoder": ENCODER, "patch_samples": 25, "width": 8, "depth": 2}


def test_each_segment_that_the_objective_reads_is_a_row(runs):
    """One for the own objective, two for cmsc: so many tokens of 25 samples in a step of eight recordings."""
    for name, segments in (("whole", 1), ("encoder", 2)):
        first = next(event for event in events(runs / name) if "train/loss" in event)
        tokens_per_s, ecg_per_s = (first[f"throughput/{what}_per_s"] for what in ("tokens", "ecg"))
        assert tokens_per_s / ecg_per_s == pytest.approx(segments * 25), name


def test_an_export_holds_what_the_objective_exports(runs):
    said, whole = (runs / "said").read_text(), runs / "whole"
    about = json.loads((whole / "export" / "config.json").read_text())
    assert about["parts"] == ["encoder", "amplitude_head"]
    exported = load_file(whole / "export" / "model.safetensors")
    saved = Checkpoint.open(whole / "checkpoints" / f"step-{STEPS:08d}").tensors("weight")
    assert saved.keys() - exported.keys() == {"mixture.weight"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in exported.items())
    assert "an export leaves out mixture" in said


@pytest.mark.usefixtures("on_path")
def test_a_model_imports_nothing_unless_its_user_names_the_code(runs, tmp_path, refusal):
    export = runs / "whole" / "export"
    said = f"{export}: model.encoder '{ENCODER}' is code that is not ours; name it in your command to have it imported"
    for folder in (export, runs / "whole"):
        with pytest.raises(InputError, match="is code that is not ours"):
            ecgscale.load(folder)
    ecg = tmp_path / "ecg.npy"
    np.save(ecg, np.random.default_rng(0).normal(size=(12, 1500)).astype(np.float32))
    embed = ["embed", export, ecg, tmp_path / "out.npz", "--rate-hz=250"]
    assert said in refusal(*embed)
    assert said in refusal("inspect", export)
    assert said in refusal("finetune", "--init", export, "--data.shards=x", "--task.label=rhythm")
    assert said in refusal("pretrain", "--init", export, "--data.shards=x")
    assert f"its encoder is '{ENCODER}', not 'transformer'" in refusal(*embed, "--encoder=transformer")
    assert "toylab" not in sys.modules
    assert main([str(word) for word in [*embed, f"--encoder={ENCODER}"]]) == 0
    assert np.load(tmp_path / "out.npz")["record_embedding"].shape == (1, 8)
    assert ecgscale.load(runs / "whole", ENCODER).encoder.config.depth == 2
    assert main(["inspect", str(export), f"--encoder={ENCODER}"]) == 0
    assert main(["export", str(runs / "whole"), str(tmp_path / "again")]) == 0, "weights are copied without code"


def test_it_is_fine_tuned_evaluated_and_begun_with(shards, jobs, runs, tmp_path):
    init, task = ["--init", str(runs / "whole"), f"--init.encoder={ENCODER}"], ["--task.label=rhythm"]
    few = ["--task.min_positives=2", "--train.global_batch=8", "--train.steps=2", "--data.min_record_s=5"]
    task, data = [*task, "--task.kind=singlelabel"], [f"--data.shards={shards}"]
    said = jobs.run(
        1,
        ["finetune", *init, *task, *few, *data, f"--run.dir={tmp_path / 'tuned'}"],
        ["evaluate", str(tmp_path / "tuned"), *data, f"--encoder={ENCODER}", f"--out={tmp_path / 'report.json'}"],
        job(shards, tmp_path / "begun", "--init", str(runs / "whole"), *OWN, steps=1),
    )
    assert f"model.encoder {ENCODER} from {TOYS / 'toylab' / 'recurrent.py'}" in said
    assert f"begins with {runs / 'whole' / 'export'}, step {STEPS}: encoder, amplitude_head; new: mixture" in said
    assert json.loads((tmp_path / "report.json").read_text())["macro"]["auroc"]
    tuned = json.loads((tmp_path / "tuned" / "export" / "config.json").read_text())
    assert tuned["model"]["encoder"] == ENCODER
    assert tuned["parts"] == ["encoder", "head"]


def tuned(shards: Path, runs: Path, run: Path, *more: str) -> list[str]:
    places = ["--init", str(runs / "whole"), f"--init.encoder={ENCODER}", f"--data.shards={shards}"]
    few = ["--train.global_batch=8", "--train.steps=2", "--data.min_record_s=5", "--train.log_every=1"]
    return ["finetune", *places, f"--run.dir={run}", *few, *OWN_TASK, *more]


def test_a_task_is_learnt_scored_and_imported_where_its_user_names_it(shards, jobs, runs, tmp_path):
    run = tmp_path / "tuned"
    named = [f"--encoder={ENCODER}", f"--task={TASK}", f"--out={tmp_path / 'again.json'}"]
    said = jobs.run(1, tuned(shards, runs, run), ["evaluate", str(run), f"--data.shards={shards}", *named])
    assert f"task.kind {TASK} from {TOYS / 'toylab' / 'how_many.py'}" in said
    config = yaml.safe_load((run / "config.yaml").read_text())["task"]
    assert (config["kind"], config["codes"], config["most"]) == (TASK, "Dx", 3)
    assert {"label", "classes", "arcface_scale"}.isdisjoint(config)
    report = json.loads((run / "evaluation-test.json").read_text())
    assert report["recordings"] == report["coverage"]["used"] > 0
    assert report["headline"] == figures(run) == {"mean_error": report["mean_error"]["value"]}
    assert json.loads((tmp_path / "again.json").read_text())["mean_error"] == report["mean_error"]
    assert list(losses(run)) == [1, 2]
    assert json.loads((run / "export" / "config.json").read_text())["parts"] == ["encoder", "head"]


@pytest.mark.usefixtures("on_path")
def test_a_model_imports_no_task_by_itself(shards, make_model, tmp_path, refusal):
    model = make_model(classes=1)
    said = model.about | {"task": {"kind": TASK, "most": 3}, "min_record_s": 5.0}
    export = write_export(tmp_path / "export", export_weights(model), said)
    evaluate = ["evaluate", export, f"--data.shards={shards}"]
    assert refusal(*evaluate) == (
        f"ecgscale: {export}: task.kind '{TASK}' is code that is not ours; name it in your command to have it imported "
        "(evaluate --task NAME)\n"
    )
    assert f"its task is '{TASK}', not 'multilabel'" in refusal(*evaluate, "--task=multilabel")
    assert ecgscale.load(export).head is not None, "weights are read without code"
    assert summarise_model(export).count(f"task        {TASK}") == 1
    assert "toylab" not in sys.modules
    assert "the model takes 500 Hz, the shards have 250 Hz" in refusal(*evaluate, f"--task={TASK}")


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([f"--task.kind={TASK}x"], "has no class HowManyx; did you mean toylab.how_many:HowMany?"),
        ([f"--task.kind={OBJECTIVE}"], f"task.kind '{OBJECTIVE}': is no Task"),
        (["--task.kind=toylab.unfinished:NoScore"], "does not define objective, score of ecgscale.downstream.task."),
        ([*OWN_TASK, "--task.label=Dx"], f"task.label belongs to multilabel and singlelabel, not to {TASK}"),
        ([*OWN_TASK, "--task.most=0"], "task.most 0: give 1 or more"),
        ([*OWN_TASK, "--task.protocol=probe"], f"task.protocol probe: task.kind {TASK} has finetune alone"),
    ],
)
def test_a_task_that_does_not_fit_is_refused_in_one_line(given, said, refusal):
    assert said in refusal("finetune", *given, "--init=x", "--data.shards=x", "--run.dir=y")


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([f"--objective.name={OBJECTIVE}e"], "has no class Amplitudee; did you mean toylab.amplitude:Amplitude?"),
        (["--objective.name=toylab.nothing:X"], "cannot import toylab.nothing (No module named 'toylab.nothing')"),
        ([f"--objective.name={ENCODER}"], f"objective.name '{ENCODER}': is no Objective"),
        ([f"--model.encoder={OBJECTIVE}"], f"model.encoder '{OBJECTIVE}': is no Encoder"),
        (["--objective.name=toylab.unfinished:NoLoss"], "does not define loss of ecgscale.objectives.objective"),
        (["--objective.name=toylab.unfinished:NoConfig"], "its Config is no dataclass that derives from ecgscale."),
        (["--model.encoder=toylab.unfinished:NoDefault"], "its Config gives patch_samples no default"),
        ([*OWN, "--objective.negatives=3"], f"negatives belongs to wav2vec2 and wav2vec2+cmsc, not to {OBJECTIVE}"),
        ([*OWN, "--objective.mixture=3"], "unknown key objective.mixture; did you mean objective.mixtures?"),
        ([*OWN, "--objective.mixtures=0"], "objective.mixtures 0: give 1 or more"),
        ([*OWN, "--objective.mixtures=few"], "objective.mixtures"),
        ([*OWN, "--model.heads=3"], f"model.heads belongs to transformer, not to {ENCODER}"),
        ([*OWN, "--model.width=0"], "model.width 0: give 1 or more"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(given, said, refusal):
    assert said in refusal("pretrain", *given, "--data.shards=x", "--run.dir=y")


@pytest.mark.usefixtures("on_path")
def test_an_encoder_that_masks_no_tokens_does_not_go_with_the_local_objective(shards, tmp_path, refusal):
    given = [*SHORT, *OWN_ENCODER, f"--data.shards={shards}", f"--run.dir={tmp_path / 'run'}"]
    assert refusal("pretrain", *given) == (
        f"ecgscale: model.encoder {ENCODER}: does not go with objective.name wav2vec2+cmsc, which needs one that masks "
        "tokens\n"
    )
    assert not (tmp_path / "run").exists()
    assert f"model.encoder {ENCODER}: a plan knows the transformer alone" in refusal("plan", *given)


@pytest.mark.usefixtures("on_path")
def test_names_may_stand_in_a_config_file(tmp_path):
    given = {"objective": {"name": OBJECTIVE, "mixtures": 3}, "model": {"encoder": ENCODER}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(given))
    config = load_config(PretrainConfig, ["--config", str(tmp_path / "own.yaml")])
    assert (config.objective.mixtures, config.model.patch_samples) == (3, 25)


# --- a layout ---


@pytest.fixture
def csv_folder(tmp_path: Path, smooth_ecg) -> Path:
    """Six recordings of three people, two leads, and one that cannot be read."""
    folder = tmp_path / "ward" / "ecgs"
    folder.mkdir(parents=True)
    for number in range(6):
        lines = [",".join(f"{value:.4f}" for value in row) for row in smooth_ecg(250, 6, seed=number)[:2].T]
        (folder / f"p{number // 2}_{number}.csv").write_text("\n".join(["I,II", *lines]))
    (folder / "p9_9.csv").write_text("I,II\n0.1,x\n")
    return folder


def test_a_layout_is_read_by_workers_and_in_parts(csv_folder, jobs, tmp_path):
    how = [f"--layout={LAYOUT}", "--source-rate-hz=250", "--rate-hz=250", "--records-per-shard=2"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    jobs.run(
        1,
        ["ingest", str(csv_folder), str(whole), *how, "--workers=2"],
        *(["ingest", str(csv_folder), str(parted), *how, "--workers=1", f"--part={i}/2"] for i in (2, 1)),
        ["ingest", str(csv_folder.parent), str(parted), *how, "--merge"],
        ["verify", str(whole)],
    )
    files = sorted(path.name for path in whole.iterdir() if path.suffix in (".tar", ".csv"))
    assert len([name for name in files if name.endswith(".tar")]) == 3
    assert all((parted / name).read_bytes() == (whole / name).read_bytes() for name in files)
    assert "p9_9.csv: could not convert string" in (whole / "rejected.csv").read_text()
    shards = ShardSet.open(whole)
    assert (len(shards), len(np.unique(shards.column("patient")))) == (6, 3)
    record = shards.record(0)
    expected_LT = np.loadtxt(csv_folder / f"{record.name}.csv", delimiter=",", skiprows=1).T
    np.testing.assert_allclose(record.millivolts(), expected_LT, atol=2e-3)


@pytest.mark.usefixtures("on_path")
def test_it_is_said_whose_layout_it_is(csv_folder, tmp_path, capsys):
    how = [f"--layout={LAYOUT}", "--source-rate-hz=250", "--workers=1"]
    assert main(["ingest", str(csv_folder.parent), str(tmp_path / "out"), *how]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"layout {LAYOUT} from {TOYS / 'toylab' / 'csv_folder.py'}"
    assert second == f"{csv_folder}: 7 ECGs as CSV", "it lies a level deeper"


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no WFDB header (*.hea) in or below it"),
        ([f"--layout={LAYOUT}"], ".csv files say no sample rate; give --source-rate-hz"),
        ([f"--layout={LAYOUT}", "--unit=uV"], f"--unit does not go with layout {LAYOUT}, only with code15, npy"),
        (["--layout=toylab.csv_folder:Nothing"], "has no class Nothing; did you mean toylab.csv_folder:CsvFolder?"),
        ([f"--layout={LAYOUT}s"], "has no class CsvFolders; did you mean toylab.csv_folder:CsvFolder?"),
        ([f"--layout={TASK}"], f"layout '{TASK}': is no Layout"),
        (["--layout=toylab.unfinished:NoRead"], "does not define open, read of ecgscale.data.sources.layout.Layout"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_in_one_line(csv_folder, given, said, refusal, tmp_path):
    assert said in refusal("ingest", csv_folder, tmp_path / "out", *given)
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(csv_folder / "p0_0.csv", "p0_0.csv")
    whole = [f"--layout={LAYOUT}", "--source-rate-hz=250"]
    assert f"layout {LAYOUT} is not read from an archive" in refusal("ingest", packed, tmp_path / "out", *whole)


@pytest.mark.usefixtures("on_path")
def test_an_objective_of_more_segments_than_there_are_random_numbers_for_is_refused(shards, tmp_path, refusal):
    given = [*SHORT, *OURS, f"--data.shards={shards}", f"--run.dir={tmp_path / 'run'}"]
    said = refusal("pretrain", "--objective.name=toylab.unfinished:ThreeSegments", *given)
    assert "objective.name toylab.unfinished:ThreeSegments: reads 3 segments; give its class 1 or 2" in said
