"""Models as ONNX files: millivolts in, tokens, embedding and logits out, checked in onnxruntime before they are kept.

Shape suffixes: B rows, L leads, T samples, N tokens, D width, C classes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim

from ecgscale.data.batch import ECGBatch
from ecgscale.errors import InputError
from ecgscale.inference import ECGModel, Recording, cut, load
from ecgscale.interop.output import refuse_foreign, write_over
from ecgscale.lead_names import LEADS
from ecgscale.model.base import mean_over_time, valid_tokens
from ecgscale_kernels import forced

_NEEDED = ("onnx", "onnxruntime", "onnxscript")
_MARK = "ecgscale"  # key of the metadata in files that we write
_LARGEST_BYTES = 2_000_000_000  # of a protobuf, which an ONNX file is
_TOLERANCE = 1e-4  # of the largest value of an output
_LEAD_SETS = (tuple(range(12)), (0, 1, 7), (1,))  # all, three and one

Floats = npt.NDArray[np.float32]


def export_onnx(run: Path, out: Path, encoder: str = "") -> str:
    """A run's newest state, or an export, as an ONNX file; returns what to print.

    Raises InputError where the packages are missing, and where onnxruntime does not give what PyTorch gives.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise InputError(f"--format onnx needs {', '.join(missing)}; pip install 'ecgscale[onnx]'")
    refuse_foreign(out, ".onnx", _is_ours)
    model = load(run, encoder)
    model.encoder.cpu()
    if model.head is not None:
        model.head.cpu()
    if (size := sum(4 * p.numel() for p in model.encoder.parameters())) > _LARGEST_BYTES:
        raise InputError(f"{run}: {size / 1e9:.1f} GB of weights; an ONNX file holds at most {_LARGEST_BYTES / 1e9:g}")
    program = _program(model)
    about: dict[str, Any] = {"profile": asdict(model.profile), "units": "mV", "patch_samples": _patch(model)}
    about["window_samples"] = _samples(model)
    about |= {key: model.about[key] for key in ("classes", "step") if key in model.about}
    about["trained_leads"] = list(model.leads)
    program.model.metadata_props[_MARK] = json.dumps(about)
    program.model.metadata_props["leads"] = ",".join(LEADS)
    difference, recordings = 0.0, 0

    def write(path: Path) -> None:
        nonlocal difference, recordings
        program.save(path, external_data=False)
        difference, recordings = _largest_difference(model, path)

    write_over(out, ".onnx", _is_ours, write)
    outputs = ", ".join(_outputs(model))
    inputs = "length" if model.profile.normalisation == "mv" else "length, mean and deviation of the recording"
    masked = "" if model.leads == LEADS else f"\nleads: all others are masked in the file, as {model.trained_with()}"
    return (
        f"export: {out}, {outputs} of signal (batch, {len(LEADS)}, {_samples(model)}) in mV, {inputs}{masked}\n"
        f"checked: onnxruntime and PyTorch differ by {difference:.1e} at most, over {recordings} recordings"
    )


class _Graph(nn.Module):
    """What the file computes of windows, which are cut and filled up as `embed` does. Missing leads are zero.

    Leads that training masked are masked here too: whatever their samples are, they count as zero.
    """

    def __init__(self, model: ECGModel) -> None:
        super().__init__()
        self.encoder, self.head, self.patch = model.encoder, model.head, _patch(model)
        self.masked_L = [lead not in model.leads for lead in LEADS]

    def forward(
        self, signal: Tensor, length: Tensor, mean: Tensor | None = None, deviation: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Millivolts (B, 12, T), of which the first ``length`` (B,) samples count -> the outputs.

        They are tokens (B, N, D), NaN behind the end, their mean (B, D) and, with a head, logits (B, C). A model of
        z-scores also takes mean and deviation (B, 12) of each lead over its whole recording, in mV.
        """
        if any(self.masked_L):
            signal = signal.masked_fill(torch.tensor(self.masked_L)[:, None], 0.0)
        if mean is not None and deviation is not None:
            signal = signal - mean[..., None]
            signal = torch.where(deviation[..., None] > 0, signal / deviation[..., None], 0.0)
        sample_T = torch.arange(signal.shape[-1])
        signal = torch.where(sample_T < length[:, None, None], signal, 0.0)
        token_BND, _ = self.encoder(_batch(signal, length))
        valid_BN = valid_tokens(length // self.patch, token_BND.shape[1])
        embedding_BD = mean_over_time(token_BND, valid_BN)
        token_BND = torch.where(valid_BN[..., None], token_BND, torch.nan)
        return (token_BND, embedding_BD) if self.head is None else (token_BND, embedding_BD, self.head(embedding_BD))


def _batch(signal_BLT: Tensor, length_B: Tensor) -> ECGBatch:
    """Windows in mV; what the encoder does not look at is zero."""
    zeros_B, ones_BL = torch.zeros_like(length_B), torch.ones_like(signal_BLT[..., 0])
    nothing: dict[str, Any] = dict.fromkeys(("patient_B", "segment_B", "position_B", "record_B"), zeros_B)
    return ECGBatch(signal_BLT, ones_BL, torch.zeros_like(ones_BL), length_B=length_B, padded=True, **nothing)


def _program(model: ECGModel) -> Any:
    """The traced model, of any number of windows."""
    rows, samples = 2, _samples(model)
    values: dict[str, Tensor] = {"signal": torch.randn(rows, len(LEADS), samples)}
    values["length"] = torch.tensor([samples, samples // 2])
    if model.profile.normalisation == "zscore":
        values |= {"mean": torch.zeros(rows, len(LEADS)), "deviation": torch.ones(rows, len(LEADS))}
    with forced("reference"), torch.no_grad(), _quiet():
        return torch.onnx.export(
            _Graph(model).eval(),
            tuple(values.values()),
            input_names=list(values),
            output_names=_outputs(model),
            dynamic_shapes={name: {0: Dim("batch")} for name in values},
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch 2.13 and onnxscript tell their own developers, and without "torchvision is missing"."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _largest_difference(model: ECGModel, path: Path) -> tuple[float, int]:
    """Between a file in onnxruntime and `embed` in PyTorch, over all outputs, and over how many recordings."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    noise, largest, recordings = np.random.default_rng(0), 0.0, 0
    samples, patch = _samples(model), _patch(model)
    for length in (patch, round(0.4 * samples), samples, samples + patch // 2 + 1, round(2.4 * samples)):
        for leads in _LEAD_SETS:
            recordings += 1
            signal_LT = 0.3 + noise.standard_normal((len(leads), max(patch, length)), np.float32)
            try:
                recording = model.narrowed(Recording(signal_LT, np.ones(len(leads), np.float32), [*leads]))
            except InputError:
                continue  # training masked all of these leads
            for name, of_file, right in zip(
                _outputs(model), _in_onnxruntime(session, model, recording), _right(model, recording), strict=True
            ):
                difference = float(np.abs(of_file - right).max()) if of_file.shape == right.shape else float("inf")
                if not difference <= _TOLERANCE * max(1.0, float(np.abs(right).max())):
                    raise InputError(
                        f"{path}: {name} of {len(leads)} leads × {signal_LT.shape[1]} samples is off by "
                        f"{difference:.1e} in onnxruntime; nothing was written"
                    )
                largest = max(largest, difference)
    return largest, recordings


def _in_onnxruntime(session: Any, model: ECGModel, recording: Recording) -> list[Floats]:
    """The outputs of a recording: its windows in the file, averaged by their tokens. docs/models.md shows the same."""
    windows = [*cut(recording, model.profile, _patch(model))]
    given: dict[str, Any] = {
        "signal": np.stack([window.signal_LT for window in windows]),
        "length": np.array([window.length for window in windows]),
    }
    if model.profile.normalisation == "zscore":
        gain_BL = np.stack([window.gain_L for window in windows])
        given["mean"] = np.stack([window.offset_L for window in windows])
        given["deviation"] = np.divide(1, gain_BL, out=np.zeros_like(gain_BL), where=gain_BL > 0)
    token_BND, *means = session.run(None, given)
    tokens_B = given["length"] // _patch(model)
    token_ND = np.concatenate([token_ND[:n] for token_ND, n in zip(token_BND, tokens_B, strict=True)])
    return [token_ND, *(np.average(mean_BK, axis=0, weights=tokens_B).astype(np.float32) for mean_BK in means)]


def _right(model: ECGModel, recording: Recording) -> list[Floats]:
    """The outputs of a recording as `embed` and `evaluate` have them."""
    embedding = model.embed_recordings([recording], tokens=True)
    assert embedding.tokens is not None
    outputs = [embedding.tokens[0], embedding.record_embedding[0]]
    return outputs if model.head is None else [*outputs, model.logits([recording])[0]]


def _outputs(model: ECGModel) -> list[str]:
    return ["tokens", "embedding"] + ([] if model.head is None else ["logits"])


def _samples(model: ECGModel) -> int:
    """Of a window."""
    return round(model.profile.segment_s * model.profile.rate_hz)


def _patch(model: ECGModel) -> int:
    return model.encoder.config.patch_samples


def _is_ours(path: Path) -> bool:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        read = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError):
        return False
    return any(entry.key == _MARK for entry in read.metadata_props)
