"""The formats that a model can be written in."""

from __future__ import annotations

from pathlib import Path

from ecgscale.export import export_run

FORMATS = ("safetensors", "fairseq", "onnx")


def export_as(run: Path, out: Path, form: str, encoder: str = "") -> str:
    """The newest state of a run, or an export, in one of FORMATS; returns what to print."""
    if form == "fairseq":
        from ecgscale.interop.fairseq import export_checkpoint

        return export_checkpoint(run, out)
    if form == "onnx":
        from ecgscale.interop.onnx_model import export_onnx

        return export_onnx(run, out, encoder)
    return f"export: {export_run(run, out)}"
