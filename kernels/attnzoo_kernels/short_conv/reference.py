"""The short convolution in plain torch: its definition, exact in fp64."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype given, at least fp32."""
    return reduce(torch.promote_types, (x.dtype for x in tensors if x is not None), torch.float32)


def with_tail(x: Tensor, tail: Tensor | None, rows: int) -> Tensor:
    """``x (B,T,C)`` behind its ``rows`` earlier rows, zeros where there is no tail."""
    if tail is None:
        return F.pad(x, (0, 0, rows, 0))
    return torch.cat([tail, x], dim=1)


def short_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, order: Tensor | None, silu: bool
) -> Tensor:
    """As the public function, without the new tail."""
    T, n = x.shape[1], weight.shape[1]
    dtype = work_dtype(x, weight, bias, tail)
    both, taps = with_tail(x, tail, n - 1).to(dtype), weight.to(dtype)
    y = both[:, n - 1 :] * taps[:, n - 1]
    if bias is not None:
        y = y + bias.to(dtype)
    for back in range(1, n):
        before = both[:, n - 1 - back : n - 1 - back + T]
        if order is not None:
            before = before.masked_fill((order < back)[..., None], 0.0)
        y = torch.addcmul(y, before, taps[:, n - 1 - back])
    return (F.silu(y) if silu else y).to(x.dtype)
