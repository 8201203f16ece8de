"""How a chunked scan cuts time into chunks, and the decay weights and document masks of such a grid.

Tensors are chunk-major, (N,B,H,C,·) for N chunks of C tokens: a loop over chunks takes contiguous slices.
G is the sum of log decays from the start of a chunk, the token's own included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo_kernels.scan.blocks import DiagonalProducts, doubled_sums, first_order

# Below this a decay is exp(g) = 0 in fp64 too; the bound keeps differences of sums finite when g is -inf.
MIN_LOG_DECAY = -1000.0


def diagonal_chunk(chunk_size: int, K: int) -> int:
    """Tokens per chunk under a diagonal gate: every doubling of a chunk weighs all operands once more, every
    halving keeps twice as many states; at K / 2 tokens these take no more room than four rows of values.
    """
    return min(chunk_size, max(16, K // 2))


@dataclass(frozen=True)
class Grid:
    """T tokens as `count` chunks of `size`, the last one padded."""

    T: int
    count: int
    size: int

    @classmethod
    def of(cls, T: int, chunk_size: int) -> Grid:
        """Equal chunks of at most chunk_size: 65 tokens make 33 + 32, not 64 and 1 padded to 64."""
        count = -(-T // chunk_size)
        return cls(T, count, -(-T // count))

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,T,H,...) -> contiguous (N,B,H,C,...), padded with zeros at the end."""
        padding = self.count * self.size - self.T
        if padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        x = x.unflatten(1, (self.count, self.size)).transpose(0, 1).transpose(2, 3)
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,B,H,C,V) -> contiguous (B,T,H,V)."""
        x = x.permute(1, 0, 3, 2, 4).to(dtype, memory_format=torch.contiguous_format)
        return x.flatten(1, 2)[:, : self.T].contiguous()


@dataclass(frozen=True)
class Runs:
    """Which tokens of a grid share a document."""

    pair: Tensor  # (N,B,1,C,C) bool: same document
    read: Tensor  # (N,B,1,C,1) bool: the token is of the document whose state enters the chunk
    write: Tensor  # (N,B,1,C,1) bool: the token is of the document of the chunk's last token
    carry: Tensor  # (N,B,1,1,1) bool: the entering document goes on to the end of the chunk

    @classmethod
    def of(cls, segments: Tensor, grid: Grid) -> Runs:
        """From (B,T) run indices; padding belongs to the last run."""
        tokens = torch.arange(grid.count * grid.size, device=segments.device).clamp(max=grid.T - 1)
        runs = segments[:, tokens].unflatten(1, (grid.count, grid.size)).transpose(0, 1)  # N,B,C
        last = runs[..., -1]
        entering = torch.cat([torch.zeros_like(last[:1]), last[:-1]])  # run 0 owns the initial state
        return cls(
            pair=(runs[..., :, None] == runs[..., None, :]).unsqueeze(2),
            read=(runs == entering[..., None])[:, :, None, :, None],
            write=(runs == last[..., None])[:, :, None, :, None],
            carry=(entering == last)[:, :, None, None, None],
        )


def split_gates(g: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Gates per token of a grid: (B,T,H) -> (N,B,H,C,1); (B,T,H,K) -> (N,B,H,C,K); (H,) -> (1,1,H,C,1), or
    (N,1,H,C,1) if the last chunk is padded: zero there.
    """
    if g.dim() > 1:
        return grid.split(g if g.dim() == 4 else g.unsqueeze(-1), dtype)
    token = torch.arange(grid.count * grid.size, device=g.device).view(grid.count, 1, 1, grid.size, 1)
    if grid.count * grid.size == grid.T:
        token = token[:1]
    return torch.where(token < grid.T, g.to(dtype)[:, None, None], 0.0)


class DecaySums(torch.autograd.Function):
    """Stand-ins for G_r = g_1 + ... + g_r in a chunk, and for its last row, that only carry gradients.

    The weights exp(differences of G) are constants for autograd; their users hand G's gradient in by `Gate`
    and by the state passes, and this sums it up to that of g (..., C, K) -> (..., C, K), (..., 1, K).
    """

    @staticmethod
    def forward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        return g.view_as(g), g[..., -1:, :].clone()

    @staticmethod
    @first_order
    def backward(ctx, dsums: Tensor, dtotals: Tensor) -> Tensor:
        if not dsums.is_cpu or torch.compiler.is_compiling():
            return dsums.flip(-2).cumsum(-2).flip(-2).add_(dtotals)
        # torch's sums along an axis that is not the last are slow; steps over all chunks and heads are not
        out = dsums.clone(memory_format=torch.contiguous_format)
        steps = out.unbind(-2)
        steps[-1].add_(dtotals.squeeze(-2))
        for r in reversed(range(len(steps) - 1)):
            steps[r].add_(steps[r + 1])
        return out


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
    @first_order
    def backward(ctx, dx: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        product = (x * dx).sum_to_size(ctx.shape)
        return dx, product if ctx.sign == 1 else product.neg_(), None


class Decay:
    """Decay weights exp(differences of G) of one grid: what the scalar and the diagonal gates share.

    Weights are constants for autograd; operands go through `row` (used with exp(G)) or `column` (with
    exp(-G)), which give G its gradient; `totals`, G at the end of every chunk, takes the share of the state
    passes.
    """

    def __init__(
        self, gates: Tensor | None, upto: Tensor | None, after: Tensor | None, runs: Runs | None, k: Tensor
    ):
        """`upto` and `after` are G and G_C - G in log2, (·,·,H,C,1 or K), or None; k (N,B,H,C,K)."""
        N, B, H = k.shape[:3]
        self.runs, self.dtype = runs, k.dtype
        self.sums = self.totals = self.read_weight = self.write_weight = None
        carry = k.new_ones(1, 1, 1, 1, 1)
        if gates is not None:
            self.sums, totals = DecaySums.apply(gates)
            self.totals = totals.mT.expand(N, B, H, -1, 1).flatten(1, 2)
        if upto is not None:
            self.read_weight = self._weights(upto, runs and runs.read)
            self.write_weight = self._weights(after, runs and runs.write)
            carry = self._weights(upto[..., -1:, :].mT, runs and runs.carry)  # a factor per row of the state
        self.carry = carry.expand(N, B, H, -1, 1).flatten(1, 2)

    def _weights(self, logs: Tensor, mask: Tensor | None) -> Tensor:
        weights = logs.to(self.dtype).exp2()
        return weights if mask is None else weights * mask

    def row(self, x: Tensor) -> Tensor:
        return x if self.sums is None else Gate.apply(x, self.sums, 1)

    def column(self, x: Tensor) -> Tensor:
        return x if self.sums is None else Gate.apply(x, self.sums, -1)

    def read(self, x: Tensor) -> Tensor:
        """x exp(G), zero where the token may not read the state that enters the chunk."""
        return x if self.read_weight is None else x * self.read_weight

    def write(self, x: Tensor) -> Tensor:
        """x exp(G_C - G), zero where the token does not reach the state that leaves the chunk."""
        return x if self.write_weight is None else x * self.write_weight


class ScalarDecay(Decay):
    """One decay per token and head, per head, or none."""

    def __init__(self, gates: Tensor | None, runs: Runs | None, k: Tensor):
        logs = None
        if gates is not None:
            # In fp64 a gate near 0 that follows one of -50 keeps its digits in the differences.
            logs = gates.detach().double().clamp(min=MIN_LOG_DECAY).cumsum(-2) * math.log2(math.e)
        elif runs is not None:
            logs = k.new_zeros(1, 1, 1, k.shape[3], 1, dtype=torch.float64)
        after = None if logs is None else logs[..., -1:, :] - logs
        super().__init__(gates, logs, after, runs, k)
        self.pair = None if logs is None else self._pair_weights(logs)

    def _pair_weights(self, logs: Tensor) -> Tensor:
        """exp(G_r - G_j) for j <= r in one document, else 0; (N,B,H,C,C) or broadcast to it.

        The fp64 difference is taken as that of two working-precision parts: it costs half the memory traffic.
        """
        high = logs.to(self.dtype)
        weights = high - high.mT
        if self.dtype != torch.float64:
            low = (logs - high).to(self.dtype)
            weights.add_(low).sub_(low.mT)
        weights = weights.clamp_(max=0).exp2_().tril_()
        return weights if self.runs is None else weights * self.runs.pair

    def products(self, rows: list[Tensor], columns: list[Tensor]) -> list[list[Tensor]]:
        """M^{xy} for every x in rows and y in columns, zero for j > r: (N,B,H,C,C) each."""

        def product(x: Tensor, y: Tensor) -> Tensor:
            matrix = x @ y.mT
            return matrix.tril_() if self.pair is None else matrix.mul_(self.pair)

        return [[product(x, y) for y in columns] for x in rows]


class DiagonalDecay(Decay):
    """A decay per token, head and row of the state. `before`, there if `strict`, means without the token's
    own decay."""

    def __init__(self, gates: Tensor, runs: Runs | None, k: Tensor, strict: bool):
        N, B, H, self.size, _ = k.shape
        self.steps = self._to_blocks(gates.detach() * math.log2(math.e))
        _, *sums = list(doubled_sums(self.steps, strict))[-1]
        upto, self.before, after = (
            None if x is None else x.unflatten(0, (N, B, H))[..., : self.size, :] for x in sums
        )
        super().__init__(gates, upto, after, runs, k)

    def _to_blocks(self, x: Tensor) -> Tensor:
        """(N,B,H,C,K) -> (NBH,P,K), P the next power of two, padded with zeros."""
        padding = (1 << (self.size - 1).bit_length()) - self.size
        return (F.pad(x, (0, 0, 0, padding)) if padding else x).flatten(0, 2)

    def row_before(self, x: Tensor) -> Tensor:
        return Gate.apply(x, F.pad(self.sums[..., :-1, :], (0, 0, 1, 0)), 1)

    def read_before(self, x: Tensor) -> Tensor:
        return x * self._weights(self.before, self.runs and self.runs.read)

    def products(self, rows: list[Tensor], columns: list[Tensor], before: int = 0) -> list[list[Tensor]]:
        """As ScalarDecay.products; the first `before` rows go without their own decay.

        The product of such a row with its own token is not masked.
        """
        operands = [self._to_blocks(x) for x in (*rows, *columns)]
        matrices = DiagonalProducts.apply(self.steps, len(rows), before, *operands)
        matrices = [x.unflatten(0, rows[0].shape[:3])[..., : self.size, : self.size] for x in matrices]
        if self.runs is not None:
            matrices = [x * self.runs.pair for x in matrices]
        return [matrices[i * len(columns) : (i + 1) * len(columns)] for i in range(len(rows))]
