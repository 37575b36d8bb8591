"""Trained models at work: give them ECGs, get embeddings or class scores.

Shape suffixes: R recordings, B rows (windows), L leads, T samples, N tokens, D width, C classes, K values of a window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ecgscale.data.batch import ECGBatch
from ecgscale.data.plausibility import check_geometry, checked
from ecgscale.data.remarked import NONE, Remarked, lines
from ecgscale.data.selection import Selection, zscore_gain
from ecgscale.data.shard_set import lead_positions
from ecgscale.data.units import mv_per_value
from ecgscale.errors import InputError, one_line
from ecgscale.export import Profile, described, read_model
from ecgscale.lead_names import LEADS, canonical_leads, chosen_leads
from ecgscale.model import Encoder, build_encoder
from ecgscale.model.base import mean_over_time
from ecgscale.model.stem import check_kernels
from ecgscale.record import Record, Remark, electrode_offset, pieces, resample_millivolts
from ecgscale.training.ranks import exact_fp32

_MIN_TAIL_S = 1.0  # a shorter rest of a recording is left out, unless it is all there is
_WINDOWS_AT_ONCE = 64
_NAMED_CLASSES = 6  # in a line

_LOG = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


class Recording(NamedTuple):
    """One ECG on its way into a model: value in mV = scale · signal."""

    signal_LT: npt.NDArray[Any]
    scale_L: Floats
    lead_positions: list[int]

    @staticmethod
    def of(record: Record) -> Recording:
        return Recording(record.signal_LT, record.scale_L, [LEADS.index(lead) for lead in record.leads])


def recordings_of(selection: Selection) -> Iterator[Recording]:
    """Recordings of a data set with the leads that its config keeps, in their order on disk; a progress bar.

    One that has none of them comes without any lead: ``Selection.with_kept_leads`` leaves such out.
    """
    kept, number_R, shards = frozenset(selection.config.lead_positions), selection.numbers, selection.shards
    signals = shards.windows(number_R, [0] * len(number_R), shards.take("samples", number_R).tolist())
    described = zip(signals, shards.take("leads", number_R).tolist(), shards.take("scale", number_R), strict=True)
    title = f"embed {selection.split}"
    for signal_LT, bits, scale_L in tqdm(described, title, len(number_R), unit="rec", disable=None, leave=False):
        there = lead_positions(bits)
        rows = [row for row, lead in enumerate(there) if lead in kept]
        at = [there[row] for row in rows]
        yield Recording(signal_LT if at == there else signal_LT[rows], scale_L[at], at)


class Embedding(NamedTuple):
    """What a model says of recordings."""

    record_embedding: Floats  # (R, D) mean over all tokens
    tokens: Floats | None  # (R, N, D), NaN behind the end of shorter recordings


class Neighbours(nn.Module):
    """Scores of classes by the training recordings that are most similar: k nearest neighbours by cosine."""

    centre: Tensor
    bank: Tensor
    target: Tensor
    _TEMPERATURE = 0.07  # of the neighbours' weights (Wu et al. 2018)
    _RAREST = 1e-4  # share that stands for none, since its logarithm must be finite

    def __init__(self, centre_D: Tensor, bank_RD: Tensor, target_RC: Tensor, k: int, multilabel: bool) -> None:
        """``bank`` holds the training recordings' embeddings minus ``centre``, of length 1."""
        super().__init__()
        self.k, self.multilabel = k, multilabel
        for name, tensor in (("centre", centre_D), ("bank", bank_RD), ("target", target_RC)):
            self.register_buffer(name, tensor)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """(B, C) logits, whose sigmoid or softmax is the neighbours' weighted share of each class."""
        unit_BD = nn.functional.normalize(embedding_BD - self.centre, dim=1)
        cosine_BK, index_BK = (unit_BD @ self.bank.T).topk(min(self.k, len(self.bank)), dim=1)
        weight_BK = (cosine_BK / self._TEMPERATURE).softmax(dim=1)
        share_BC = (weight_BK[..., None] * self.target[index_BK]).sum(dim=1)
        share_BC = share_BC.clamp(self._RAREST, 1 - self._RAREST)
        return share_BC.logit() if self.multilabel else share_BC.log()


class ECGModel:
    """A trained encoder, with a classification head if it was fine-tuned.

    On a GPU its convolutions are in fp32 without TF32, and with it all of the process: see ``exact_fp32``.
    """

    def __init__(self, encoder: Encoder, profile: Profile, head: nn.Module | None, about: dict[str, Any]) -> None:
        self.encoder, self.profile, self.head, self.about = encoder.eval(), profile, head, about
        self.leads = chosen_leads(about.get("leads", [])) or LEADS
        """That it was trained with; the others were masked."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_kernels(self.device)
        if self.device.type == "cuda":
            exact_fp32()
        self.encoder.to(self.device)
        if head is not None:
            head.to(self.device).eval()

    def __repr__(self) -> str:
        """One line: what it is, what it takes and what it says."""
        config, profile = self.encoder.config, self.profile
        parameters = sum(parameter.numel() for parameter in self.encoder.parameters())
        classes, head = self.about.get("classes") or [], "no head"
        if self.head is not None:
            more = ", …" if len(classes) > _NAMED_CLASSES else ""
            head = f"classes {', '.join(classes[:_NAMED_CLASSES])}{more} ({len(classes)})" if classes else "a head"
        return (
            f"<ECGModel: {config.in_short()}, {parameters:,} parameters; "
            f"takes {profile.rate_hz:g} Hz in windows of {profile.segment_s:g} s, {profile.normalisation}; "
            f"{head}; on {self.device}>"
        )

    def embed(
        self,
        signal_mv: npt.ArrayLike,
        rate_hz: float,
        leads: Sequence[str],
        tokens: bool = False,
        progress: bool = False,
        unit: str | None = None,
        mv_per_count: float | None = None,
    ) -> Embedding:
        """Embeddings of ECGs, in millivolts unless ``unit`` or ``mv_per_count`` says otherwise.

        Leads that training masked (see ``leads``) are masked here too, which is logged as a warning.
        Their numbers are checked as `ecgscale ingest` checks them: leads without a signal, or of NaN alone, are masked,
        and that and what else is odd is logged as a warning, see ``ecgscale.data.plausibility``.

        Args:
            signal_mv: (leads, samples) or (recordings, leads, samples). Masked floats of numpy.ma count as NaN.
            rate_hz: sample rate; other rates than the model's are resampled.
            leads: names of the leads of ``signal_mv``, any of the twelve in any order; the others are masked.
            tokens: also return one vector per 16 samples.
            progress: show a bar, in a terminal.
            unit: of floats: V, mV (also where nothing is said) or uV, with a factor where need be, such as 0.5mV.
            mv_per_count: of integers, which say no unit.

        Raises InputError for unknown leads, a shape that does not fit, NaN in a lead that has numbers too, integers
        without ``mv_per_count`` or with masked numbers, a rate or a duration that no ECG has, numbers that are no
        ECG's, recordings below one token, and where all leads that hold a signal are masked.
        """
        signal_RLT = _unmasked(signal_mv)
        if mv_per_count is not None and not 0 < mv_per_count < np.inf:
            raise InputError(f"mv_per_count {mv_per_count:g}: give a finite number above 0")
        mv_per_1 = mv_per_value(signal_RLT.dtype, unit, mv_per_count)
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
        rate_hz = float(rate_hz)  # numpy's own floats make no Fraction
        check_geometry(signal_RLT.shape[2], rate_hz)
        rows_R, remarks = _judged(signal_RLT, mv_per_1, names, rate_hz)
        log_remarks(remarks)
        if masked := [lead for lead in names if lead not in self.leads]:
            _LOG.warning("leads %s are masked, as in training: %s", ",".join(masked), self.trained_with())

        def recordings() -> Iterator[Recording]:
            bar = tqdm(signal_RLT, desc="embed", unit="rec", disable=None if progress else True)
            for signal_LT, rows in zip(bar, rows_R, strict=True):
                mv_LT = _millivolts(signal_LT, rows, mv_per_1)
                resampled_LT = resample_millivolts(mv_LT, rate_hz, self.profile.rate_hz)
                positions = [LEADS.index(names[row]) for row in rows]
                yield self.narrowed(Recording(resampled_LT, np.ones(len(rows), np.float32), positions))

        return self.embed_recordings(recordings(), tokens)

    def narrowed(self, recording: Recording) -> Recording:
        """Without the leads that training masked. Raises InputError where no lead is left."""
        at = recording.lead_positions
        rows = [row for row, position in enumerate(at) if LEADS[position] in self.leads]
        if not rows:
            raise InputError(f"none of its leads {','.join(LEADS[i] for i in at)} is left: {self.trained_with()}")
        if len(rows) == len(at):
            return recording
        return Recording(recording.signal_LT[rows], recording.scale_L[rows], [at[row] for row in rows])

    def trained_with(self) -> str:
        """In words, which leads it knows."""
        return f"the model was trained with {','.join(self.leads)} alone"

    def embed_recordings(self, recordings: Iterable[Recording], tokens: bool = False) -> Embedding:
        """Embeddings of recordings at the model's own rate, read one by one."""
        embedding_RD, token_parts = self._mean_over_windows(recordings, lambda mean_BD: mean_BD, tokens)
        return Embedding(embedding_RD, _stack_padded([np.concatenate(p) for p in token_parts]) if tokens else None)

    def logits(self, recordings: Iterable[Recording]) -> Floats:
        """(R, C) logits of a fine-tuned model, averaged over the windows of each recording."""
        return self.embed_and_classify(recordings)[1]

    def embed_and_classify(self, recordings: Iterable[Recording]) -> tuple[Floats, Floats]:
        """(R, D) embeddings and (R, C) logits, in one pass."""
        head = self.head
        if head is None:
            raise InputError("this model has no classification head; fine-tune it first")
        both, _ = self._mean_over_windows(recordings, lambda x_BD: torch.cat([x_BD, head(x_BD)], dim=1), False)
        width = self.encoder.config.width
        return both[:, :width], both[:, width:]

    def _mean_over_windows(
        self, recordings: Iterable[Recording], of: Callable[[Tensor], Tensor], keep_tokens: bool
    ) -> tuple[Floats, list[list[Floats]]]:
        """``of`` each window's mean token, averaged over a recording by the windows' tokens; and the tokens."""
        sums: list[Floats] = []
        weights: list[int] = []
        token_parts: list[list[Floats]] = []
        for batch, number_B in self._windows(recordings):
            with torch.no_grad():
                token_BND, valid_BN = self.encoder(batch)
                value_BK = of(mean_over_time(token_BND, valid_BN)).cpu().numpy()
            kept_B = (batch.length_B // self.encoder.config.patch_samples).tolist()
            for row, (number, kept) in enumerate(zip(number_B, kept_B, strict=True)):
                if number == len(sums):  # the first window of a recording
                    sums.append(np.zeros_like(value_BK[row]))
                    weights.append(0)
                    token_parts.append([])
                sums[number] += kept * value_BK[row]
                weights[number] += kept
                if keep_tokens:
                    token_parts[number].append(token_BND[row, :kept].float().cpu().numpy())
        if not sums:
            raise InputError("no recordings to embed")
        return np.stack(sums) / np.array(weights, np.float32)[:, None], token_parts

    def _windows(self, recordings: Iterable[Recording]) -> Iterator[tuple[ECGBatch, list[int]]]:
        """Batches of windows, and the number of the recording that each row is cut from."""
        windows = (
            (number, window)
            for number, recording in enumerate(recordings)
            for window in cut(recording, self.profile, self.encoder.config.patch_samples)
        )
        while rows := list(islice(windows, _WINDOWS_AT_ONCE)):
            yield _batch([window for _, window in rows]).to(self.device), [number for number, _ in rows]


def _unmasked(signal: npt.ArrayLike) -> npt.NDArray[Any]:
    """As an array, masked floats as NaN. Raises InputError for masked integers, which have no NaN."""
    parts = signal if isinstance(signal, list | tuple) else [signal]
    if not any(np.ma.isMaskedArray(part) for part in parts):
        return np.asarray(signal)
    masked: Any = np.ma.array(signal)
    if masked.dtype.kind == "f":
        values: npt.NDArray[Any] = masked.filled(np.nan)
        return values
    if n_masked := np.count_nonzero(np.ma.getmaskarray(masked)):
        raise InputError(
            f"{n_masked} of its numbers are masked; interpolate them, or give floats in which they are NaN"
        )
    return np.asarray(masked.data)


def _millivolts(signal_LT: npt.NDArray[Any], rows: Sequence[int], mv_per_1: float) -> Floats:
    """Some rows in mV. As when records are read, an offset that int16 could not hold is taken off."""
    mv_LT = np.empty((len(rows), signal_LT.shape[1]), np.float32)
    for mv_T, row in zip(mv_LT, rows, strict=True):
        offset_mv = electrode_offset(signal_LT[row], mv_per_1)
        for piece in pieces(len(mv_T)):
            mv_T[piece] = signal_LT[row, piece] * np.float64(mv_per_1) - offset_mv
    return mv_LT


def _judged(
    signal_RLT: npt.NDArray[Any], mv_per_1: float, leads: Sequence[str], rate_hz: float
) -> tuple[list[list[int]], list[tuple[str, Remark]]]:
    """Of each recording the rows that hold a signal; and what is odd, with the recordings' names."""
    rows_R: list[list[int]] = []
    odd: list[tuple[str, Remark]] = []
    for number, signal_LT in enumerate(signal_RLT):
        try:
            rows, remarks = checked(signal_LT, mv_per_1, leads, rate_hz)
        except InputError as error:
            raise type(error)(f"recording {number}: {error}" if len(signal_RLT) > 1 else str(error)) from error
        rows_R.append(rows)
        odd += [(f"recording {number}", remark) for remark in remarks]
    return rows_R, odd


def log_remarks(odd: Sequence[tuple[str, Remark]]) -> None:
    """One warning for each kind of remark on recordings, which come with their names."""
    remarked: dict[str, Remarked] = {}
    for name, remark in odd:
        named = f"{name} ({remark.detail})" if remark.detail else name
        remarked[remark.kind] = remarked.get(remark.kind, NONE).plus(named)
    for line in lines(remarked, None):  # the questions name options of ingest
        _LOG.warning("%s", line)


class _Window(NamedTuple):
    signal_LT: npt.NDArray[Any]
    gain_L: Floats
    offset_L: Floats
    length: int  # valid samples


def cut(recording: Recording, profile: Profile, patch_samples: int) -> Iterator[_Window]:
    """The adjacent windows of a recording, the last one filled up. A short rest is left out."""
    samples = round(profile.segment_s * profile.rate_hz)
    gain_L, offset_L = np.zeros((2, len(LEADS)), np.float32)
    at, dtype = recording.lead_positions, recording.signal_LT.dtype
    if profile.normalisation == "zscore":
        gain_L[at], offset_L[at] = zscore_gain(recording.signal_LT)
    else:
        gain_L[at] = recording.scale_L
    rest_L = np.rint(offset_L) if dtype.kind == "i" else offset_L  # behind the end stands zero mV, as in training
    for begin, end in _spans(recording.signal_LT.shape[1], samples, profile.rate_hz, patch_samples):
        window_LT = np.repeat(rest_L[:, None].astype(dtype), samples, axis=1)
        window_LT[at, : end - begin] = recording.signal_LT[:, begin:end]
        yield _Window(window_LT, gain_L, offset_L, end - begin)


def _spans(length: int, samples: int, rate_hz: float, patch_samples: int) -> list[tuple[int, int]]:
    """Begin and end of the adjacent windows of a recording."""
    if length < patch_samples:
        raise InputError(
            f"a recording of {length} samples at {rate_hz:g} Hz is shorter than one token of {patch_samples}"
        )
    spans = [(first, min(first + samples, length)) for first in range(0, length, samples)]
    if len(spans) > 1 and spans[-1][1] - spans[-1][0] < _MIN_TAIL_S * rate_hz:
        spans.pop()
    return spans


def _batch(windows: list[_Window]) -> ECGBatch:
    signals, gains, offsets, lengths = zip(*windows, strict=True)
    rows = len(windows)
    return ECGBatch(
        signal_BLT=torch.from_numpy(np.stack(signals)),
        gain_BL=torch.from_numpy(np.stack(gains)),
        offset_BL=torch.from_numpy(np.stack(offsets)),
        length_B=torch.tensor(lengths),
        patient_B=torch.zeros(rows, dtype=torch.int64),
        segment_B=torch.zeros(rows, dtype=torch.int64),
        position_B=torch.arange(rows),
        record_B=torch.zeros(rows, dtype=torch.int64),
        padded=min(lengths) < signals[0].shape[1],
    )


def _stack_padded(arrays: list[Floats]) -> Floats:
    longest = max(len(array) for array in arrays)
    stacked = np.full((len(arrays), longest, arrays[0].shape[1]), np.nan, np.float32)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked


def load(path: str | Path, encoder: str = "") -> ECGModel:
    """A model from a run folder or an export folder; raises InputError for anything else.

    ``encoder`` names the class of its encoder, package.module:Class, where that is not one of ours.
    """
    place, weights, about = read_model(Path(path))
    config, profile = described(place, about, encoder)
    built = build_encoder(config)
    head = _head(_below("head.", weights), about, config.width, place)
    load_weights(built, _below("encoder.", weights), place)
    return ECGModel(built, profile, head, about)


def _head(weights: dict[str, Tensor], about: dict[str, Any], width: int, place: Path) -> nn.Module | None:
    """Raises InputError for a head that does not fit an encoder of ``width``."""
    if not weights:
        return None
    if weights.keys() == {"centre", "bank", "target"}:
        k = about.get("neighbours", 0)
        exclusive = about.get("exclusive", "thresholds" not in about)  # earlier versions do not say it
        rows = len(weights["bank"])
        fits = [weights[name].shape for name in ("centre", "bank")] == [(width,), (rows, width)]
        if not fits or weights["target"].ndim != 2 or len(weights["target"]) != rows or k < 1:
            raise InputError(f"{place}: its neighbours are not those of an encoder of width {width}")
        _check_classes(about, weights["target"].shape[1], place)
        return Neighbours(weights["centre"], weights["bank"], weights["target"], k, not exclusive)
    classes = len(weights["weight"]) if "weight" in weights and weights["weight"].ndim else 1
    head = nn.Linear(width, classes)
    load_weights(head, weights, place)
    _check_classes(about, classes, place)
    return head


def _check_classes(about: dict[str, Any], classes: int, place: Path) -> None:
    """Raises InputError unless the outputs of a head have a name each, where they have names, and a threshold each."""
    names = about.get("classes", list(map(str, range(classes))))
    thresholds = about.get("thresholds", [None] * classes)
    if len(names) != classes or len(set(map(str, names))) != classes or not all(type(name) is str for name in names):
        shown = one_line(", ".join(map(str, names)))[:80]
        raise InputError(f"{place}: its head has {classes} outputs, for which {shown} are no {classes} names")
    if len(thresholds) != classes or not all(value is None or type(value) is float for value in thresholds):
        shown = one_line(", ".join(map(str, thresholds)))[:80]
        raise InputError(f"{place}: its head has {classes} outputs, for which {shown} are no {classes} thresholds")


def _below(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load all weights by name; raises InputError as ``check_weights`` does."""
    check_weights(module, weights, path)
    module.load_state_dict(weights)


def check_weights(module: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Raises InputError that lists what is missing, left over or of another shape."""
    ours = module.state_dict()
    wrong = [f"missing {n}" for n in ours.keys() - weights.keys()] + [
        f"left over {n}" for n in weights.keys() - ours.keys()
    ]
    wrong += [f"shape of {n}" for n in ours.keys() & weights.keys() if ours[n].shape != weights[n].shape]
    if wrong:
        raise InputError(f"{path}: weights do not fit the model: {', '.join(sorted(wrong)[:5])}")
