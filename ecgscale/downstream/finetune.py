"""`ecgscale finetune`: a pretrained encoder on a downstream task, by fine-tuning, linear probe or nearest neighbours.

Shape suffixes: B rows, R recordings, C classes, D width.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecgscale import progress
from ecgscale.config import FinetuneConfig
from ecgscale.cost import encoder_flops
from ecgscale.data.batch import ECGBatch
from ecgscale.data.persons import apart
from ecgscale.data.selection import Selection
from ecgscale.data.stream import TrainStream
from ecgscale.downstream.board import show
from ecgscale.downstream.evaluate import LabelledSet, Scored, evaluate, tuned_thresholds
from ecgscale.downstream.identification import Identification
from ecgscale.downstream.metrics import auroc, macro
from ecgscale.downstream.tasks import TaskConfig
from ecgscale.errors import InputError
from ecgscale.export import about_model, amend_export, export_engine, export_of_run
from ecgscale.inference import ECGModel, Neighbours, load
from ecgscale.model import ENCODERS, Encoder, build_encoder
from ecgscale.model.base import mean_over_time
from ecgscale.objectives.masking import draw_leads
from ecgscale.record import LEADS, chosen_leads
from ecgscale.run import claim_run
from ecgscale.run_folder import EXPORT, TEST_REPORT, leave_run
from ecgscale.trained_on import FINE_TUNING, keep_trained_on
from ecgscale.training.loop import Job, train
from ecgscale.training.ranks import Ranks, log, start_ranks
from ecgscale.training.validation import Validation

Floats = npt.NDArray[np.float32]
_PROBE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse L2 penalty of the probe, chosen on validation
_NEIGHBOURS = (5, 10, 20, 50, 100)  # how many vote, chosen on validation
_NEVER = -30.0  # logit of a class that the training split does not show


class Classification(nn.Module):
    """Encoder, mean over time, linear head; the loss of a labelled batch."""

    def __init__(self, encoder: Encoder, classes: int, kind: str) -> None:
        super().__init__()
        self.encoder, self.kind = encoder, kind
        self.head = nn.Linear(encoder.config.width, classes)
        for module in encoder.unused_unmasked():  # fine-tuning masks nothing in time
            module.requires_grad_(False)

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


def finetune(config: FinetuneConfig) -> list[Scored] | None:
    """Train on the training split, tune on validation, score on test; the report lies in the run folder too.

    Returns None on all ranks but the first.
    """
    ranks = start_ranks()
    run = fit(config, ranks)
    if not ranks.first:
        return None
    log(ranks, f"evaluating {run}")
    report = run / TEST_REPORT
    scored = evaluate(run, config.data.shards, "test", out=report, encoder=config.init.encoder)
    show(run, config.train.steps, scored)
    leave_run(run)
    return scored


def fit(config: FinetuneConfig, ranks: Ranks) -> Path:
    """Train and tune; the run folder, whose export is ready to be scored. All ranks call it together."""
    if not config.init.model:
        raise InputError("init.model is missing; give --init RUN_OR_EXPORT")
    model = load(config.init.model, config.init.encoder)
    labelled = LabelledSet.open(model, config.data, config.task, seed=config.train.seed, training=True)
    config = replace(config, data=labelled.data)  # with the preprocessing of the model, which is what is used
    model.encoder.recompute(config.engine.activation_checkpointing)
    if config.task.protocol == "finetune":  # before there is a run folder: too few recordings are refused
        config.train.order(labelled.selection("train"), ranks.world_size)
    run = claim_run(config.run.dir, config, ranks)
    patients = labelled.patients("train")
    if config.init.encoder:
        log(ranks, f"{ENCODERS.key} {ENCODERS.place(config.init.encoder)}")
    log(ranks, f"{len(patients)} labelled recordings of {len(set(patients.tolist()))} patients for training")
    log(ranks, f"read as the model takes it: {model.profile.rate_hz:g} Hz, segments of {labelled.data.segment_s:g} s, "
               f"{labelled.data.normalisation}")  # fmt: skip
    if new := [lead for lead in chosen_leads(config.data.leads) or LEADS if lead not in model.leads]:
        log(ranks, f"leads {','.join(new)} are new to it: {model.trained_with()}")
    log(ranks, labelled.coverage("train").text("used"))
    log(ranks, labelled.coverage("validation").text("used"))
    for line in apart(labelled.shards) if ranks.first else ():
        log(ranks, line)
    if config.init.random:
        torch.manual_seed(config.train.seed)
        anew = build_encoder(model.encoder.config, config.engine.activation_checkpointing)
        model = ECGModel(anew, model.profile, None, model.about)
    begun_with = "" if config.init.random else config.init.model
    keep_trained_on(run, begun_with, FINE_TUNING, _learnt_from(labelled, config.task), ranks)
    about = _about(model, labelled, config)
    if config.task.protocol == "finetune":
        _train(model, labelled, config, run, ranks, about)
    progress.at(config.train.steps, "")  # what follows is the first rank's alone
    if not ranks.first:
        return run
    if config.task.protocol == "neighbours":
        _neighbours(model, labelled, run, about)
    elif config.task.protocol == "probe" and config.task.kind == "identification":
        _write(run, model, {}, about)
    elif config.task.protocol == "probe":
        _probe(model, labelled, run, about)
    if config.task.kind == "multilabel":
        amend_export(run / EXPORT, thresholds=tuned_thresholds(load(run / EXPORT, config.init.encoder), labelled))
    return run


def _learnt_from(labelled: LabelledSet, task: TaskConfig) -> Selection:
    """The recordings that change a model; a probe for identification is the encoder as it was."""
    selection = labelled.selection("train")
    return selection.none() if (task.protocol, task.kind) == ("probe", "identification") else selection


def _about(model: ECGModel, labelled: LabelledSet, config: FinetuneConfig) -> dict[str, Any]:
    about: dict[str, Any] = {"task": asdict(config.task), "leads": config.data.leads}
    about["min_record_s"] = config.data.min_record_s
    about["coverage"] = {split: labelled.coverage(split).to_dict() for split in ("train", "validation")}
    if config.task.kind != "identification":
        challenge = labelled.task.challenge
        about["classes"] = list(labelled.task.classes)
        about["challenge_weights"] = None if challenge is None else challenge.tolist()
    return about_model(model.encoder.config, model.profile, **about)


def _supervised(
    encoder: Encoder, classes: int, task: TaskConfig, patient_R: npt.NDArray[np.int64], seed: int
) -> Classification | Identification:
    """The objective of a task; ``patient_R`` are those of the training recordings."""
    torch.manual_seed(seed)
    objective: Classification | Identification
    if task.kind == "identification":
        objective = Identification(encoder, np.unique(patient_R), task.arcface_scale, task.arcface_margin)
    else:
        objective = Classification(encoder, classes, task.kind)
    if task.lead_mask_probability:
        objective.register_forward_pre_hook(partial(_mask_leads, task.lead_mask_probability, seed))
    return objective


def _mask_leads(probability: float, seed: int, objective: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random lead masking in front of a supervised objective, in training alone."""
    batch, *rest = arguments
    if objective.training:
        batch = batch.with_lead_draw(draw_leads(batch, seed, probability))
    return batch, *rest


def _train(
    model: ECGModel, labelled: LabelledSet, config: FinetuneConfig, run: Path, ranks: Ranks, about: dict[str, Any]
) -> None:
    encoder, seed = model.encoder.cpu(), config.train.seed
    classes = len(labelled.task.classes)
    objective = _supervised(encoder, classes, config.task, labelled.patients("train"), seed)
    if config.task.freeze_stem and not config.init.random:
        for module in encoder.stem_modules():
            module.requires_grad_(False)
    selection = labelled.selection("train")
    order = config.train.order(selection, ranks.world_size)
    held_out, target_RC = labelled.selection("validation"), None
    if config.task.kind == "identification":  # whose persons the head does not know
        held_out = held_out.none()
    else:
        held_out, target_RC = held_out.some(config.train.validation_recordings, seed), labelled.task.target_RC
    stream = TrainStream(selection, order, ranks.rank, ranks.world_size, 1, target_RC)
    job = Job(
        name="finetune",
        run=run,
        objective=objective.train(),
        stream=stream,
        train=config.train,
        engine=config.engine,
        config=asdict(config),
        patch_samples=model.encoder.config.patch_samples,
        about=about,
        identity=labelled.shards.identity,
        validate=Validation(held_out, config.train.contrast, 1, seed, target_RC),
        flops=encoder_flops(encoder, stream.shape[0], selection.samples),
    )
    export_engine(run, train(job, ranks), job.about, config.train.steps)


def _write(run: Path, model: ECGModel, head: dict[str, Tensor], about: dict[str, Any]) -> None:
    weights = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    weights |= {f"head.{name}": tensor for name, tensor in head.items()}
    export_of_run(run, weights, about)


def _probe(model: ECGModel, labelled: LabelledSet, run: Path, about: dict[str, Any]) -> None:
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
    _write(run, model, {"weight": torch.from_numpy(best[1]), "bias": torch.from_numpy(best[2])}, about)


def _neighbours(model: ECGModel, labelled: LabelledSet, run: Path, about: dict[str, Any]) -> None:
    """The training recordings as a bank; how many of them vote is chosen by validation AUROC."""
    x_RD, held_out_RD = (
        torch.from_numpy(model.embed_recordings(labelled.recordings(split)).record_embedding)
        for split in ("train", "validation")
    )
    centre_D = x_RD.mean(dim=0)
    bank_RD, target_RC = F.normalize(x_RD - centre_D, dim=1), torch.from_numpy(labelled.targets("train"))

    def score(k: int) -> float:
        votes = Neighbours(centre_D, bank_RD, target_RC, k, labelled.task.kind == "multilabel")
        return macro(auroc(labelled.targets("validation"), votes(held_out_RD).numpy()))

    best = max(_NEIGHBOURS, key=score)
    _write(run, model, {"centre": centre_D, "bank": bank_RD, "target": target_RC}, about | {"neighbours": best})


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
