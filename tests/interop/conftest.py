"""Checkpoints of the reference implementation, made from small models of ours by the exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ecgscale.cli import main
from ecgscale.export import Profile, about_model, write_export
from ecgscale.interop.fairseq import export_checkpoint
from ecgscale.model.encoder import ECGEncoder, ModelConfig
from ecgscale.objectives.wav2vec2 import LocalHead


@pytest.fixture
def command(capsys) -> Callable[..., str]:
    """Runs a command line that succeeds; what it printed."""

    def run(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return run


@pytest.fixture(scope="session")
def make_export(small_model_config) -> Callable[..., Path]:
    """Writes an export of random weights, with the local objective's head or with one of fine-tuning."""

    def make(
        folder: Path,
        model: ModelConfig = small_model_config,
        profile: Profile = Profile(500.0, 5.0, "mv"),  # noqa: B008
        codes: tuple[int, int, int] = (2, 6, 8),
        classes: int = 0,
        persons: int = 0,
        **about: Any,
    ) -> Path:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = {f"encoder.{n}": t for n, t in ECGEncoder(model).state_dict().items()}
            weights |= {n: t + 0.1 * torch.randn(t.shape) for n, t in weights.items()}  # no bias is left at zero
            if classes:
                weights |= {"head.weight": torch.randn(classes, model.width), "head.bias": torch.randn(classes)}
            if persons:
                weights["arcface.weight"] = torch.randn(persons, model.width)
            if not classes and not persons:
                groups, values, width = codes
                head = LocalHead(model.stem_channels, model.width, width, groups, values)
                weights |= {f"local_head.{n}": t for n, t in head.state_dict().items()}
                about["codes"] = {"code_groups": groups, "codes": values, "code_width": width}
        return write_export(folder, weights, about_model(model, profile, step=7, **about))

    return make


@pytest.fixture(scope="session")
def written() -> Callable[[Path, dict], Path]:
    """Writes a checkpoint file."""

    def write(path: Path, state: Any) -> Path:
        torch.save(state, path)
        return path

    return write


@pytest.fixture
def read() -> Callable[[Path], dict]:
    return lambda path: torch.load(path, weights_only=True)


@pytest.fixture
def pretrained(make_export, tmp_path, read) -> dict:
    """The content of a pretrained checkpoint as the reference itself would write it."""
    export_checkpoint(make_export(tmp_path / "ours"), tmp_path / "made.pt")
    return foreign(read(tmp_path / "made.pt"))


@pytest.fixture
def fine_tuned(make_export, tmp_path, read) -> dict:
    """The content of a checkpoint with a classification head of three."""
    export_checkpoint(make_export(tmp_path / "tuned", classes=3), tmp_path / "made-tuned.pt")
    return foreign(read(tmp_path / "made-tuned.pt"))


def foreign(state: dict) -> dict:
    """Without what only our files say."""
    del state["extra_state"]["ecgscale"]
    del state["cfg"]["task"]["sample_rate"]
    return state
