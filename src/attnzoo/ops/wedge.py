"""Planes of two vectors by their Plucker coordinates, ``p_ij = z_i w_j - z_j w_i`` for i < j, as one node.

The coordinates of one i are a run of slices: no tables of indices are read, and none are scattered to in the
backward pass. Vectors lie channel by channel, so that slices are rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def wedge(z: Tensor, w: Tensor) -> Tensor:
    """``(..., r)`` twice -> ``(..., r (r - 1) / 2)``, pairs (0, 1), (0, 2), ... No second derivatives."""
    fused = z.is_cpu and not torch.compiler.is_compiling()
    return _Wedge.apply(z, w) if fused else plain_wedge(z, w)


def plain_wedge(z: Tensor, w: Tensor) -> Tensor:
    """`wedge` in torch's own operations."""
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], 1, device=z.device)
    return z[..., i] * w[..., j] - z[..., j] * w[..., i]


class _Wedge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, w: Tensor) -> Tensor:
        ctx.shape, r = z.shape[:-1], z.shape[-1]
        z, w = (x.reshape(-1, r).t().contiguous() for x in (z, w))
        out = z.new_empty(r * (r - 1) // 2, z.shape[1])
        for i, run in enumerate(_runs(r)):
            torch.mul(w[i + 1 :], z[i], out=out[run]).addcmul_(z[i + 1 :], w[i], value=-1)
        ctx.save_for_backward(z, w)
        return out.t().unflatten(0, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        z, w = ctx.saved_tensors
        r = len(z)
        grad = grad.flatten(0, -2).t().contiguous()
        grad_z, grad_w = torch.zeros_like(z), torch.zeros_like(w)
        for i, run in enumerate(_runs(r)):
            g, later = grad[run], slice(i + 1, r)
            grad_z[later].addcmul_(g, w[i], value=-1)
            grad_w[later].addcmul_(g, z[i])
            grad_z[i].add_((g * w[later]).sum(0))
            grad_w[i].sub_((g * z[later]).sum(0))
        return tuple(x.t().unflatten(0, ctx.shape) for x in (grad_z, grad_w))


def _runs(r: int) -> list[slice]:
    """Where the pairs of each i but the last lie."""
    starts = [i * (2 * r - i - 1) // 2 for i in range(r)]
    return [slice(a, b) for a, b in pairwise(starts)]
