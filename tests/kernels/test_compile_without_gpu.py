"""The kernels compile for chips that are not there, and fit into their shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_without_gpu.py"
# By hand it takes all types for a chip. Here a share of them, since a kernel takes a second or two.
CHOSEN = (("80", "float16"), ("80", "float32"), ("90", "bfloat16"))


def test_every_kernel_compiles_and_fits(tmp_path) -> None:
    from triton.runtime import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    from ecgscale_kernels import conv_stem, patch_embed

    kernels = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (conv_stem, patch_embed)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, (JITFunction, InterpretedFunction))
    }
    assert len(kernels) == 10
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    started = {
        chosen: subprocess.Popen(
            [sys.executable, SCRIPT, *chosen, "--blocks=3"], env=env, stdout=-1, stderr=-1, text=True
        )
        for chosen in CHOSEN
    }
    for (_, chosen_kind), process in started.items():
        said, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-2000:]
        found, kind = {}, ""
        for first, *rest in map(str.split, said.splitlines()[1:]):
            kind = kind if rest else first
            found.setdefault(kind, set()).update([first] if rest else [])
        assert found == {chosen_kind: kernels}
