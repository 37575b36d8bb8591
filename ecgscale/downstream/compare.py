"""`ecgscale compare`: is pretraining worth it? Pretrained beside random weights, probed and fine-tuned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ecgscale.config import FinetuneConfig, PretrainConfig, load
from ecgscale.data.shard_set import ShardSet
from ecgscale.data.shards import file_sha256, write_whole
from ecgscale.downstream.finetune import finetune
from ecgscale.errors import InputError
from ecgscale.pretrain import pretrain
from ecgscale.run import completed, flat

_ARMS = {
    "random init, linear probe": ("probe", True),
    "random init, fine-tuned": ("finetune", True),
    "pretrained, linear probe": ("probe", False),
    "pretrained, fine-tuned": ("finetune", False),
}
_METRICS = ("auroc", "auprc", "f_measure")


def compare(
    pretrain_config: Path,
    finetune_config: Path,
    pretrain_shards: Sequence[str],
    task_shards: Sequence[str],
    run: Path,
    seeds: int = 1,
) -> str:
    """Run what is not finished below ``run``; returns the table, which is also written to ``run/table.md``."""
    given = [
        "--config",
        str(pretrain_config),
        "--data.shards",
        ",".join(pretrain_shards),
        "--run.dir",
        str(run / "pretrain"),
    ]
    pretrain(load(PretrainConfig, given))
    rows = []
    for arm, (protocol, random) in _ARMS.items():
        reports = [
            _finetuned(
                finetune_config,
                run,
                task_shards,
                arm.replace(", ", "-").replace(" ", "-"),
                protocol,
                random,
                seed,
            )
            for seed in range(seeds)
        ]
        rows.append(_row(arm, reports))
    table = "\n".join(["| encoder | AUROC | AUPRC | F1 |", "|---|---|---|---|", *rows])
    write_whole(run / "table.md", (table + "\n").encode())
    return f"{table}\n\n{_pointers(run, seeds)}"


def _finetuned(
    config_file: Path, run: Path, shards: Sequence[str], name: str, protocol: str, random: bool, seed: int
) -> dict[str, Any]:
    """The test report of one run: read where it is finished with the same config, model and data, made otherwise."""
    folder = run / f"{name}-seed{seed}"
    given = ["--config", str(config_file), "--data.shards", ",".join(shards), "--run.dir", str(folder)]
    given += ["--init.model", str(run / "pretrain"), "--init.random", str(random).lower()]
    config = load(FinetuneConfig, [*given, "--task.protocol", protocol, "--train.seed", str(seed)])
    result, made_from = folder / "result.json", _made_from(run / "pretrain", shards, config)
    if result.exists():
        finished: dict[str, Any] = json.loads(result.read_bytes())
        before = finished["made_from"]
        if before | {"config": completed(before["config"], config)} != made_from | {"config": flat(asdict(config))}:
            raise InputError(f"{folder}: was made with another config, model or data; remove it or take another --run")
        return finished
    finetune(config)
    finished = json.loads((folder / "evaluation-test.json").read_bytes()) | {"made_from": made_from}
    write_whole(result, json.dumps(finished, indent=1).encode())
    return finished


def _made_from(pretrained: Path, shards: Sequence[str], config: FinetuneConfig) -> dict[str, Any]:
    return {
        "model": file_sha256(pretrained / "export" / "model.safetensors"),
        "data": ShardSet.open(shards).identity,
        "config": asdict(config),
    }


def _row(arm: str, reports: list[dict[str, Any]]) -> str:
    return f"| {arm} | {' | '.join(_cell([r['macro'][metric] for r in reports]) for metric in _METRICS)} |"


def _cell(figures: list[dict[str, Any]]) -> str:
    """One seed: the figure and its interval. Several: mean ± deviation over seeds [mean ends of the intervals]."""
    defined = [figure for figure in figures if figure["value"] is not None]
    if not defined:
        return "–"
    mean, low, high = (np.mean([figure[end] for figure in defined]) for end in ("value", "low", "high"))
    spread = f" ± {np.std([figure['value'] for figure in defined], ddof=1):.3f}" if len(defined) > 1 else ""
    return f"{mean:.3f}{spread} [{low:.3f}, {high:.3f}]"


def _pointers(run: Path, seeds: int) -> str:
    what = "with 95 % bootstrap intervals over patients"
    if seeds > 1:
        what = f"mean ± deviation over {seeds} seeds [mean ends of their 95 % bootstrap intervals over patients]"
    return "\n".join(
        [
            f"Macro over the classes, on the test patients, {what}.",
            f"runs:        {run}",
            f"TensorBoard: tensorboard --logdir {run}",
        ]
    )
