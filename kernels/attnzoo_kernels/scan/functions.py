"""Pieces of the chunked scan that have their own backward: gates, products under a diagonal decay, state passes.

Shapes: N chunks, C tokens in a chunk, K key width, V value width, X = batch times heads.
Each is differentiable once; a second derivative raises (use the recurrent form for that).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Gate(torch.autograd.Function):
    """Mark `x` (N,B,H,C,K) as an operand that is used only as x * exp(sign * G), with constant weights.

    `sums` is G, of a shape that broadcasts to x; its value is not read: it receives sign * x * dx.
    """

    @staticmethod
    def forward(ctx, x: Tensor, sums: Tensor, sign: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sign, ctx.shape = sign, sums.shape
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return dx, (x * dx).sum_to_size(ctx.shape).mul_(ctx.sign), None


def _blocks(matrix: Tensor, count: int, row: int, column: int) -> Tensor:
    """View (X,R,L) as the (row, column) quarter of each of `count` blocks on its diagonal: (X,count,R/2count,L/2count)."""
    X, R, L = matrix.shape
    view = matrix.view(X, count, 2, R // count // 2, count, 2, L // count // 2)
    return view[:, :, row, :, :, column].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def unit_lower_inverse(matrix: Tensor) -> Tensor:
    """(I + tril(matrix, -1))^-1 for (..., C, C) by merging inverted blocks of 1, 2, 4 ... rows.

    inv [[A, 0], [B, D]] = [[A', 0], [-D' B A', D']]: every factor is a block of the true inverse, so nothing grows
    that is not in the result (powers of the matrix, as in a Neumann product, would). Not differentiable by itself.
    """
    C = matrix.shape[-1]
    P = 1 << (C - 1).bit_length()
    lower = (matrix if P == C else F.pad(matrix, (0, P - C, 0, P - C))).reshape(-1, P, P)
    inverse = torch.zeros_like(lower)
    inverse.diagonal(dim1=1, dim2=2).fill_(1)
    count = P // 2
    while count:
        corner = _blocks(lower, count, 1, 0)
        if count < P // 2:  # single rows are their own inverse
            corner = _blocks(inverse, count, 1, 1) @ (corner @ _blocks(inverse, count, 0, 0))
        torch.neg(corner, out=_blocks(inverse, count, 1, 0))
        count //= 2
    return inverse.view(*matrix.shape[:-2], P, P)[..., :C, :C]


class DiagonalProducts(torch.autograd.Function):
    """M_{ri,jl} = sum_k row_{r,i,k} col_{j,l,k} exp2(row_log_{r,i,k} - col_log_{j,k}) for j <= r, zero for j > r.

    Chunks of P = 2^n tokens are halved down to single tokens. Between the halves of a block the decay splits at the
    sum of the last token on the left, so that both exponents are <= 0; this computes exactly the visible pairs.
    A token's product with itself carries no decay: a caller whose rows must not see their own token masks it.

    Shape: rows (X,P,R,K), cols (X,P,L,K), row_logs (X,P,R,K) or (X,P,1,K), col_logs (X,P,1,K) -> (X,P,R,P,L).
    The sums of log decays are constants here; `Gate` gives their gradient.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, cols: Tensor, row_logs: Tensor, col_logs: Tensor) -> Tensor:
        ctx.save_for_backward(rows, cols, row_logs, col_logs)
        (X, P, R, K), L = rows.shape, cols.shape[2]
        out = rows.new_zeros(X, P * R, P * L)
        own = out.view(X, P, R, P, L).diagonal(dim1=1, dim2=3)  # X,R,L,P
        own.copy_((rows @ cols.mT).permute(0, 2, 3, 1))
        for count, row_weight, col_weight in _halvings(row_logs, col_logs, rows.dtype):
            left = (_half(cols, count, 0) * col_weight).flatten(2, 3)  # X,count,(P/2count)*L,K
            right = (_half(rows, count, 1) * row_weight).flatten(2, 3)
            _blocks(out, count, 1, 0).copy_(right @ left.mT)
        return out.view(X, P, R, P, L)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, cols, row_logs, col_logs = ctx.saved_tensors
        (X, P, R, K), L = rows.shape, cols.shape[2]
        own = dout.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # X,P,R,L
        drows, dcols = own @ cols, own.mT @ rows
        dout = dout.reshape(X, P * R, P * L)
        for count, row_weight, col_weight in _halvings(row_logs, col_logs, rows.dtype):
            left, right = _half(cols, count, 0) * col_weight, _half(rows, count, 1) * row_weight
            dblock = _blocks(dout, count, 1, 0)
            _half(drows, count, 1).addcmul_((dblock @ left.flatten(2, 3)).view_as(right), row_weight)
            _half(dcols, count, 0).addcmul_((dblock.mT @ right.flatten(2, 3)).view_as(left), col_weight)
        return drows, dcols, None, None


def _half(x: Tensor, count: int, side: int) -> Tensor:
    """View (X,P,·,K) as the left (0) or right (1) half of each of `count` blocks: (X,count,P/2count,·,K)."""
    return x.unflatten(1, (count, 2, -1))[:, :, side]


def _halvings(row_logs: Tensor, col_logs: Tensor, dtype: torch.dtype):
    """Yield (number of blocks, weights of the rows in right halves, weights of the columns in left halves)."""
    count = col_logs.shape[1] // 2
    while count:
        anchor = _half(col_logs, count, 0)[:, :, -1:]
        row_weight = (_half(row_logs, count, 1) - anchor).to(dtype).exp2_()
        col_weight = (anchor - _half(col_logs, count, 0)).to(dtype).exp2_()
        yield count, row_weight, col_weight
        count //= 2


class Accumulate(torch.autograd.Function):
    """States of the plain classes: S_{n+1} = carry_n S_n + writes_n.

    Shape: initial (X,K,V); writes (N,X,K,V); carry and totals (N,X,K,1) or (N,X,1,1), carry = exp(total decay of the
    chunk) -> entering states (N,X,K,V), final state (X,K,V). As in `Gate`, carry is a constant and totals receives
    S' * dS'.
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
    @once_differentiable
    def backward(ctx, dentering: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        states, carry, totals = ctx.saved_tensors
        dstates = torch.cat([dentering, dfinal.unsqueeze(0)])
        for n in reversed(range(len(carry))):
            dstates[n].addcmul_(dstates[n + 1], carry[n])
        return dstates[0], dstates[1:], None, _total_gradient(states, dstates, totals)


class Correct(torch.autograd.Function):
    """States and corrections of the delta and rank-1 classes, with X_n = (I + tril(matrix_n, -1))^-1.

    y_n = X_n (right_n + reads_n S_n),  S_{n+1} = carry_n S_n + writes_n + removals_n^T y_n

    Shape: initial (X,K,V); matrix (N,X,C,C), of which only the part below the diagonal is read; right (N,X,C,V);
    reads, removals (N,X,C,K); writes (N,X,K,V) or None; carry, totals as in `Accumulate`
    -> y (N,X,C,V), entering states (N,X,K,V), final state (X,K,V).
    """

    @staticmethod
    def forward(ctx, initial, matrix, right, reads, removals, writes, carry, totals):
        inverse = unit_lower_inverse(matrix)
        y = torch.empty_like(right)
        states = right.new_empty(len(right) + 1, *initial.shape)
        states[0] = initial
        for n in range(len(right)):
            torch.bmm(inverse[n], torch.baddbmm(right[n], reads[n], states[n]), out=y[n])
            kept = states[n] * carry[n] if writes is None else torch.addcmul(writes[n], states[n], carry[n])
            torch.baddbmm(kept, removals[n].mT, y[n], out=states[n + 1])
        ctx.save_for_backward(inverse, reads, removals, carry, totals, y, states)
        ctx.writes = writes is not None
        return y, states[:-1], states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dentering: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        inverse, reads, removals, carry, totals, y, states = ctx.saved_tensors
        dstates = torch.cat([dentering, dfinal.unsqueeze(0)])
        dright = torch.empty_like(y)
        for n in reversed(range(len(y))):
            total = torch.baddbmm(dy[n], removals[n], dstates[n + 1])
            torch.bmm(inverse[n].mT, total, out=dright[n])
            dstates[n].addcmul_(dstates[n + 1], carry[n]).baddbmm_(reads[n].mT, dright[n])
        dmatrix = (dright @ y.mT).tril_(-1).neg_()
        dreads, dremovals = dright @ states[:-1].mT, y @ dstates[1:].mT
        dwrites = dstates[1:] if ctx.writes else None
        dtotals = _total_gradient(states, dstates, totals)
        return dstates[0], dmatrix, dright, dreads, dremovals, dwrites, None, dtotals


def _total_gradient(states: Tensor, dstates: Tensor, totals: Tensor | None) -> Tensor | None:
    return None if totals is None else (states[1:] * dstates[1:]).sum_to_size(totals.shape)
