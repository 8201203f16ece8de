"""Pieces of the chunked scan that have their own backward: gates, products under a diagonal decay, state passes.

Shapes: N chunks, C tokens in a chunk, K key width, V value width, X = batch times heads.
Each is differentiable once; a second derivative raises (use the recurrent form for that).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class DecaySums(torch.autograd.Function):
    """Stand-ins for G_r = g_1 + ... + g_r in a chunk, and for its last row, that only carry gradients.

    The weights exp(differences of G) are constants for autograd; their users hand G's gradient in by `Gate` and by
    the state passes, and this sums it up to that of g (..., C, K) -> (..., C, K), (..., 1, K).
    """

    @staticmethod
    def forward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        return g.view_as(g), g[..., -1:, :].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dsums: Tensor, dtotals: Tensor) -> Tensor:
        return dsums.flip(-2).cumsum(-2).flip(-2).add_(dtotals)


class Gate(torch.autograd.Function):
    """Mark `x` (N,B,H,C,K) as an operand that is used only as x * exp(sign * G), with constant weights.

    `sums` stands for G and broadcasts to x; it receives sign * x * dx.
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


def doubled_sums(steps: Tensor):
    """Sums of `steps` (X,P,K) along time inside blocks of 1, 2, 4 ... P = 2^n tokens; updated in place.

    Yields (block size, sum from the block's start up to the token, the same before the token's own step, sum from
    after the token to the block's end). Nothing is subtracted, so nothing cancels.
    """
    upto, before, after = steps.clone(), torch.zeros_like(steps), torch.zeros_like(steps)
    size, P = 1, steps.shape[1]
    yield size, upto, before, after
    while size < P:
        left, right = _half(upto, size, 0)[:, :, -1:], _half(upto, size, 1)
        _half(after, size, 0).add_(right[:, :, -1:])
        _half(before, size, 1).add_(left)
        right.add_(left)
        size *= 2
        yield size, upto, before, after


def _half(x: Tensor, size: int, side: int) -> Tensor:
    """View (X,P,K) as the left (0) or right (1) block of each pair of blocks: (X,P/2size,size,K)."""
    return x.unflatten(1, (-1, 2, size))[:, :, side]


def _corners(matrix: Tensor, size: int, row: int = 1, column: int = 0) -> Tensor:
    """View (X,P,P) as one quarter of each diagonal block of 2*size rows, by default the lower left:
    (X,P/2size,size,size)."""
    X, P, _ = matrix.shape
    view = matrix.view(X, P // (2 * size), 2, size, P // (2 * size), 2, size)
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
    size = 1
    while size < P:
        corner = _corners(lower, size)
        if size > 1:  # single rows are their own inverse
            corner = _corners(inverse, size, 1, 1) @ (corner @ _corners(inverse, size, 0, 0))
        torch.neg(corner, out=_corners(inverse, size))
        size *= 2
    return inverse.view(*matrix.shape[:-2], P, P)[..., :C, :C]


class DiagonalProducts(torch.autograd.Function):
    """M^{xy}_{rj} = sum_k x_{r,k} y_{j,k} exp(G_{r,k} - G_{j,k}) for j <= r, else 0; x over rows, y over columns.

    Blocks of P = 2^n tokens are doubled up from single tokens. Between the halves of a block the decay splits into
    that from the middle to the row and that from the column to the middle: both exponents are <= 0, and exactly the
    pairs j < r are multiplied. A token's product with itself carries no decay.

    Shape: steps (X,P,K) log2 decays, constants here (`Gate` gives G its gradient); operands (X,P,K): `rows` row
    operands, of which the first `before` leave out the row's own decay, then the columns -> a tuple of (X,P,P): the
    first row operand with every column, the second ...
    """

    @staticmethod
    def forward(ctx, steps: Tensor, rows: int, before: int, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(steps, *operands)
        ctx.rows, ctx.before = rows, before
        x, y = operands[:rows], operands[rows:]
        out = [steps.new_zeros(*steps.shape[:2], steps.shape[1]) for _ in range(len(x) * len(y))]
        for matrix, (row, column) in zip(out, product(x, y)):
            matrix.diagonal(dim1=1, dim2=2).copy_((row * column).sum(-1))
        for size, right, left, _, _ in _levels(steps, x, y, before):
            blocks = (right @ left.mT).unflatten(3, (-1, size)).unflatten(2, (-1, size))
            for matrix, block in zip(out, _each(blocks)):
                _corners(matrix, size).copy_(block)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dout: Tensor) -> tuple[Tensor | None, ...]:
        steps, *operands = ctx.saved_tensors
        x, y = operands[: ctx.rows], operands[ctx.rows :]
        dx, dy = [torch.zeros_like(z) for z in x], [torch.zeros_like(z) for z in y]
        for dmatrix, (row, column), (drow, dcolumn) in zip(dout, product(x, y), product(dx, dy)):
            own = dmatrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            drow.addcmul_(own, column)
            dcolumn.addcmul_(own, row)
        for size, right, left, right_weights, left_weight in _levels(steps, x, y, ctx.before):
            dblocks = steps.new_empty(*left.shape[:2], len(x), size, len(y), size)
            for dmatrix, dblock in zip(dout, _each(dblocks)):
                dblock.copy_(_corners(dmatrix, size))
            dblocks = dblocks.flatten(4).flatten(2, 3)
            dright, dleft = (dblocks @ left).split(size, 2), (dblocks.mT @ right).split(size, 2)
            for drow, part, weight in zip(dx, dright, right_weights):
                _half(drow, size, 1).addcmul_(part, weight)
            for dcolumn, part in zip(dy, dleft):
                _half(dcolumn, size, 0).addcmul_(part, left_weight)
        return None, None, None, *dx, *dy


def _each(blocks: Tensor):
    """The (X,count,size,size) views of (X,count,rows,size,columns,size), in the order of the products."""
    return (block for row in blocks.unbind(2) for block in row.unbind(3))


def _levels(steps: Tensor, x: list[Tensor], y: list[Tensor], before: int):
    """Yield for every pair of blocks of `size` tokens the weighted rows on its right and columns on its left,
    (X,count,operands*size,K), and their weights."""
    for size, upto, upto_before, after in doubled_sums(steps):
        if size == steps.shape[1]:
            return
        weight = _half(upto, size, 1).exp2()
        weights = [weight] * len(x)
        if before:
            weights[:before] = [_half(upto_before, size, 1).exp2()] * before
        left_weight = _half(after, size, 0).exp2()
        right = torch.cat([_half(row, size, 1) * w for row, w in zip(x, weights)], 2)
        left = torch.cat([_half(column, size, 0) * left_weight for column in y], 2)
        yield size, right, left, weights, left_weight


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

    y_n = X_n (right_n - reads_n S_n),  S_{n+1} = carry_n S_n + writes_n + removals_n^T y_n

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
            torch.bmm(inverse[n], torch.baddbmm(right[n], reads[n], states[n], alpha=-1), out=y[n])
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
