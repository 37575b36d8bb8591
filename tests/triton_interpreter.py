"""Whether Triton's interpreter can run here. TRITON_INTERPRET=1 must be set before Triton is imported.

As a program it prints why not, and nothing where it can.
"""

from __future__ import annotations

import numpy as np
import torch


def refusal() -> str:
    """Empty where it can run. That of Triton 3.6 counts no loop by a number of numpy 2.4 or newer."""
    import triton
    from triton import language as tl

    @triton.jit
    def count(out_ptr, turns):
        for turn in range(turns):
            tl.store(out_ptr + turn, turn)

    try:
        count[(1,)](torch.zeros(2, dtype=torch.int32), 2)
    except (triton.runtime.errors.InterpreterError, DeprecationWarning) as error:
        return f"the interpreter of Triton {triton.__version__} cannot run with numpy {np.__version__}: {error}"
    return ""


if __name__ == "__main__":
    print(refusal())
