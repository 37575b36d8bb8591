"""Small jobs as real processes, and what they have written."""

from __future__ import annotations

import json
import subprocess
from dataclasses import fields
from pathlib import Path

from ecgscale.json_lines import read_json_lines
from ecgscale.objectives import OBJECTIVES, ObjectiveConfig, objective_config

LOCAL = ["--objective.codes=16", "--objective.code_width=16", "--objective.negatives=20"]
SMALL = [
    "--model.preset=tiny", "--model.stem_channels=16", "--model.width=32", "--model.depth=2", "--model.ffn_width=64",
    "--model.heads=2", "--model.position_kernel=16", *LOCAL, "--data.segment_s=2.5",
    "--data.min_record_s=5", "--engine.learning_rate=1e-3",
    "--engine.clip_norm=1",
    "--engine.whole_below=0", "--train.global_batch=8", "--train.log_every=1", "--train.steps=6",
    "--train.checkpoint_every=100", "--train.projected_recordings=0",
]  # fmt: skip
MAIN = "ecgscale.cli:main"  # what takes the arguments of a job
NO_DROPOUT = ["--model.dropout=0", "--model.attention_dropout=0", "--model.feature_dropout=0"]


def small(*more: str) -> list[str]:
    """SMALL and more options, without the keys of the local part where they name an objective that has none."""
    names = [option.partition("=")[2] for option in more if option.startswith("--objective.name=")]
    local = not names or "wav2vec2" in names[-1]
    return [option for option in SMALL if local or option not in LOCAL] + list(more)


def config_of(name: str, **keys: object) -> ObjectiveConfig:
    """The config of an objective with those of the keys that it has."""
    own = {field.name for field in fields(OBJECTIVES.find(name).Config)}
    return objective_config(name, **{key: value for key, value in keys.items() if key in own})


class Jobs:
    """Runs jobs as real processes, forked from one that has done the slow imports."""

    def __init__(self, server: subprocess.Popen, errors: Path) -> None:
        self.server, self.errors = server, errors

    def run(self, world_size: int, *jobs: list[str], code: int = 0, program: str = MAIN, **environment: str) -> str:
        """Run jobs one after the other to the end, with more variables in their environment; what rank 0 wrote."""
        codes = self._answer(world_size, jobs, None, program, environment)
        said = [path.read_text() for path in self._error_files(world_size)]
        assert codes == [code] * world_size, "\n".join(text[-3000:] for text in said)
        return said[0]

    def killed_after(self, step: int, run: Path, world_size: int, *jobs: list[str], later_s: float = 0.0) -> None:
        """Start and kill all ranks with SIGKILL, some seconds after ``step`` is logged."""
        codes = self._answer(world_size, jobs, (str(run), step, later_s))
        assert codes == [-9] * world_size, self._error_files(1)[0].read_text()[-3000:]

    def _answer(
        self,
        world_size: int,
        jobs: tuple[list[str], ...],
        kill: tuple[str, int, float] | None,
        program: str = MAIN,
        environment: dict[str, str] | None = None,
    ) -> list[int]:
        errors = list(map(str, self._error_files(world_size)))
        asked = {"world_size": world_size, "program": program, "jobs": jobs, "errors": errors, "kill": kill}
        asked["environment"] = environment or {}
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def _error_files(self, world_size: int) -> list[Path]:
        return [self.errors / f"rank-{rank}" for rank in range(world_size)]


def events(run: Path) -> list[dict]:
    return list(read_json_lines(run / "events.jsonl"))


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; the last one written counts."""
    return {event["step"]: event["train/loss"] for event in events(run) if "train/loss" in event}


def logged(run: Path, step: int) -> bool:
    """Whether a step has been done and logged."""
    return any(event.get("step", 0) >= step for event in events(run))


def recordings(run: Path) -> list[tuple[int, int]]:
    """(position, recording) as often as any rank has read it."""
    read = []
    for log in sorted((run / "recordings").iterdir()):
        for line in log.read_text().splitlines():
            if not line.endswith("]}"):
                continue  # was cut off by the kill
            seen = json.loads(line)
            read += enumerate(seen["recordings"], seen["first_position"])
    return read


def put_checkpoint(folder: Path, step: int) -> None:
    """Something in ``folder`` that is a checkpoint as long as nobody opens it."""
    state = folder / f"step-{step:08d}" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()
