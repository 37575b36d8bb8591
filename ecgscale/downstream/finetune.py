"""`ecgscale finetune`: a pretrained encoder on a downstream task, by fine-tuning, linear probe or nearest neighbours.

Shape suffixes: R recordings.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ecgscale import progress
from ecgscale.cost import encoder_flops
from ecgscale.data.persons import apart
from ecgscale.data.stream import TrainStream
from ecgscale.downstream import TASKS, build_task
from ecgscale.downstream.board import show
from ecgscale.downstream.evaluate import Scored, evaluate
from ecgscale.downstream.finetune_config import FinetuneConfig
from ecgscale.downstream.labelled import LabelledSet
from ecgscale.downstream.task import Labelling, Task
from ecgscale.errors import InputError
from ecgscale.export import about_model, amend_export, export_engine, export_of_run
from ecgscale.inference import ECGModel, load
from ecgscale.lead_names import LEADS, chosen_leads
from ecgscale.model import ENCODERS, Encoder, build_encoder
from ecgscale.objectives.masking import draw_leads
from ecgscale.registry import is_code
from ecgscale.run import claim_run
from ecgscale.run_folder import EXPORT, TEST_REPORT, leave_run
from ecgscale.trained_on import FINE_TUNING, keep_trained_on
from ecgscale.training.loop import Job, train
from ecgscale.training.ranks import Ranks, log, start_ranks
from ecgscale.training.validation import Validation


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
    encoder, kind = config.init.encoder, config.task.kind
    scored = evaluate(run, config.data.shards, "test", out=report, encoder=encoder, task=kind)
    show(run, config.train.steps, scored)
    leave_run(run)
    return scored


def fit(config: FinetuneConfig, ranks: Ranks) -> Path:
    """Train and tune; the run folder, whose export is ready to be scored. All ranks call it together."""
    if not config.init.model:
        raise InputError("init.model is missing; give --init RUN_OR_EXPORT")
    task, model = build_task(config.task), load(config.init.model, config.init.encoder)
    labelled = LabelledSet.open(model, config.data, task, seed=config.train.seed, training=True)
    config = replace(config, data=labelled.data)  # with the preprocessing of the model, which is what is used
    model.encoder.recompute(config.engine.activation_checkpointing)
    if config.task.protocol == "finetune":  # before there is a run folder: too few recordings are refused
        config.train.order(labelled.selection("train"), ranks.world_size)
    run = claim_run(config.run.dir, config, ranks)
    patients = labelled.patients("train")
    if config.init.encoder:
        log(ranks, f"{ENCODERS.key} {ENCODERS.place(config.init.encoder)}")
    if is_code(config.task.kind):
        log(ranks, f"{TASKS.key} {TASKS.place(config.task.kind)}")
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
    learnt_from = labelled.selection("train")
    if config.task.protocol in task.untrained:
        learnt_from = learnt_from.none()
    keep_trained_on(run, begun_with, FINE_TUNING, learnt_from, ranks)
    about = _about(model, labelled, config) | task.about(labelled.labelling)
    if config.task.protocol == "finetune":
        _train(model, task, labelled, config, run, ranks, about)
    progress.at(config.train.steps, "")  # what follows is the first rank's alone
    if not ranks.first:
        return run
    if config.task.protocol != "finetune":
        head, more = task.fitted(model, labelled)
        _write(run, model, head, about | more)
    if task.tuned_keys:
        amend_export(run / EXPORT, **task.tuned(load(run / EXPORT, config.init.encoder), labelled))
    return run


def _about(model: ECGModel, labelled: LabelledSet, config: FinetuneConfig) -> dict[str, Any]:
    about: dict[str, Any] = {"task": asdict(config.task), "leads": config.data.leads}
    about["min_record_s"] = config.data.min_record_s
    about["coverage"] = {split: labelled.coverage(split).to_dict() for split in ("train", "validation")}
    return about_model(model.encoder.config, model.profile, **about)


def _supervised(
    task: Task, encoder: Encoder, labelling: Labelling, patient_R: npt.NDArray[np.int64], seed: int
) -> nn.Module:
    """The objective of a task; ``patient_R`` are those of the training recordings."""
    torch.manual_seed(seed)
    objective = task.objective(encoder, labelling, patient_R)
    if task.config.lead_mask_probability:
        objective.register_forward_pre_hook(partial(_mask_leads, task.config.lead_mask_probability, seed))
    return objective


def _mask_leads(probability: float, seed: int, objective: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random lead masking in front of a supervised objective, in training alone."""
    batch, *rest = arguments
    if objective.training:
        batch = batch.with_lead_draw(draw_leads(batch, seed, probability))
    return batch, *rest


def _train(
    model: ECGModel,
    task: Task,
    labelled: LabelledSet,
    config: FinetuneConfig,
    run: Path,
    ranks: Ranks,
    about: dict[str, Any],
) -> None:
    encoder, seed, labelling = model.encoder.cpu(), config.train.seed, labelled.labelling
    objective = _supervised(task, encoder, labelling, labelled.patients("train"), seed)
    if config.task.freeze_stem and not config.init.random:
        for module in encoder.stem_modules():
            module.requires_grad_(False)
    selection = labelled.selection("train")
    order = config.train.order(selection, ranks.world_size)
    target_RC = labelling.target_RC if labelling.target_RC.shape[1] else None
    held_out = labelled.selection("validation")
    held_out = held_out.some(config.train.validation_recordings, seed) if task.validated else held_out.none()
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
