"""`ecgscale compare`: is pretraining worth it? Pretrained beside random weights, probed and fine-tuned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecgscale.config import FinetuneConfig, PretrainConfig, load
from ecgscale.data.shards import write_whole
from ecgscale.downstream.finetune import finetune
from ecgscale.pretrain import pretrain

_ARMS = {
    "random init, linear probe": ("probe", True),
    "random init, fine-tuned": ("finetune", True),
    "pretrained, linear probe": ("probe", False),
    "pretrained, fine-tuned": ("finetune", False),
}


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
    return f"{table}\n\n{_pointers(run)}"


def _finetuned(
    config: Path, run: Path, shards: Sequence[str], name: str, protocol: str, random: bool, seed: int
) -> dict[str, Any]:
    folder = run / f"{name}-seed{seed}"
    report = folder / "evaluation-test.json"
    if not report.exists():
        given = ["--config", str(config), "--data.shards", ",".join(shards), "--run.dir", str(folder)]
        given += ["--init.model", str(run / "pretrain"), "--init.random", str(random).lower()]
        finetune(load(FinetuneConfig, [*given, "--task.protocol", protocol, "--train.seed", str(seed)]))
    figures = json.loads(report.read_bytes())
    assert isinstance(figures, dict)
    return figures


def _row(arm: str, reports: list[dict[str, Any]]) -> str:
    """Macro figures: one seed with its bootstrap interval over patients, several as mean ± deviation over seeds."""
    cells = []
    for metric in ("auroc", "auprc", "f_measure"):
        figures = [report["macro"][metric] for report in reports]
        values = [figure["value"] for figure in figures]
        if len(figures) == 1:
            cells.append(f"{values[0]:.3f} [{figures[0]['low']:.3f}, {figures[0]['high']:.3f}]")
        else:
            lows, highs = (np.mean([figure[end] for figure in figures]) for end in ("low", "high"))
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} [{lows:.3f}, {highs:.3f}]")
    return f"| {arm} | {' | '.join(cells)} |"


def _pointers(run: Path) -> str:
    return "\n".join(
        [
            "Macro over the classes, on the test patients, with 95 % bootstrap intervals over patients.",
            f"runs:        {run}",
            f"TensorBoard: tensorboard --logdir {run}",
        ]
    )
