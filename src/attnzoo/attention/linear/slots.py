"""The two scans of Linformer's prefix form on whole sequences: all heads and rows meet one matrix E, one F.

What `scan` does with E and F as values and keys of every head, without copying them to every head: their
products with a chunk of all rows and heads are one matrix product, and so are their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.scan.decay import Grid
from attnzoo_kernels.scan.states import Accumulate


def two_scans(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor, scale: float, chunk_size: int) -> Tensor:
    """``softmax_m(q_i . scale sum_(j <= i) E_j k_j) sum_(j <= i) F_j v_j``.

    Args:
        q, k: ``(B, T, H, d)``. v: ``(B, T, H, d_v)``. E, F: ``(T, M)``.

    Returns:
        ``(B, T, H, d_v)`` in v's dtype.
    """
    grid, wide, out_dtype, heads = Grid.of(len(E), chunk_size), E.dtype, v.dtype, v.shape[2]
    q, k, v = (grid.split(z, wide).flatten(1, 2) for z in (q * scale, k, v))  # (N, B H, C, width)
    E, F = (grid.split(z[None, :, None], wide)[:, 0, 0] for z in (E, F))  # (N, C, M)
    scores = _sum(q, _states(k, E), _each((q @ k.mT).tril_(), E))
    weights = scores.softmax(-1)
    inside = _each(weights, F.mT).tril_()
    o = _sum(weights, _states(v, F).mT, inside @ v)
    return grid.join(o.unflatten(1, (-1, heads)), out_dtype)


def _each(x: Tensor, shared: Tensor) -> Tensor:
    """``x`` ``(N, X, a, b)`` times each chunk's ``(N, b, c)``."""
    return (x.flatten(1, 2) @ shared).unflatten(1, x.shape[1:3])


def _states(x: Tensor, shared: Tensor) -> Tensor:
    """Sums of ``x_j shared_j`` over all earlier chunks, ``(N, X, width, M)``."""
    writes = _each(x.mT, shared)
    one = writes.new_ones(1, 1, 1, 1).expand(*writes.shape[:2], 1, 1)
    return Accumulate.apply(torch.zeros_like(writes[0]), writes, one, None)[0]


def _sum(x: Tensor, states: Tensor, more: Tensor) -> Tensor:
    """``more + x @ states`` per chunk and head."""
    return torch.baddbmm(*(z.flatten(0, 1) for z in (more, x, states))).view_as(more)
