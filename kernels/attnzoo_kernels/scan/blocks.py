"""Block algebra inside one chunk: products under a diagonal decay and the inverse of a unit lower triangle.

Shapes: X chunks of all sequences and heads, C tokens in a chunk, P = 2^n tokens, K key width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 2  # rows of the smaller operand


def first_order(backward: Callable) -> Callable:
    """Refuse create_graph=True; torch's `once_differentiable` would let autograd.grad(..., inputs) pass."""

    @wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("scan: form='chunked' has no second derivatives; use form='recurrent'")
        return backward(ctx, *grads)

    return checked


def doubled_sums(steps: Tensor, strict: bool) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor]]:
    """Sums of `steps` (X,P,K) along time inside blocks of 1, 2, 4 ... P = 2^n tokens; updated in place.

    Yields (block size, sum from the block's start up to the token, the same before the token's own step, if
    `strict`, sum from after the token to the block's end). Nothing is subtracted, so nothing cancels.
    """
    upto, after = steps.clone(), torch.zeros_like(steps)
    before = torch.zeros_like(steps) if strict else None
    size, P = 1, steps.shape[1]
    yield size, upto, before, after
    while size < P:
        left, right = _half(upto, size, 0)[:, :, -1:], _half(upto, size, 1)
        _half(after, size, 0).add_(right[:, :, -1:])
        if before is not None:
            _half(before, size, 1).add_(left)
        right.add_(left)
        size *= 2
        yield size, upto, before, after


def _half(x: Tensor, size: int, side: int) -> Tensor:
    """View (X,P,K) as the left (0) or right (1) block of each pair of blocks: (X,P/2size,size,K)."""
    return x.unflatten(1, (-1, 2, size))[:, :, side]


def _corners(matrix: Tensor, size: int, row: int = 1, column: int = 0) -> Tensor:
    """View (X,P,P) as one quarter (lower left) of its diagonal blocks of 2*size: (X,P/2size,size,size)."""
    X, P, _ = matrix.shape
    view = matrix.view(X, P // (2 * size), 2, size, P // (2 * size), 2, size)
    return view[:, :, row, :, :, column].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def unit_lower_inverse(matrix: Tensor) -> Tensor:
    """(I + tril(matrix, -1))^-1 for (..., C, C) by merging inverted blocks of 1, 2, 4 ... rows.

    inv [[A, 0], [B, D]] = [[A', 0], [-D' B A', D']]: every factor is a block of the true inverse, so nothing
    grows that is not in the result, unlike the powers in a Neumann product. Not differentiable.
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
        _corners(inverse, size).sub_(corner)
        size *= 2
    return inverse.view(*matrix.shape[:-2], P, P)[..., :C, :C]


class DiagonalProducts(torch.autograd.Function):
    """M^{xy}_{rj} = sum_k x_{r,k} y_{j,k} exp(G_{r,k} - G_{j,k}) for j <= r, else 0; x in rows, y in columns.

    Blocks are doubled up from single tokens. Between the halves of a block the decay splits into that from
    the middle to the row and that from the column to the middle: both exponents are <= 0, and exactly the
    pairs j < r are multiplied. A token's product with itself carries no decay.

    Shape: steps (X,P,K) log2 decays, constants here (`Gate` gives G its gradient); operands (X,P,K): `rows`
    row operands, of which the first `before` leave out the row's own decay, then the columns
    -> a tuple of (X,P,P), the first row operand with every column, the second ...
    """

    @staticmethod
    def forward(ctx, steps: Tensor, rows: int, before: int, *operands: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(steps, *operands)
        ctx.rows, ctx.before = rows, before
        x, y = operands[:rows], operands[rows:]
        out = [steps.new_zeros(*steps.shape[:2], steps.shape[1]) for _ in range(len(x) * len(y))]
        for matrix, (row, column) in zip(out, product(x, y), strict=True):
            matrix.diagonal(dim1=1, dim2=2).copy_((row * column).sum(-1))
        for size, right, left, _, _ in _levels(steps, x, y, before):
            blocks = (right @ left.mT).unflatten(3, (-1, size)).unflatten(2, (-1, size))
            for matrix, block in zip(out, _each(blocks), strict=True):
                _corners(matrix, size).copy_(block)
        return tuple(out)

    @staticmethod
    @first_order
    def backward(ctx, *dout: Tensor) -> tuple[Tensor | None, ...]:
        steps, *operands = ctx.saved_tensors
        x, y = operands[: ctx.rows], operands[ctx.rows :]
        dout = [dmatrix.contiguous() for dmatrix in dout]
        own = [dmatrix.diagonal(dim1=1, dim2=2).unsqueeze(-1) for dmatrix in dout]
        dx = [_weighted_sum(own[i * len(y) : (i + 1) * len(y)], y) for i in range(len(x))]
        dy = [_weighted_sum(own[j :: len(y)], x) for j in range(len(y))]
        for size, right, left, right_weights, left_weight in _levels(steps, x, y, ctx.before):
            dblocks = steps.new_empty(*left.shape[:2], len(x), size, len(y), size)
            for dmatrix, dblock in zip(dout, _each(dblocks), strict=True):
                dblock.copy_(_corners(dmatrix, size))
            dblocks = dblocks.flatten(4).flatten(2, 3)
            dright, dleft = (_product(*z).split(size, 2) for z in ((dblocks, left), (dblocks.mT, right)))
            for drow, part, weight in zip(dx, dright, right_weights, strict=True):
                _half(drow, size, 1).addcmul_(part, weight)
            for dcolumn, part in zip(dy, dleft, strict=True):
                _half(dcolumn, size, 0).addcmul_(part, left_weight)
        return None, None, None, *dx, *dy


def _each(blocks: Tensor) -> Iterator[Tensor]:
    """The (X,count,size,size) views of (X,count,rows,size,columns,size), in the order of the products."""
    return (block for row in blocks.unbind(2) for block in row.unbind(3))


def _levels(steps: Tensor, x: Sequence[Tensor], y: Sequence[Tensor], before: int) -> Iterator[tuple]:
    """Yield for pairs of blocks of `size` = 1, 2, 4 ... tokens: size, the weighted rows of the right blocks
    and columns of the left ones (X,P/2size,operands*size,K), the weights by row operand and for all columns.
    """
    for size, upto, upto_before, after in doubled_sums(steps, before > 0):
        if size == steps.shape[1]:
            return
        weight = _half(upto, size, 1).exp2()
        weights = [weight] * len(x)
        if before:
            weights[:before] = [_half(upto_before, size, 1).exp2()] * before
        left_weight = _half(after, size, 0).exp2()
        right = _side_by_side([_half(row, size, 1) for row in x], weights)
        left = _side_by_side([_half(column, size, 0) for column in y], [left_weight] * len(y))
        yield size, right, left, weights, left_weight


def _product(blocks: Tensor, operand: Tensor) -> Tensor:
    """(X,count,m,n) @ (X,count,n,K), on a CPU by element-wise steps where n is too small for its library."""
    if not blocks.is_cpu or blocks.shape[3] > SMALL or torch.compiler.is_compiling():
        return blocks @ operand
    total = blocks[..., :1] * operand[:, :, :1]
    for i in range(1, blocks.shape[3]):
        total.addcmul_(blocks[..., i, None], operand[:, :, i, None])
    return total


def _weighted_sum(weights: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total.addcmul_(weight, part)
    return total


def _side_by_side(parts: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Products of (X,count,size,K) parts and weights, (X,count,parts*size,K)."""
    if len(parts) == 1:
        return parts[0] * weights[0]
    if torch.compiler.is_compiling():  # a graph knows no output that is a view
        weighted = [part * weight for part, weight in zip(parts, weights, strict=True)]
        return torch.stack(weighted, dim=2).flatten(2, 3)
    X, count, size, K = parts[0].shape
    out = parts[0].new_empty(X, count, len(parts), size, K)
    for to, part, weight in zip(out.unbind(2), parts, weights, strict=True):
        torch.mul(part, weight, out=to)
    return out.flatten(2, 3)
