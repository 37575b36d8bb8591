"""The kernels compile for chips that are not there, fit into their shared memory, and spill no registers.

By the Triton that is installed, which is the newest where CI runs, and by the oldest that pyproject.toml takes: how
many registers a kernel needs is Triton's doing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_without_gpu.py"
OLDEST = Path(__file__).parents[2] / "build" / "oldest-triton"  # .ci/run puts it there
# By hand it takes all types for a chip. Here a share of them, since a kernel takes half a second.
CHOSEN = (("80", "bfloat16", "float16"), ("90", "bfloat16", "float16"), ("80", "float32"))


def compiled_by(triton: Path | None, kinds: tuple[str, ...], cache: Path) -> dict[str, set[str]]:
    """Of each kind, the kernels that were compiled; fails where the script does."""
    env = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    if triton is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(triton), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), *kinds, "--blocks=3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    compiled: dict[str, set[str]] = {}
    kind = ""
    for line in done.stdout.splitlines()[1:]:
        first, *rest = line.split()
        if rest:
            compiled[kind].add(first)
        else:
            kind = first
            compiled[kind] = set()
    return compiled


def all_kernels() -> set[str]:
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    from ecgscale_kernels import conv_stem, patch_embed

    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (conv_stem, patch_embed)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, (JITFunction, InterpretedFunction))
    }


@pytest.mark.parametrize("kinds", CHOSEN, ids="-".join)
@pytest.mark.parametrize("triton", [None, OLDEST], ids=["installed", "oldest"])
def test_every_kernel_compiles_fits_and_spills_nothing(tmp_path, triton, kinds) -> None:
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.name} is not in {triton.parent.name}/; .ci/run installs it")
    kernels = all_kernels()
    assert len(kernels) == 10
    assert compiled_by(triton, kinds, tmp_path) == dict.fromkeys(kinds[1:], kernels)


def test_the_oldest_triton_is_the_one_that_the_package_takes() -> None:
    if not OLDEST.is_dir():
        pytest.skip(f"{OLDEST.name} is not in {OLDEST.parent.name}/; .ci/run installs it")
    (folder,) = OLDEST.glob("triton-*.dist-info")
    oldest = folder.name.removeprefix("triton-").removesuffix(".dist-info")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"triton>={oldest.rpartition(".")[0]};' in project
    assert tuple(map(int, oldest.split("."))) <= tuple(map(int, version("triton").split(".")[:3]))
