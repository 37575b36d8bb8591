"""`ecgscale finetune` and `ecgscale evaluate`: encoder + linear head, or a linear probe, on a classification task.

Shape suffixes: B rows, R recordings, C classes, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ecgscale.config import FinetuneConfig
from ecgscale.data.batch import ECGBatch
from ecgscale.data.shards import ShardSet, write_whole
from ecgscale.data.stream import DataConfig, Selection, TrainStream
from ecgscale.downstream.metrics import auroc, best_thresholds, macro
from ecgscale.downstream.report import Report
from ecgscale.downstream.report import evaluate as evaluate_scores
from ecgscale.downstream.tasks import Task, TaskConfig, load_task
from ecgscale.errors import InputError
from ecgscale.inference import ECGModel, Recording, about_model, export_engine, load, write_export
from ecgscale.model.encoder import ECGEncoder, mean_over_time
from ecgscale.run import claim_run, log
from ecgscale.training.engine import Ranks, start_ranks
from ecgscale.training.loop import Job, train
from ecgscale.training.monitor import write_evaluation
from ecgscale.training.validation import Validation

Floats = npt.NDArray[np.float32]
_PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse L2 penalty of the probe, chosen on validation


class Classification(nn.Module):
    """Encoder, mean over time, linear head; the loss of a labelled batch."""

    def __init__(self, encoder: ECGEncoder, classes: int, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self.head = nn.Linear(encoder.config.width, classes)
        encoder.mask_token.requires_grad_(False)  # fine-tuning masks nothing in time

    def forward(self, batch: ECGBatch, step: int = 0, share: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the rows: binary per class, or over the classes where each row has one."""
        embedding_BD = mean_over_time(*self.encoder(batch))
        logit_BC = self.head(embedding_BD.to(self.head.weight.dtype)).float()
        target_BC = batch.target_BC
        assert target_BC is not None
        if self.kind == "multilabel":
            loss = F.binary_cross_entropy_with_logits(logit_BC, target_BC)
        else:
            loss = F.cross_entropy(logit_BC, target_BC)
        return loss, {"loss": loss.detach()}


def finetune(config: FinetuneConfig) -> Report:
    """Train on the training split, tune on validation, report on test; the report lies in the run folder too."""
    ranks = start_ranks()
    if not config.init.model:
        raise InputError("init.model is missing; give --init.model RUN_OR_EXPORT")
    model = load(config.init.model)
    shards = ShardSet.open(config.data.shards)
    data = _data_of(model, config.data, shards)
    task = load_task(shards, config.task)
    run = claim_run(config.run.dir, config, ranks)
    if config.init.random:
        torch.manual_seed(config.train.seed)
        model.encoder = ECGEncoder(model.encoder.config)
    if config.task.protocol == "probe":
        if ranks.first:
            _probe(model, shards, data, task, config, run)
    else:
        _train(model, shards, data, task, config, run, ranks)
    log(ranks, f"evaluating {run}")
    report = evaluate(run, config.data.shards, "test", run / "evaluation-test.json", shown=ranks.first)
    if ranks.first:
        write_evaluation(run, config.train.steps, report.scalars())
    return report


def _data_of(model: ECGModel, config: DataConfig, shards: ShardSet) -> DataConfig:
    """The data config with the model's preprocessing; raises InputError where the shards have another rate."""
    profile = model.profile
    if shards.rate_hz != profile.rate_hz:
        raise InputError(
            f"the model takes {profile.rate_hz:g} Hz, the shards have {shards.rate_hz:g} Hz; ingest at the model's rate"
        )
    given = asdict(config) | {"segment_s": profile.segment_s, "normalisation": profile.normalisation}
    return DataConfig(**given)


def _about(model: ECGModel, task: Task, config: TaskConfig) -> dict[str, Any]:
    return about_model(model.encoder.config, model.profile, task=asdict(config), classes=list(task.classes))


def _train(
    model: ECGModel,
    shards: ShardSet,
    data: DataConfig,
    task: Task,
    config: FinetuneConfig,
    run: Path,
    ranks: Ranks,
) -> None:
    selection = Selection(shards, data, "train", task.labelled_R)
    order = config.train.order(selection, ranks.world_size)
    torch.manual_seed(config.train.seed)
    objective = Classification(model.encoder.cpu(), len(task.classes), task.kind)
    objective.encoder.activation_checkpointing = config.engine.activation_checkpointing
    if config.task.freeze_stem and not config.init.random:
        objective.encoder.stem.requires_grad_(False)
    job = Job(
        name="finetune",
        run=run,
        objective=objective.train(),
        stream=TrainStream(selection, order, ranks.rank, ranks.world_size, 1, task.target_RC),
        train=config.train,
        engine=config.engine,
        config=asdict(config),
        about=_about(model, task, config.task),
        identity=shards.identity,
        validate=Validation(
            Selection(shards, data, "validation", task.labelled_R),
            config.train.contrast,
            1,
            config.train.seed,
            task.target_RC,
        ),
    )
    export_engine(run / "export", train(job, ranks), job.about)


def _probe(model: ECGModel, shards: ShardSet, data: DataConfig, task: Task, config: FinetuneConfig, run: Path) -> None:
    """Logistic regression on standardised embeddings; its penalty is chosen by validation AUROC."""
    from sklearn.linear_model import LogisticRegression

    x = {
        s: model.embed_recordings(_recordings(shards, data, task, s)).record_embedding for s in ("train", "validation")
    }
    y = {s: _targets(Selection(shards, data, s, task.labelled_R), task) for s in x}
    mean_D, std_D = x["train"].mean(axis=0), x["train"].std(axis=0) + 1e-6
    best: tuple[float, Floats, Floats] | None = None
    for strength in _PROBE_STRENGTHS:
        weight_CD, bias_C = (
            np.zeros((len(task.classes), len(mean_D)), np.float32),
            np.zeros(len(task.classes), np.float32),
        )
        unit = (x["train"] - mean_D) / std_D
        if task.kind == "singlelabel":
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(unit, y["train"].argmax(axis=1))
            weight_CD[fitted.classes_], bias_C[fitted.classes_] = fitted.coef_, fitted.intercept_
        else:
            for c, target_R in enumerate(y["train"].T):
                fitted = LogisticRegression(C=strength, max_iter=1000).fit(unit, target_R)
                weight_CD[c], bias_C[c] = fitted.coef_[0], fitted.intercept_[0]
        weight_CD /= std_D
        bias_C -= weight_CD @ mean_D
        score = macro(auroc(y["validation"], x["validation"] @ weight_CD.T + bias_C))
        if best is None or score > best[0]:
            best = (score, weight_CD, bias_C)
    assert best is not None
    weights = {f"encoder.{name}": t for name, t in model.encoder.state_dict().items()}
    weights |= {"head.weight": torch.from_numpy(best[1]), "head.bias": torch.from_numpy(best[2])}
    write_export(run / "export", weights, _about(model, task, config.task))


def evaluate(
    model_path: Path | str, shard_folders: list[str], split: str, out: Path | None, shown: bool = True
) -> Report:
    """Score a fine-tuned model on a split; thresholds come from the validation split."""
    model = load(model_path)
    if model.head is None or "task" not in model.about:
        raise InputError(f"{model_path}: has no classification head; give a run of `ecgscale finetune`")
    shards = ShardSet.open(shard_folders)
    data = _data_of(model, DataConfig(), shards)
    task = load_task(shards, TaskConfig(**model.about["task"]), model.about["classes"])
    label, score = {}, {}
    for name in dict.fromkeys(("validation", split)):
        selection = Selection(shards, data, name, task.labelled_R)
        label[name] = _targets(selection, task)
        score[name] = _probabilities(model.logits(_recordings(shards, data, task, name, shown)), task.kind)
    if task.kind == "multilabel":
        prediction = score[split] >= best_thresholds(label["validation"], score["validation"])
    else:
        prediction = np.eye(len(task.classes), dtype=bool)[score[split].argmax(axis=1)]
    selection = Selection(shards, data, split, task.labelled_R)
    patients = shards.column("patient")[selection.numbers()]
    report = evaluate_scores(label[split], score[split], prediction, task.classes, patients, task.challenge)
    if out is not None:
        about = {"model": str(model_path), "shards": shard_folders, "split": split} | report.to_dict()
        write_whole(out, json.dumps(about, indent=1).encode())
    return report


def _probabilities(logit_RC: Floats, kind: str) -> Floats:
    logits = torch.from_numpy(logit_RC)
    probability_RC: Floats = (logits.sigmoid() if kind == "multilabel" else logits.softmax(dim=1)).numpy()
    return probability_RC


def _recordings(shards: ShardSet, data: DataConfig, task: Task, split: str, shown: bool = True) -> Iterator[Recording]:
    """The labelled recordings of a split, in their order on disk."""
    selection = Selection(shards, data, split, task.labelled_R)
    for shard_number, record in tqdm(
        selection.in_order(), desc=f"embed {split}", unit="rec", disable=None if shown else True, leave=False
    ):
        shard = shards.shards[shard_number]
        at = shard.lead_positions(record)
        yield Recording(shard.signal(record), shard.columns["scale"][record][at], at)


def _targets(selection: Selection, task: Task) -> Floats:
    return task.target_RC[selection.numbers()]
