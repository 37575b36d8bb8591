"""`ecgscale finetune`: encoder + linear head, or a linear probe, on a classification task.

Shape suffixes: B rows, R recordings, C classes, D width.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecgscale import progress
from ecgscale.config import FinetuneConfig
from ecgscale.data.batch import ECGBatch
from ecgscale.data.stream import TrainStream
from ecgscale.downstream.evaluate import LabelledSet, evaluate, tuned_thresholds
from ecgscale.downstream.metrics import auroc, macro
from ecgscale.downstream.report import Report
from ecgscale.errors import InputError
from ecgscale.export import about_model, amend_export, export_engine, write_export
from ecgscale.inference import ECGModel, load
from ecgscale.model.encoder import ECGEncoder, mean_over_time
from ecgscale.run import claim_run, leave_run
from ecgscale.training.loop import Job, train
from ecgscale.training.monitor import write_evaluation
from ecgscale.training.ranks import Ranks, log, start_ranks
from ecgscale.training.validation import Validation

Floats = npt.NDArray[np.float32]
_PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse L2 penalty of the probe, chosen on validation
_NEVER = -30.0  # logit of a class that the training split does not show


class Classification(nn.Module):
    """Encoder, mean over time, linear head; the loss of a labelled batch."""

    def __init__(self, encoder: ECGEncoder, classes: int, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self.head = nn.Linear(encoder.config.width, classes)
        encoder.mask.requires_grad_(False)  # fine-tuning masks nothing in time

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


def finetune(config: FinetuneConfig) -> Report | None:
    """Train on the training split, tune on validation, report on test; the report lies in the run folder too.

    Returns None on all ranks but the first.
    """
    ranks = start_ranks()
    if not config.init.model:
        raise InputError("init.model is missing; give --init RUN_OR_EXPORT")
    model = load(config.init.model)
    labelled = LabelledSet.open(model, config.data, config.task, seed=config.train.seed)
    config = replace(config, data=labelled.data)  # with the preprocessing of the model, which is what is used
    run = claim_run(config.run.dir, config, ranks)
    patients = labelled.patients("train")
    log(ranks, f"{len(patients)} labelled recordings of {len(set(patients.tolist()))} patients for training")
    if config.init.random:
        torch.manual_seed(config.train.seed)
        model = ECGModel(ECGEncoder(model.encoder.config), model.profile, None, model.about)
    if config.task.protocol == "finetune":
        _train(model, labelled, config, run, ranks)
    progress.at(config.train.steps, "")  # what follows is the first rank's alone
    if config.task.protocol == "probe" and ranks.first:
        _probe(model, labelled, config, run)
    if not ranks.first:
        return None
    log(ranks, f"evaluating {run}")
    amend_export(run / "export", thresholds=tuned_thresholds(load(run / "export"), labelled))
    report = evaluate(run, config.data.shards, "test", run / "evaluation-test.json")
    write_evaluation(run, config.train.steps, report.scalars())
    leave_run(run)
    return report


def _about(model: ECGModel, labelled: LabelledSet, config: FinetuneConfig) -> dict[str, Any]:
    return about_model(
        model.encoder.config,
        model.profile,
        task=asdict(config.task),
        classes=list(labelled.task.classes),
        challenge_weights=None if labelled.task.challenge is None else labelled.task.challenge.tolist(),
        min_record_s=config.data.min_record_s,
        leads=config.data.leads,
    )


def _train(model: ECGModel, labelled: LabelledSet, config: FinetuneConfig, run: Path, ranks: Ranks) -> None:
    selection, task = labelled.selection("train"), labelled.task
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
        patch_samples=model.encoder.config.patch_samples,
        about=_about(model, labelled, config),
        identity=labelled.shards.identity,
        validate=Validation(
            labelled.selection("validation").some(config.train.validation_recordings, config.train.seed),
            config.train.contrast,
            1,
            config.train.seed,
            task.target_RC,
        ),
    )
    export_engine(run / "export", train(job, ranks), job.about, config.train.steps)


def _probe(model: ECGModel, labelled: LabelledSet, config: FinetuneConfig, run: Path) -> None:
    """Logistic regression on standardised embeddings; its penalty is chosen by validation AUROC."""
    x = {s: model.embed_recordings(labelled.recordings(s)).record_embedding for s in ("train", "validation")}
    mean_D, std_D = x["train"].mean(axis=0), x["train"].std(axis=0) + 1e-6
    target_RC = labelled.targets("train")
    best: tuple[float, Floats, Floats] | None = None
    for strength in _PROBE_STRENGTHS:
        weight_CD, bias_C = _logistic((x["train"] - mean_D) / std_D, target_RC, labelled.task.kind, strength)
        weight_CD /= std_D
        bias_C -= weight_CD @ mean_D
        score = macro(auroc(labelled.targets("validation"), x["validation"] @ weight_CD.T + bias_C))
        if best is None or score > best[0]:
            best = (score, weight_CD, bias_C)
    assert best is not None
    weights = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    weights |= {"head.weight": torch.from_numpy(best[1]), "head.bias": torch.from_numpy(best[2])}
    write_export(run / "export", weights, _about(model, labelled, config))


def _logistic(x_RD: Floats, target_RC: Floats, kind: str, strength: float) -> tuple[Floats, Floats]:
    """Weights (C, D) and biases (C,) of one regression over all classes, or of one per class."""
    from sklearn.linear_model import LogisticRegression

    classes = target_RC.shape[1]
    weight_CD, bias_C = np.zeros((classes, x_RD.shape[1]), np.float32), np.full(classes, _NEVER, np.float32)
    regression = LogisticRegression(C=strength, max_iter=1000)
    if kind == "singlelabel":
        regression.fit(x_RD, target_RC.argmax(axis=1))
        seen = regression.classes_
        bias_C[seen] = 0.0
        fitted = seen[1:] if len(seen) == 2 else seen  # of two classes, scikit-learn gives the second against the first
        weight_CD[fitted], bias_C[fitted] = regression.coef_, regression.intercept_
        return weight_CD, bias_C
    for c, target_R in enumerate(target_RC.T):
        if target_R.any() and not target_R.all():
            regression.fit(x_RD, target_R)
            weight_CD[c], bias_C[c] = regression.coef_[0], regression.intercept_[0]
    return weight_CD, bias_C
