"""Causal depthwise convolution of whole sequences on a CPU as a single autograd node.

Torch's graph of shifted products pads, slices and adds whole tensors once per tap in the backward pass; here
each tap is one pass over what it meets, and only the input and, before an activation, the sum are kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def causal_conv(z: Tensor, taps: Tensor, bias: Tensor | None, order: Tensor | None, silu: bool) -> Tensor:
    """``y_t = act(b + sum_m w_m z_(t - n + 1 + m))`` over the token's own document.

    Args:
        z: ``(B, T, C)``. taps: ``(C, n)``, the last meets the token itself. bias: ``(C,)``.
        order: ``(B or 1, T)`` place in the document, or None where each row is one. silu: the activation.

    Returns:
        ``(B, T, C)`` in the wider dtype of z and taps. No second derivatives.
    """
    if torch.compiler.is_compiling():
        return plain_causal_conv(z, taps, bias, order, silu)
    return _Conv.apply(z, taps, bias, order, silu)


def plain_causal_conv(
    z: Tensor, taps: Tensor, bias: Tensor | None, order: Tensor | None, silu: bool
) -> Tensor:
    """`causal_conv` in torch's own operations."""
    T, n = z.shape[1], taps.shape[1]
    both = F.pad(z, (0, 0, n - 1, 0))
    y = z * taps[:, n - 1]
    for back in range(1, min(n, T)):
        before = both[:, n - 1 - back : n - 1 - back + T]
        if order is not None:
            before = torch.where((order >= back)[..., None], before, torch.zeros((), dtype=z.dtype))
        y = torch.addcmul(y, before, taps[:, n - 1 - back].to(before.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return F.silu(y) if silu else y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, taps: Tensor, bias: Tensor | None, order: Tensor | None, silu: bool
    ) -> Tensor:
        dtype = torch.promote_types(z.dtype, taps.dtype)
        wide, rows = z.to(dtype), taps.t().to(dtype).contiguous()
        y = wide * rows[-1] if bias is None else torch.addcmul(bias.to(dtype), wide, rows[-1])
        for back, earlier, later in _pairs(z.shape[1], len(rows)):
            y[:, later].addcmul_(_inside(wide[:, earlier], order, back), rows[-1 - back])
        ctx.save_for_backward(z, taps, bias, order, y if silu else None)
        return F.silu(y) if silu else y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _Conv._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, taps, bias, order, y = ctx.saved_tensors
        wide, rows = z.to(grad.dtype), taps.t().to(grad.dtype).contiguous()
        if y is not None:
            grad = torch.ops.aten.silu_backward(grad, y)
        grad_z, products = grad * rows[-1], grad * wide
        grad_rows = torch.zeros_like(rows)
        # a product of matrices sums over rows faster than sum() does
        ones = grad.new_ones(1, products.shape[0] * products.shape[1])
        grad_rows[-1] = (ones @ products.flatten(0, 1))[0]
        for back, earlier, later in _pairs(z.shape[1], len(rows)):
            g = _inside(grad[:, later], order, back)
            grad_z[:, earlier].addcmul_(g, rows[-1 - back])
            products[:, back - 1] = 0  # no earlier token
            torch.mul(g, wide[:, earlier], out=products[:, later])
            grad_rows[-1 - back] = (ones @ products.flatten(0, 1))[0]
        grad_bias = None if bias is None else (ones @ grad.flatten(0, 1))[0].to(bias.dtype)
        return grad_z.to(z.dtype), grad_rows.t().to(taps.dtype), grad_bias, None, None


def _pairs(T: int, n: int) -> list[tuple[int, slice, slice]]:
    """Distances between tokens, with the earlier and the later tokens of that distance."""
    return [(back, slice(0, T - back), slice(back, T)) for back in range(1, min(n, T))]


def _inside(z: Tensor, order: Tensor | None, back: int) -> Tensor:
    """``z`` of pairs of tokens, 0 where the earlier one is of another document."""
    if order is None:
        return z
    return torch.where((order[:, back:] >= back)[..., None], z, torch.zeros((), dtype=z.dtype))
