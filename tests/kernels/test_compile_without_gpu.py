"""The kernels compile for chips that are not there, fit into their shared memory, and spill no registers.

By the Triton that is installed, which is the newest where CI runs, and by the oldest that pyproject.toml takes: how
many registers a kernel needs is Triton's doing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = str(Path(__file__).parents[1] / "trials" / "compile_without_gpu.py")
OLDEST = Path(__file__).parents[2] / "build" / "oldest-triton"  # .ci/run puts it there
# By hand it takes all types for a chip. Here those of 16 bits, and float32 once, since a kernel takes half a second.
OF_16_BITS = (("80", "bfloat16", "float16"), ("90", "bfloat16", "float16"))
WITH_FLOAT32 = (("80", "bfloat16", "float16", "float32"), ("90", "bfloat16", "float16"))


def compiled_by(triton: Path | None, chips: Iterable[tuple[str, ...]], cache: Path) -> dict[tuple[str, str], set[str]]:
    """Of each chip and kind, the kernels that were compiled; fails where the script does. Chips at the same time."""
    env = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    if triton is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(triton), env.get("PYTHONPATH", "")])
    compiled: dict[tuple[str, str], set[str]] = {}
    with ExitStack() as stack:
        begun = {chosen: stack.enter_context(started(chosen, env)) for chosen in chips}
        for (chip, *_), process in begun.items():
            printed, error = process.communicate(timeout=300)
            assert process.returncode == 0, printed[-2000:] + error[-2000:]
            kind = ""
            for line in printed.splitlines()[1:]:
                first, *rest = line.split()
                kind = kind if rest else first
                compiled.setdefault((chip, kind), set()).update([first] if rest else [])
    return compiled


def started(chosen: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, SCRIPT, *chosen, "--blocks=3"], env=env, stdout=-1, stderr=-1, text=True)


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


@pytest.mark.parametrize(("triton", "chips"), [(None, WITH_FLOAT32), (OLDEST, OF_16_BITS)], ids=["installed", "oldest"])
def test_every_kernel_compiles_fits_and_spills_nothing(tmp_path, triton, chips) -> None:
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.name} is not in {triton.parent.name}/; .ci/run installs it")
    kernels = all_kernels()
    assert len(kernels) == 10
    expected = {(chip, kind): kernels for chip, *kinds in chips for kind in kinds}
    assert compiled_by(triton, chips, tmp_path) == expected


def test_the_oldest_triton_is_the_one_that_the_package_takes() -> None:
    if not OLDEST.is_dir():
        pytest.skip(f"{OLDEST.name} is not in {OLDEST.parent.name}/; .ci/run installs it")
    (folder,) = OLDEST.glob("triton-*.dist-info")
    oldest = folder.name.removeprefix("triton-").removesuffix(".dist-info")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"triton>={oldest.rpartition(".")[0]};' in project
    assert tuple(map(int, oldest.split("."))) <= tuple(map(int, version("triton").split(".")[:3]))
