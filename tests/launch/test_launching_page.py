"""What docs/launching.md promises for five minutes, as it stands there, on a SLURM of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "docs/launching.md").read_text()


@pytest.mark.usefixtures("slurm_installed")
def test_five_minutes(short_folder, tmp_path) -> None:
    [block] = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    environment |= {"TMPDIR": str(short_folder), "PATH": path}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attempt 1 stopped, step 0 to " in done.stdout
    assert "attempt 2 done, step " in done.stdout
    assert "to 60" in done.stdout
    assert not list(short_folder.glob("ecgscale-devcluster-*"))


def test_every_subcommand_and_cluster_config_is_there() -> None:
    from ecgscale_launch.cli import SUBCOMMANDS

    for name in SUBCOMMANDS:
        assert re.search(rf"ecgscale-launch {name}|`{name}", README), name
    for config in (ROOT / "configs/cluster").iterdir():
        assert config.name in README + (ROOT / "README.md").read_text() or config.name == "laptop.yaml"
