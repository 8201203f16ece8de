"""The sequential part of a chunked scan: states handed from chunk to chunk, and the gradient's way back.

Shapes: N chunks, X batch times heads, C tokens in a chunk, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.scan.blocks import first_order, unit_lower_inverse


class Accumulate(torch.autograd.Function):
    """States of the plain classes: S_{n+1} = carry_n S_n + writes_n.

    Shape: initial (X,K,V); writes (N,X,K,V); carry and totals (N,X,K,1) or (N,X,1,1), with carry =
    exp(totals) the decay of a whole chunk -> entering states (N,X,K,V), final state (X,K,V). As in `Gate`,
    carry is a constant and totals receives S' * dS'.
    """

    @staticmethod
    def forward(ctx, initial, writes, carry, totals):
        states = writes.new_empty(len(writes) + 1, *initial.shape)
        states[0] = initial
        for n in range(len(writes)):
            torch.addcmul(writes[n], states[n], carry[n], out=states[n + 1])
        ctx.save_for_backward(states, carry, totals)
        return states[:-1], states[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx, dentering: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        states, carry, totals = ctx.saved_tensors
        dstates = torch.cat([dentering, dfinal.unsqueeze(0)])
        for n in reversed(range(len(carry))):
            dstates[n].addcmul_(dstates[n + 1], carry[n])
        return dstates[0], dstates[1:], None, _total_gradient(states, dstates, totals)


class Correct(torch.autograd.Function):
    """States and corrections of the delta and rank-1 classes, with X_n = (I + tril(matrix_n, -1))^-1.

    y_n = X_n (right_n - reads_n S_n),  S_{n+1} = carry_n S_n + writes_n + removals_n^T y_n

    Shape: initial (X,K,V); matrix (N,X,C,C), read below the diagonal only; right (N,X,C,V); reads and
    removals (N,X,C,K); writes (N,X,K,V) or None; carry and totals as in `Accumulate` -> y (N,X,C,V), entering
    states (N,X,K,V), final state (X,K,V).
    """

    @staticmethod
    def forward(ctx, initial, matrix, right, reads, removals, writes, carry, totals):
        inverse = unit_lower_inverse(matrix)
        y = torch.empty_like(right)
        states = right.new_empty(len(right) + 1, *initial.shape)
        states[0] = initial
        for n in range(len(right)):
            torch.bmm(inverse[n], torch.baddbmm(right[n], reads[n], states[n], alpha=-1), out=y[n])
            kept = states[n] * carry[n] if writes is None else torch.addcmul(writes[n], states[n], carry[n])
            torch.baddbmm(kept, removals[n].mT, y[n], out=states[n + 1])
        ctx.save_for_backward(inverse, reads, removals, carry, totals, y, states)
        ctx.writes = writes is not None
        return y, states[:-1], states[-1].clone()

    @staticmethod
    @first_order
    def backward(ctx, dy: Tensor, dentering: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        inverse, reads, removals, carry, totals, y, states = ctx.saved_tensors
        dstates = torch.cat([dentering, dfinal.unsqueeze(0)])
        dright = torch.empty_like(y)
        for n in reversed(range(len(y))):
            total = torch.baddbmm(dy[n], removals[n], dstates[n + 1])
            torch.bmm(inverse[n].mT, total, out=dright[n])
            dstates[n].addcmul_(dstates[n + 1], carry[n]).baddbmm_(reads[n].mT, dright[n], alpha=-1)
        dmatrix = _negative_product(dright, y.mT).tril_(-1)
        dreads, dremovals = _negative_product(dright, states[:-1].mT), y @ dstates[1:].mT
        dwrites = dstates[1:] if ctx.writes else None
        dtotals = _total_gradient(states, dstates, totals)
        return dstates[0], dmatrix, dright, dreads, dremovals, dwrites, None, dtotals


def _total_gradient(states: Tensor, dstates: Tensor, totals: Tensor | None) -> Tensor | None:
    return None if totals is None else (states[1:] * dstates[1:]).sum_to_size(totals.shape)


def _negative_product(x: Tensor, y: Tensor) -> Tensor:
    """-(x @ y) for (N,X,·,·) without a pass over the result."""
    x, y, lead = x.flatten(0, 1), y.flatten(0, 1), x.shape[:2]
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=-1).unflatten(0, lead)
