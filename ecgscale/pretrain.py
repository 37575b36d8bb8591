"""`ecgscale pretrain`: a config becomes a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ecgscale import progress
from ecgscale.config import PretrainConfig
from ecgscale.data.batch import ECGBatch
from ecgscale.data.selection import Selection
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.stream import TrainStream
from ecgscale.errors import InputError
from ecgscale.export import Profile, about_model, export_engine
from ecgscale.model.stem import check_kernels
from ecgscale.objectives import Pretraining, build_objective
from ecgscale.record import LEADS
from ecgscale.run import claim_run, leave_run
from ecgscale.training.loop import Job, train
from ecgscale.training.ranks import log, start_ranks
from ecgscale.training.validation import Validation
from ecgscale_kernels import LONGEST_PATCH

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEGMENTS = 2  # the global objective contrasts two adjacent segments of each recording


def pretrain(config: PretrainConfig) -> Path:
    """Train to the end, resuming where the run folder holds a checkpoint; returns the folder of the export."""
    ranks = start_ranks()
    kernels = check_kernels(ranks.device)
    if config.model.stem == "patch" and config.model.patch_samples > LONGEST_PATCH:
        kernels = "reference"
    shards = ShardSet.open(config.data.shards, config.data.cache)
    selection = Selection(shards, config.data, "train")
    order = config.train.order(selection, ranks.world_size)
    about = about_model(config.model, Profile(shards.rate_hz, config.data.segment_s, config.data.normalisation))
    _check_places(config, shards.rate_hz)
    torch.manual_seed(config.train.seed)
    objective = build_objective(
        config.model, config.objective, config.train.seed, config.engine.activation_checkpointing
    )
    run = claim_run(config.run.dir, config, ranks)
    log(ranks, f"{len(selection)} recordings for training, {order.batches_per_epoch} steps per epoch; "
               f"{selection.too_short} shorter than {config.data.min_record_s:g} s left out")  # fmt: skip
    log(ranks, f"{config.model.stem} stem, {kernels} kernels on {ranks.device.type}")
    if order.mixture is not None:
        log(ranks, f"shares: {', '.join(selection.shares(order.mixture))}")
    if config.data.min_record_s < SEGMENTS * config.data.segment_s:
        log(ranks, f"recordings shorter than {SEGMENTS * config.data.segment_s:g} s give shorter segments, padded")
    job = Job(
        name="pretrain",
        run=run,
        objective=objective,
        stream=TrainStream(selection, order, ranks.rank, ranks.world_size, SEGMENTS),
        train=config.train,
        engine=config.engine,
        config=asdict(config),
        patch_samples=config.model.patch_samples,
        about=about,
        identity=shards.identity,
        validate=Validation(
            Selection(shards, config.data, "validation").some(config.train.validation_recordings, config.train.seed),
            config.train.contrast,
            SEGMENTS,
            config.train.seed,
        ),
        picture=lambda batch: masked_picture(batch, objective, config.data.segment_s),
    )
    engine = train(job, ranks)
    export = export_engine(run / "export", engine, job.about, config.train.steps)
    progress.at(config.train.steps, "")
    leave_run(run)
    return export


def _check_places(config: PretrainConfig, rate_hz: float) -> None:
    """Raises InputError where a segment has too few masked tokens to tell one from another."""
    tokens = round(config.data.segment_s * rate_hz) // config.model.patch_samples
    if "wav2vec2" in config.objective.name and round(config.objective.time_mask_share * tokens) < 2:
        raise InputError(
            f"a segment of {config.data.segment_s:g} s gives {tokens} tokens of {config.model.patch_samples} samples, "
            "but the local objective needs two masked ones; lower model.patch_samples, give a longer data.segment_s "
            "or choose objective.name cmsc"
        )


def masked_picture(batch: ECGBatch, objective: Pretraining, segment_s: float) -> Figure:
    """What the encoder sees of a batch's first segment: kept leads are black, masked time is shaded."""
    from matplotlib.figure import Figure  # imports slowly

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
