"""Exports and their use: give a trained model ECGs, get embeddings or class scores.

An export is ``config.json`` + ``model.safetensors`` with everything needed to use the encoder: its shape, its weights
and the preprocessing profile that it was trained with.

Shape suffixes: R recordings, B rows (windows), L leads, T samples, N tokens, D width, C classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ecgscale.data.batch import ECGBatch
from ecgscale.data.shards import write_whole
from ecgscale.data.stream import zscore_gain
from ecgscale.errors import InputError
from ecgscale.model.encoder import ECGEncoder, ModelConfig, mean_over_time
from ecgscale.model.stem import SAMPLES_PER_PATCH
from ecgscale.record import LEADS, Record, canonical_leads, resample_millivolts
from ecgscale.training.checkpoint import Checkpoint, latest, open_tensors
from ecgscale.training.engine import Engine

FORMAT = "ecgscale-export/1"
_MIN_TAIL_S = 1.0  # a shorter rest of a recording is left out, unless it is all there is
_WINDOWS_AT_ONCE = 64

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Profile:
    """The preprocessing that a model was trained with. Feeding it anything else fails silently, so it travels along."""

    rate_hz: float
    segment_s: float
    normalisation: str  # mv or zscore
    leads: tuple[str, ...] = LEADS

    def __post_init__(self) -> None:
        if not (self.rate_hz > 0 and self.segment_s * self.rate_hz >= SAMPLES_PER_PATCH):
            raise InputError(f"profile: rate_hz {self.rate_hz} and segment_s {self.segment_s} give no token")
        if self.normalisation not in ("mv", "zscore"):
            raise InputError(f"profile: normalisation {self.normalisation!r}; known are mv and zscore")
        if self.leads != LEADS:
            raise InputError(f"profile: leads {self.leads}; this version knows {LEADS}")


class Recording(NamedTuple):
    """One ECG on its way into a model: value in mV = scale · signal."""

    signal_LT: npt.NDArray[Any]
    scale_L: Floats
    lead_positions: list[int]

    @staticmethod
    def of(record: Record) -> Recording:
        return Recording(record.signal_LT, record.scale_L, [LEADS.index(lead) for lead in record.leads])


class Embedding(NamedTuple):
    """What a model says of recordings."""

    record_embedding: Floats  # (R, D) mean over all tokens
    tokens: Floats | None  # (R, N, D), NaN behind the end of shorter recordings


class ECGModel:
    """A trained encoder, with a classification head if it was fine-tuned."""

    def __init__(self, encoder: ECGEncoder, profile: Profile, head: nn.Linear | None, about: dict[str, Any]) -> None:
        self.encoder, self.profile, self.head, self.about = encoder.eval(), profile, head, about
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder.to(self.device)
        if head is not None:
            head.to(self.device).eval()

    def embed(self, signal_mv: npt.ArrayLike, rate_hz: float, leads: Sequence[str], tokens: bool = False) -> Embedding:
        """Embeddings of ECGs in millivolts.

        Args:
            signal_mv: (leads, samples) or (recordings, leads, samples).
            rate_hz: sample rate; other rates than the model's are resampled.
            leads: names of the leads, any subset of the twelve in any order; the others are masked.
            tokens: also return one vector per 16 samples.

        Raises InputError for unknown leads, a shape that does not fit, NaN, and recordings below one token.
        """
        given = np.asarray(signal_mv)
        if given.dtype.kind not in "fiu":
            raise InputError(f"signal of type {given.dtype}: give real numbers, in millivolts")
        signal_RLT = given.astype(np.float32, copy=False)
        if signal_RLT.ndim == 2:
            signal_RLT = signal_RLT[None]
        names = canonical_leads(leads)
        if signal_RLT.ndim != 3 or signal_RLT.shape[1] != len(names):
            raise InputError(
                f"signal of shape {signal_RLT.shape}: give (leads, samples) or (recordings, leads, samples), "
                f"with the {len(names)} leads that are named"
            )
        if not signal_RLT.size:
            raise InputError(f"signal of shape {signal_RLT.shape} is empty; give at least one lead and one sample")
        if not 1 <= rate_hz <= 100_000:
            raise InputError(f"rate_hz {rate_hz}: give the sample rate in Hz, from 1 to 100000")
        rate_hz = float(rate_hz)  # numpy's own floats make no Fraction
        if not np.isfinite(signal_RLT).all():
            raise InputError("the signal holds NaN or infinity; all samples must be finite millivolts")
        positions = [LEADS.index(name) for name in names]
        ones_L = np.ones(len(names), np.float32)
        recordings = (
            Recording(resample_millivolts(signal_LT, rate_hz, self.profile.rate_hz), ones_L, positions)
            for signal_LT in signal_RLT
        )
        return self.embed_recordings(recordings, tokens)

    def embed_recordings(self, recordings: Iterable[Recording], tokens: bool = False) -> Embedding:
        """Embeddings of recordings at the model's own rate."""
        embeddings, all_tokens = [], []
        for batch, rows in self._windows(recordings):
            with torch.no_grad():
                token_BND, valid_BN = self.encoder(batch)
            mean_BD = mean_over_time(token_BND, valid_BN).cpu()
            kept_B = batch.length_B.cpu() // SAMPLES_PER_PATCH
            for row in rows:
                weight_B1 = kept_B[row].float()[:, None]
                embeddings.append(((mean_BD[row] * weight_B1).sum(0) / weight_B1.sum()).numpy())
                if tokens:
                    all_tokens.append(np.concatenate([token_BND[b, : kept_B[b]].float().cpu().numpy() for b in row]))
        return Embedding(np.stack(embeddings), _stack_padded(all_tokens) if tokens else None)

    def logits(self, recordings: Iterable[Recording]) -> Floats:
        """(R, C) logits of a fine-tuned model, averaged over the windows of each recording."""
        if self.head is None:
            raise InputError("this model has no classification head; fine-tune it first")
        rows_of = []
        for batch, rows in self._windows(recordings):
            with torch.no_grad():
                logit_BC = self.head(mean_over_time(*self.encoder(batch))).cpu()
            weight_B1 = (batch.length_B.cpu() // SAMPLES_PER_PATCH)[:, None].float()
            rows_of += [((logit_BC[row] * weight_B1[row]).sum(0) / weight_B1[row].sum()).numpy() for row in rows]
        return np.stack(rows_of)

    def _windows(self, recordings: Iterable[Recording]) -> Iterator[tuple[ECGBatch, list[list[int]]]]:
        """Batches of adjacent windows, and which rows belong to each recording."""
        samples = round(self.profile.segment_s * self.profile.rate_hz)
        per_batch = max(1, _WINDOWS_AT_ONCE // 2)
        waiting = iter(recordings)
        while chunk := list(islice(waiting, per_batch)):
            yield (
                _window_batch(chunk, samples, self.profile).to(self.device),
                _row_numbers(chunk, samples, self.profile.rate_hz),
            )


def _spans(length: int, samples: int, rate_hz: float) -> list[tuple[int, int]]:
    """Begin and end of the adjacent windows of a recording."""
    if length < SAMPLES_PER_PATCH:
        raise InputError(
            f"a recording of {length} samples at {rate_hz:g} Hz is shorter than one token of {SAMPLES_PER_PATCH}"
        )
    spans = [(first, min(first + samples, length)) for first in range(0, length, samples)]
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < _MIN_TAIL_S * rate_hz:
        spans.pop()
    return spans


def _row_numbers(chunk: list[Recording], samples: int, rate_hz: float) -> list[list[int]]:
    counts = [len(_spans(recording.signal_LT.shape[1], samples, rate_hz)) for recording in chunk]
    firsts = np.cumsum([0, *counts])
    return [list(range(first, first + count)) for first, count in zip(firsts[:-1].tolist(), counts, strict=True)]


def _window_batch(chunk: list[Recording], samples: int, profile: Profile) -> ECGBatch:
    signals, gains, offsets, lengths = [], [], [], []
    for recording in chunk:
        gain_L, offset_L = np.zeros((2, len(LEADS)), np.float32)
        at = recording.lead_positions
        if profile.normalisation == "zscore":
            gain_L[at], offset_L[at] = zscore_gain(recording.signal_LT)
        else:
            gain_L[at] = recording.scale_L
        dtype = recording.signal_LT.dtype
        rest_L = np.rint(offset_L) if dtype.kind == "i" else offset_L  # behind the end stands zero mV, as in training
        for begin, end in _spans(recording.signal_LT.shape[1], samples, profile.rate_hz):
            window_LT = np.repeat(rest_L[:, None].astype(dtype), samples, axis=1)
            window_LT[at, : end - begin] = recording.signal_LT[:, begin:end]
            signals.append(window_LT)
            gains.append(gain_L)
            offsets.append(offset_L)
            lengths.append(end - begin)
    rows = len(signals)
    return ECGBatch(
        signal_BLT=torch.from_numpy(np.stack(signals)),
        gain_BL=torch.from_numpy(np.stack(gains)),
        offset_BL=torch.from_numpy(np.stack(offsets)),
        length_B=torch.tensor(lengths),
        patient_B=torch.zeros(rows, dtype=torch.int64),
        segment_B=torch.zeros(rows, dtype=torch.int64),
        position_B=torch.arange(rows),
        padded=min(lengths) < samples,
    )


def _stack_padded(arrays: list[Floats]) -> Floats:
    longest = max(len(array) for array in arrays)
    stacked = np.full((len(arrays), longest, arrays[0].shape[1]), np.nan, np.float32)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


# -- exports ---------------------------------------------------------------------------------------------------------


def write_export(folder: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> Path:
    """Write ``encoder.*`` and ``head.*`` weights with what is to be known about them; complete or absent."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        used = {
            name: tensor.float().contiguous().cpu()
            for name, tensor in weights.items()
            if name.startswith(("encoder.", "head."))
        }
        save_file(used, partial / "model.safetensors")
        write_whole(partial / "config.json", json.dumps(about | {"format": FORMAT}, indent=1, sort_keys=True).encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    except (OSError, SafetensorError, InputError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{folder}: cannot write the export: {error}") from error
    return folder


def about_model(model: ModelConfig, profile: Profile, **task: Any) -> dict[str, Any]:
    """What an export's config.json says."""
    return {"model": asdict(model), "profile": asdict(profile)} | task


def export_engine(folder: Path, engine: Engine, about: dict[str, Any]) -> Path:
    """The engine's weights as an export. All ranks call it together."""
    weights = {name: engine.weight(name).cpu() for name in engine.shapes}
    if engine.ranks.first:
        write_export(folder, weights, about)
    dist.barrier()
    return folder


def export_run(run: Path, out: Path) -> Path:
    """The newest checkpoint of a run as an export; refuses to overwrite anything that is no export."""
    if out.exists():
        try:
            _read_about(out)
        except InputError as error:
            raise InputError(f"{out}: exists and is no export; give a new folder") from error
    _, weights, about = _read(run, from_checkpoint=True)
    return write_export(out, weights, about)


def load(path: str | Path) -> ECGModel:
    """A model from a run folder or an export folder; raises InputError for anything else."""
    place, weights, about = _read(Path(path))
    try:
        encoder = ECGEncoder(ModelConfig(**about["model"]))
        profile = Profile(**about["profile"] | {"leads": tuple(about["profile"]["leads"])})
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{place}: does not describe a model of this version ({error})") from error
    head = None
    if "head.weight" in weights:
        head = nn.Linear(weights["head.weight"].shape[1], weights["head.weight"].shape[0])
        load_weights(head, _below("head.", weights), place)
    load_weights(encoder, _below("encoder.", weights), place)
    return ECGModel(encoder, profile, head, about)


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load all weights by name; raises InputError that lists what is missing, left over or of another shape."""
    ours = module.state_dict()
    wrong = [f"missing {n}" for n in ours.keys() - weights.keys()] + [
        f"left over {n}" for n in weights.keys() - ours.keys()
    ]
    wrong += [f"shape of {n}" for n in ours.keys() & weights.keys() if ours[n].shape != weights[n].shape]
    if wrong:
        raise InputError(f"{path}: weights do not fit the model: {', '.join(sorted(wrong)[:5])}")
    module.load_state_dict(weights)


def _read(path: Path, from_checkpoint: bool = False) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Place, weights and description of an export, of the export of a run, or of a run's newest checkpoint."""
    if not from_checkpoint:
        for folder in (path, path / "export"):
            if (folder / "config.json").is_file():
                return folder, *_read_export(folder)
    checkpoint = latest(path / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{path}: neither an export (config.json) nor a run folder with checkpoints")
    return checkpoint.folder, checkpoint.tensors("weight"), _about_checkpoint(checkpoint)


def _read_export(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    about, path = _read_about(folder), folder / "model.safetensors"
    tensors = open_tensors(path)
    weights = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    for name in weights:
        if not name.startswith(("encoder.", "head.")):
            raise InputError(f"{path}: left over {name}; an export holds encoder.* and head.* alone")
    return weights, about


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / "config.json").read_bytes())
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'config.json'}: damaged ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{folder / 'config.json'}: not the config of an ecgscale export (format {FORMAT!r})")
    return about


def _about_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    about = checkpoint.state["about"]
    assert isinstance(about, dict)
    return about
