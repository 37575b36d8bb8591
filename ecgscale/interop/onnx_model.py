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
from ecgscale.data.selection import zscore_gain
from ecgscale.errors import InputError
from ecgscale.inference import ECGModel, load
from ecgscale.interop.output import refuse_foreign, write_over
from ecgscale.lead_names import LEADS
from ecgscale.model.base import mean_over_time
from ecgscale_kernels import forced

INPUT = "signal"
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
    about |= {key: model.about[key] for key in ("classes", "step") if key in model.about}
    about["trained_leads"] = list(model.leads)
    program.model.metadata_props[_MARK] = json.dumps(about)
    program.model.metadata_props["leads"] = ",".join(LEADS)
    difference, inputs = 0.0, 0

    def write(path: Path) -> None:
        nonlocal difference, inputs
        program.save(path, external_data=False)
        difference, inputs = _largest_difference(model, path)

    write_over(out, ".onnx", _is_ours, write)
    outputs = ", ".join(_outputs(model))
    masked = "" if model.leads == LEADS else f"\nleads: all others are masked in the file, as {model.trained_with()}"
    return (
        f"export: {out}, {outputs} of {INPUT} (batch, {len(LEADS)}, samples) in mV{masked}\n"
        f"checked: onnxruntime and PyTorch differ by {difference:.1e} at most, over {inputs} inputs"
    )


class _Graph(nn.Module):
    """What the file computes. Missing leads are zero; a flat lead is as good as missing to the z-score.

    Leads that training masked are masked here too: whatever their samples are, they count as zero.
    """

    def __init__(self, model: ECGModel) -> None:
        super().__init__()
        self.encoder, self.head, self.zscore = model.encoder, model.head, model.profile.normalisation == "zscore"
        self.masked_L = [lead not in model.leads for lead in LEADS]

    def forward(self, signal: Tensor) -> tuple[Tensor, ...]:
        """(B, 12, T) millivolts -> tokens (B, N, D), their mean (B, D) and, with a head, logits (B, C)."""
        if any(self.masked_L):
            signal = signal.masked_fill(torch.tensor(self.masked_L)[:, None], 0.0)
        signal_BLT = _zscored(signal) if self.zscore else signal
        token_BND, _ = self.encoder(_batch(signal_BLT, torch.ones_like(signal_BLT[..., 0])))
        embedding_BD = mean_over_time(token_BND, None)
        return (token_BND, embedding_BD) if self.head is None else (token_BND, embedding_BD, self.head(embedding_BD))


def _zscored(signal_BLT: Tensor) -> Tensor:
    """Each lead minus its mean over its deviation, over the given samples; zeros where it is flat."""
    wide_BLT = signal_BLT.double()  # in which the mean of equal samples is each of them, so that flat stays flat
    centred_BLT = wide_BLT - wide_BLT.mean(dim=2, keepdim=True)
    std_BL1 = centred_BLT.square().mean(dim=2, keepdim=True).sqrt()
    return torch.where(std_BL1 > 0, centred_BLT / torch.where(std_BL1 > 0, std_BL1, 1.0), 0.0).float()


def _batch(signal_BLT: Tensor, gain_BL: Tensor, offset_BL: Tensor | None = None) -> ECGBatch:
    """Rows without padding; what the encoder does not look at is zero."""
    rows = signal_BLT.shape[0]
    zeros_B = torch.zeros(rows, dtype=torch.int64)
    nothing: dict[str, Any] = dict.fromkeys(("length_B", "patient_B", "segment_B", "position_B", "record_B"), zeros_B)
    offset_BL = torch.zeros_like(gain_BL) if offset_BL is None else offset_BL
    return ECGBatch(signal_BLT, gain_BL, offset_BL, padded=False, **nothing)


def _program(model: ECGModel) -> Any:
    """The traced model, of any batch and length."""
    graph, patch = _Graph(model).eval(), _patch(model)
    example_BLT = torch.randn(2, len(LEADS), 8 * patch)
    sizes = {INPUT: {0: Dim("batch"), 2: Dim("samples", min=patch)}}
    with forced("reference"), torch.no_grad(), _quiet():
        return torch.onnx.export(
            graph,
            (example_BLT,),
            input_names=[INPUT],
            output_names=_outputs(model),
            dynamic_shapes=sizes,
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
    """Between a file in onnxruntime and the model in PyTorch, over all outputs, and over how many inputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    noise, largest, inputs = np.random.default_rng(0), 0.0, 0
    segment, patch = round(model.profile.segment_s * model.profile.rate_hz), _patch(model)
    for rows in (1, 3):
        for samples in (segment, segment + patch // 2 + 1, patch):
            for leads in _LEAD_SETS:
                inputs += 1
                signal_BLT = np.zeros((rows, len(LEADS), samples), np.float32)
                signal_BLT[:, leads] = 0.3 + noise.standard_normal((rows, len(leads), samples), np.float32)
                for name, found, right in zip(
                    _outputs(model), session.run(None, {INPUT: signal_BLT}), _right(model, signal_BLT), strict=True
                ):
                    difference = float(np.abs(found - right).max()) if found.shape == right.shape else float("inf")
                    if not difference <= _TOLERANCE * max(1.0, float(np.abs(right).max())):
                        raise InputError(
                            f"{path}: {name} of {rows} × {len(leads)} leads × {samples} samples is off by "
                            f"{difference:.1e} in onnxruntime; nothing was written"
                        )
                    largest = max(largest, difference)
    return largest, inputs


def _right(model: ECGModel, signal_BLT: Floats) -> list[Floats]:
    """The outputs by the way that PyTorch goes at inference: gains and offsets, zero for missing leads."""
    kept_L = np.array([lead in model.leads for lead in LEADS])
    signal_BLT = np.where(kept_L[:, None], signal_BLT, np.float32(0))
    gain_BL: Floats = np.asarray(signal_BLT.any(axis=2), np.float32)
    offset_BL: Floats = np.zeros(gain_BL.shape, np.float32)
    if model.profile.normalisation == "zscore":
        for row, signal_LT in enumerate(signal_BLT):
            gain_BL[row], offset_BL[row] = zscore_gain(signal_LT)
    batch = _batch(*(torch.from_numpy(array) for array in (signal_BLT, gain_BL, offset_BL)))
    with torch.no_grad():
        token_BND, _ = model.encoder(batch)
        embedding_BD = mean_over_time(token_BND, None)
        outputs = [token_BND, embedding_BD] + ([] if model.head is None else [model.head(embedding_BD)])
    return [output.numpy() for output in outputs]


def _outputs(model: ECGModel) -> list[str]:
    return ["tokens", "embedding"] + ([] if model.head is None else ["logits"])


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
