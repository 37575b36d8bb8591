"""`ecgscale pretrain`: a config becomes a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ecgscale import progress
from ecgscale.config import PretrainConfig
from ecgscale.cost import step_flops
from ecgscale.data.batch import ECGBatch
from ecgscale.data.order import Order
from ecgscale.data.persons import apart
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.errors import InputError, MachineError
from ecgscale.export import Profile, about_model, described, export_engine, parts_of, read_model
from ecgscale.inference import check_weights, load, recordings_of
from ecgscale.lead_names import LEADS
from ecgscale.model import ENCODERS
from ecgscale.objectives import OBJECTIVES, Objective, build_objective
from ecgscale.registry import is_code
from ecgscale.run import claim_run
from ecgscale.run_folder import TENSORBOARD, leave_run, newest_checkpoint, newest_step
from ecgscale.trained_on import PRETRAINING, keep_trained_on
from ecgscale.training.loop import Job, TrainConfig, train
from ecgscale.training.monitor import board_of, project
from ecgscale.training.ranks import Ranks, log, start_ranks
from ecgscale.training.validation import Validation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pretrain(config: PretrainConfig) -> Path:
    """Train to the end, resuming where the run folder holds a checkpoint; returns the folder of the export."""
    ranks = start_ranks()
    kernels = config.model.kernels(ranks.device)
    shards = ShardSet.open(config.data.shards, config.data.cache)
    selection = Selection(shards, config.data, "train")
    order = config.train.order(selection, ranks.world_size)
    profile = Profile(shards.rate_hz, config.data.segment_s, config.data.normalisation)
    kind = OBJECTIVES.find(config.objective.name)
    codes = {key: getattr(config.objective, key) for key in kind.shape_keys}
    about = about_model(config.model, profile, codes=codes, leads=config.data.leads)
    kind.check(config.model, config.objective, config.data, shards.rate_hz)
    torch.manual_seed(config.train.seed)
    objective = build_objective(
        config.model, config.objective, config.train.seed, shards.rate_hz, config.engine.activation_checkpointing
    )
    about["parts"] = [part for part in parts_of(objective.state_dict()) if part not in kind.training_only]
    if config.init.model and newest_checkpoint(Path(config.run.dir)) is None:
        _begin_with(objective, Path(config.init.model), shards.rate_hz, ranks)
    objective.at_start()  # a checkpoint brings its own
    run = claim_run(config.run.dir, config, ranks)
    held_out = Selection(shards, config.data, "validation")
    for line in _told(config, selection, held_out, order, kernels) if ranks.first else ():
        log(ranks, line)
    keep_trained_on(run, config.init.model, PRETRAINING, selection, ranks)
    stream = TrainStream(selection, order, ranks.rank, ranks.world_size, kind.segments)
    contrast_rows = kind.segments * config.train.contrast
    progress.at(0, progress.START_UP)  # counting what a step computes takes seconds: a phase of its own
    flops = 0.0  # the first rank writes down for all
    if ranks.first:
        flops = step_flops(config.model, config.objective, stream.shape[0], selection.samples, contrast_rows)
    progress.at(0, progress.START_UP)
    job = Job(
        name="pretrain",
        run=run,
        objective=objective,
        stream=stream,
        train=config.train,
        engine=config.engine,
        config=asdict(config),
        patch_samples=config.model.patch_samples,
        about=about,
        identity=shards.identity,
        validate=Validation(
            held_out.some(config.train.validation_recordings, config.train.seed),
            config.train.contrast,
            kind.segments,
            config.train.seed,
        ),
        flops=flops,
        picture=lambda batch: masked_picture(batch, objective, config.data.segment_s),
    )
    engine = train(job, ranks)
    # A run that had gone further is exported as it is, also where fewer steps are asked for now.
    step = max(config.train.steps, newest_step(run))
    export = export_engine(run, engine, job.about, step)
    progress.at(config.train.steps, "")
    if ranks.first and config.train.projected_recordings:
        try:
            _project(run, export, held_out, config.train, config.model.encoder)
        except (InputError, MachineError) as error:  # a picture is no reason to fail
            log(ranks, f"no embeddings for the projector: {error}")
    leave_run(run)
    return export


def _told(
    config: PretrainConfig, selection: Selection, held_out: Selection, order: Order, kernels: str
) -> Iterator[str]:
    """What a run's log begins with: its recordings, whose code learns from them, and what is odd."""
    kind, data = OBJECTIVES.find(config.objective.name), config.data
    yield (
        f"{len(selection)} recordings for training, {order.batches_per_epoch} steps per epoch; "
        f"{selection.too_short} shorter than {data.min_record_s:g} s left out"
    )
    yield f"{len(held_out)} recordings for validation; {held_out.too_short} shorter left out"
    yield from apart(selection.shards)
    yield kernels
    for registry, name in ((OBJECTIVES, config.objective.name), (ENCODERS, config.model.encoder)):
        if is_code(name):
            yield f"{registry.key} {registry.place(name)}"
    if order.mixture is not None:
        yield f"shares: {', '.join(selection.shares(order.mixture))}"
    if data.min_record_s < kind.segments * data.segment_s:
        yield f"recordings shorter than {kind.segments * data.segment_s:g} s give shorter segments, padded"
    if kind.training_only:
        yield f"an export leaves out {', '.join(kind.training_only)}"


def _project(run: Path, export: Path, held_out: Selection, train_config: TrainConfig, encoder: str = "") -> None:
    """Embeddings of held-out recordings, named by patient and labels, for TensorBoard's projector."""
    shown = held_out.with_kept_leads().some(train_config.projected_recordings, train_config.seed)
    if not len(shown):
        return
    names = []
    for about in map(held_out.shards.metadata, shown.numbers.tolist()):
        labels = [f"{label} {'|'.join(values)}" for label, values in about["labels"].items()]
        names.append(", ".join([f"patient {about['patient']}", *labels]))
    embedding_RD = load(export, encoder).embed_recordings(recordings_of(shown)).record_embedding
    with board_of(run / TENSORBOARD) as board:
        project(board, "validation", embedding_RD, names, train_config.steps)


def _begin_with(objective: Objective, init: Path, rate_hz: float, ranks: Ranks) -> None:
    """Take over a model's weights: those of the encoder, and of each head that has the same tensors of the same shapes.

    Raises InputError for a model of another rate, and for one whose encoder does not fit or holds more.
    """
    place, weights, about = read_model(init)
    _, profile = described(place, about, objective.encoder.config.encoder)
    if profile.rate_hz != rate_hz:
        raise InputError(
            f"data.shards have {rate_hz:g} Hz, the model of init.model {init} takes {profile.rate_hz:g} Hz; "
            "ingest at its rate"
        )
    below = {name.partition(".")[2]: tensor for name, tensor in weights.items() if name.startswith("encoder.")}
    check_weights(objective.encoder, below, place)
    ours = objective.state_dict()
    new = list((about.get("source") or {}).get("absent", []))  # what the file that it was imported from had not
    taken: list[str] = []
    for part in dict.fromkeys(name.split(".")[0] for name in ours):
        names, theirs = ({name for name in named if name.startswith(f"{part}.")} for named in (ours, weights))
        fits = names == theirs and all(weights[name].shape == ours[name].shape for name in names)
        (taken if fits else new).append(part)
        ours |= {name: weights[name] for name in names if fits and name not in new}
    objective.load_state_dict(ours)
    log(ranks, f"begins with {place}, step {about.get('step', 0)}: {', '.join(taken)}; new: {', '.join(new) or 'none'}")


def masked_picture(batch: ECGBatch, objective: Objective, segment_s: float) -> Figure:
    """What the encoder sees of a batch's first segment: kept leads are black, masked time is shaded."""
    from matplotlib.figure import Figure  # imports slowly

    batch = objective.view(batch)
    draws, patch_samples = objective.draw(batch, share=False), objective.encoder.config.patch_samples
    value_LT = (batch.gain_BL[..., None] * (batch.signal_BLT - batch.offset_BL[..., None]))[0].numpy()
    time_T = np.linspace(0, segment_s, value_LT.shape[1], endpoint=False)
    figure = Figure(figsize=(9, 10), layout="constrained")
    kept_L = draws.lead_draw.keep_BL(len(LEADS))[0] if draws.lead_draw else torch.ones(len(LEADS), dtype=torch.bool)
    for i, (axes, kept) in enumerate(zip(figure.subplots(len(LEADS), sharex=True), kept_L, strict=True)):
        axes.plot(time_T, value_LT[i], color="black" if kept else "lightgrey", linewidth=0.7)
        axes.set_ylabel(LEADS[i] if kept else f"{LEADS[i]}\nmasked", rotation=0, ha="right", va="center")
        if draws.time_mask is not None:
            masked_T = draws.time_mask.masked_BN[0].repeat_interleave(patch_samples).numpy()
            span = axes.get_xaxis_transform()
            axes.fill_between(time_T[: len(masked_T)], 0, 1, masked_T, transform=span, color="tab:blue", alpha=0.2)
    figure.axes[-1].set_xlabel("s")
    return figure
