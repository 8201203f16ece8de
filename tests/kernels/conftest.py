"""Kernels run natively on a GPU and in Triton's interpreter elsewhere (see the conftest above)."""

from __future__ import annotations

import torch


def _multiply_bf16() -> None:
    """The interpreter keeps bf16 as uint16 and multiplies the bit patterns: let it multiply the values."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16 or x.data.dtype != np.uint16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    builder.create_dot = lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)


if not torch.cuda.is_available():
    _multiply_bf16()
