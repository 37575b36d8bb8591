"""`ecgscale evaluate`, `embed`, `export` and `import-fairseq`: trained models at work, and on their way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ecgscale.commands.command import Command
from ecgscale.lead_names import parse_renames
from ecgscale.settings import option


@dataclass(frozen=True, kw_only=True)
class Evaluate(Command):
    """Score a fine-tuned model on a split of a data set, with bootstrap intervals, by one lead set or many.

    `--leads 12 6 4 3 2 1` scores it on each lead set of the CinC 2021 challenge, the other leads masked.
    """

    model: Path = option(positional=True)
    """Run folder or export of `ecgscale finetune`."""
    shards: list[str] = option(name="data.shards")
    """Data set folders."""
    split: Literal["train", "validation", "test"] = "test"
    """Which recordings."""
    leads: list[str] = option(default_factory=list, several=True, metavar="SET [SET ...]")
    """Lead sets: sizes of the challenge's or lists such as I,II,V5; by default as it was fine-tuned."""
    min_record_s: float | None = option(None, metavar="S")
    """Leave out shorter recordings, and count them; by default task.min_scored_s, usually 0: none."""
    out: Path | None = option(None, metavar="FILE.json")
    """Write the report as JSON too."""

    encoder: str = option("", metavar="PACKAGE.MODULE:CLASS")
    """Class of the model's encoder, where that is not one of ours; a model's own word imports nothing."""
    task: str = option("", metavar="PACKAGE.MODULE:CLASS")
    """Class of its task, where that is not one of ours."""

    def run(self) -> None:
        from ecgscale.downstream.evaluate import evaluate, table

        lead_sets = [tuple(filter(None, leads.split(","))) for leads in self.leads]
        given = (self.model, self.shards, self.split, lead_sets, self.out, self.min_record_s, self.encoder, self.task)
        print(table(evaluate(*given)))


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write the newest checkpoint of a run, or an export, for ecgscale, fairseq-signals or ONNX.

    safetensors is a folder with config.json + model.safetensors, which all commands take. fairseq is a .pt file in the
    layout of fairseq-signals, of models with the conv stem. onnx is an .onnx file that takes windows of recordings in
    mV with their lengths, and is checked in onnxruntime before it is written; docs/models.md shows how to use it.
    """

    model: Path = option(positional=True)
    """Run folder or export folder."""
    out: Path = option(positional=True)
    """Folder, .pt or .onnx file to write."""
    format: Literal["safetensors", "fairseq", "onnx"] | None = None
    """By default by the ending of OUT, else safetensors."""

    encoder: str = option("", metavar="PACKAGE.MODULE:CLASS")
    """Class of the model's encoder, where that is not one of ours; a model's own word imports nothing."""

    def run(self) -> None:
        from ecgscale.interop.formats import export_as

        by_ending = {".pt": "fairseq", ".onnx": "onnx"}.get(self.out.suffix, "safetensors")
        print(export_as(self.model, self.out, self.format or by_ending, self.encoder))


@dataclass(frozen=True, kw_only=True)
class ImportFairseq(Command):
    """Turn a checkpoint of fairseq-signals into an export: pretrained or fine-tuned, any size.

    Every tensor is accounted for by its name; code in the file is not run. The profile is the preprocessing that the
    weights were trained with: the wrong one fails silently.
    """

    checkpoint: Path = option(positional=True)
    """.pt file."""
    out: Path = option(positional=True)
    """Folder to write."""
    profile: str | None = option(None, metavar="NAME")
    """mv-500hz (Oh et al. 2022), zscore-500hz (ECG-FM: each lead z-scored over the recording) or mv-250hz, all of 5 s
    segments; by default by the checkpoint's cfg.task.normalize."""
    classes: tuple[str, ...] = ()
    """Names of a classification head's classes."""

    def run(self) -> None:
        from ecgscale.interop.fairseq import import_checkpoint

        print(import_checkpoint(self.checkpoint, self.out, self.profile, self.classes))


@dataclass(frozen=True, kw_only=True)
class Embed(Command):
    """Embed recordings with a trained model.

    INPUT is a WFDB record, a folder of them, a data set of `ecgscale ingest`, or an .npy of (leads, samples) or
    (records, leads, samples), floats in mV unless --unit says otherwise. Its numbers are checked as `ecgscale ingest`
    checks them. OUTPUT.npz holds record_embedding (records, width), name (records,), with --tokens tokens
    (records, N, width), of a data set split (records,), and where some have no embedding rejected, the reasons.
    """

    model: Path = option(positional=True)
    """Run folder or export folder."""
    input: Path = option(positional=True)
    """WFDB record, folder of them, data set or .npy."""
    output: Path = option(positional=True)
    """.npz to write."""
    tokens: bool = False
    """Keep one vector per 16 samples too."""
    rate_hz: float | None = None
    """Sample rate of an .npy."""
    leads: tuple[str, ...] = option((), metavar="I,II,...")
    """Leads of an .npy, in its order."""
    ignore_leads: tuple[str, ...] = ()
    """Signals of WFDB records to leave out."""
    rename_leads: tuple[str, ...] = option((), metavar="A=I,B=II")
    """Leads that WFDB records or --leads call otherwise."""
    unit: str | None = None
    """Of floats in an .npy: V, mV (default) or uV, or a multiple such as 0.5mV."""
    mv_per_count: float | None = None
    """Millivolts per count of integers in an .npy."""

    encoder: str = option("", metavar="PACKAGE.MODULE:CLASS")
    """Class of the model's encoder, where that is not one of ours; a model's own word imports nothing."""

    def run(self) -> None:
        from ecgscale.embed import embed_files

        print(
            embed_files(
                self.model,
                self.input,
                self.output,
                self.tokens,
                self.rate_hz,
                self.leads or None,
                self.ignore_leads,
                parse_renames(self.rename_leads),
                self.unit,
                self.mv_per_count,
                self.encoder,
            )
        )
