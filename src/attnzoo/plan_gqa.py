"""Which query heads H, key/value heads G and model size N reach a loss at a context length at least cost.

Cost-Optimal Grouped-Query Attention for Long-Context LLMs, arXiv 2503.09579. The heads need not fill the
width: H d != D.

    for each pair (H, G):  Loss(N) = (a / N)^b + E,  fitted on a few small runs (N without embeddings)
    N*(H, G) = a / (target - E)^(1/b),  none where the target is not above E
    memory in values   M = N + 2 T L d G
    inference per token  C = 2 N + 4 T L d H
    the plan minimises  Z = lam M^(1/2) + (1 - lam) C^(1/3)

Curves fitted at a short T serve a long one: T does not interact with N, H and G. Our choice: L from N by
N = 12 L D² with D = 128 L unless a table of (N, L) is given, interpolated in logarithms; the fit solves the
two linear unknowns for each b and searches b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

HEADS = (1, 2, 4, 8, 16, 32)
EXPONENTS = (0.01, 3.0)  # between which b is searched


class Curve(NamedTuple):
    """``Loss(N) = (a / N)^b + E``; ``r2``: share of the variance that the fit explains."""

    a: float
    b: float
    E: float
    r2: float = 1.0

    def loss(self, size: float) -> float:
        """The loss of a model of ``size`` parameters."""
        return (self.a / size) ** self.b + self.E

    def size(self, target: float) -> float:
        """Parameters that reach the loss ``target``; infinite where it is not above E."""
        if target <= self.E:
            return math.inf
        return self.a / (target - self.E) ** (1 / self.b)


class Plan(NamedTuple):
    """A candidate at its N*: ``num_heads`` H, ``num_kv_heads`` G, ``size`` N, ``depth`` L.

    ``memory`` is in values, ``flops`` per token of inference, ``train_flops`` per token of a causal sequence.
    """

    num_heads: int
    num_kv_heads: int
    size: float
    depth: float
    memory: float
    flops: float
    train_flops: float
    cost: float


def candidates(heads: Sequence[int] = HEADS) -> list[tuple[int, int]]:
    """The pairs (H, G) with G <= H where G divides H."""
    return [(h, g) for h in sorted(heads) for g in sorted(heads) if h % g == 0]


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Curve:
    """The curve nearest to the runs, in least squares, with a > 0 and E >= 0.

    Raises:
        ValueError: fewer than three different sizes, a value out of range, or losses that do not fall.
    """
    if len(sizes) != len(losses) or len(set(sizes)) < 3:
        raise ValueError(
            f"sizes: three unknowns need runs of three sizes with a loss each, got {list(sizes)}, "
            f"{len(losses)} losses"
        )
    if min(sizes) <= 0 or min(losses) <= 0:
        bad, field = (min(sizes), "sizes") if min(sizes) <= 0 else (min(losses), "losses")
        raise ValueError(f"{field}: must be positive, got {bad}")
    x, y = (torch.tensor(z, dtype=torch.float64) for z in (sizes, losses))
    unit = x.log().mean().exp().item()  # so that the powers stay near 1
    x = x / unit

    def solved(b: float) -> tuple[float, float, float]:
        """The best c and E of ``c N^-b + E`` and what they leave."""
        p = x**-b
        centred = p - p.mean()
        c = ((centred * y).sum() / centred.square().sum()).item()
        E = (y.mean() - c * p.mean()).item()
        if E < 0:
            c, E = ((p * y).sum() / p.square().sum()).item(), 0.0
        return c, E, (y - c * p - E).square().sum().item()

    b = _least(lambda b: solved(b)[2], *EXPONENTS)
    c, E, left = solved(b)
    if c <= 0:
        raise ValueError(f"losses: must fall with the size, got {list(losses)} at {list(sizes)}")
    spread = (y - y.mean()).square().sum().item()
    return Curve(unit * c ** (1 / b), b, E, 1 - left / spread if spread else 1.0)


def plan(
    target_loss: float,
    T: float,
    curves: Mapping[tuple[int, int], Curve],
    *,
    head_dim: int = 64,
    depth: Sequence[tuple[float, float]] | None = None,
    lam: float = 0.9,
    exponents: tuple[float, float] = (1 / 2, 1 / 3),
) -> tuple[int, int, float]:
    """``(H, G, N)`` of the least cost; see `rank` for all candidates.

    Raises:
        ValueError: an option out of range, or a target that no curve reaches.
    """
    best = rank(target_loss, T, curves, head_dim=head_dim, depth=depth, lam=lam, exponents=exponents)[0]
    return best.num_heads, best.num_kv_heads, best.size


def rank(
    target_loss: float,
    T: float,
    curves: Mapping[tuple[int, int], Curve],
    *,
    head_dim: int = 64,
    depth: Sequence[tuple[float, float]] | None = None,
    lam: float = 0.9,
    exponents: tuple[float, float] = (1 / 2, 1 / 3),
) -> list[Plan]:
    """Every candidate that reaches the loss, the cheapest first.

    Args:
        target_loss: loss to reach. T: context length, at least 0.
        curves: by (H, G); the candidates are its keys.
        head_dim: d. depth: rows (N, L) of the sweep's models; default N = 12 L (128 L)².
        lam: weight of memory against compute, in [0, 1]. exponents: of both.

    Raises:
        ValueError: an option out of range, or a target that no curve reaches.
    """
    rules = {
        "T": (T >= 0, "at least 0", T),
        "head_dim": (head_dim >= 1, "at least 1", head_dim),
        "lam": (0 <= lam <= 1, "in [0, 1]", lam),
        "exponents": (min(exponents) > 0, "positive", exponents),
        "depth": (depth is None or len(depth) > 0, "some rows (N, L) or null", depth),
    }
    for name, (fits, rule, value) in rules.items():
        if not fits:
            raise ValueError(f"{name}: must be {rule}, got {value}")
    for h, g in curves:
        if g < 1 or h % g:
            raise ValueError(f"curves: G must divide H, got H={h}, G={g}; leave the pair out")
    found = []
    for (h, g), curve in curves.items():
        size = curve.size(target_loss)
        if math.isinf(size):
            continue
        layers = depth_of(size, depth)
        memory = size + 2 * T * layers * head_dim * g
        flops = 2 * size + 4 * T * layers * head_dim * h
        train = 3 * (2 * size + 2 * T * layers * head_dim * h)
        cost = lam * memory ** exponents[0] + (1 - lam) * flops ** exponents[1]
        found.append(Plan(h, g, size, layers, memory, flops, train, cost))
    if not found:
        least = min((curve.E for curve in curves.values()), default=math.nan)
        raise ValueError(
            f"target_loss: must be above the lowest limit of the curves, {least:.4g}, got {target_loss}"
        )
    return sorted(found, key=lambda p: (p.cost, p.size))


def depth_of(size: float, table: Sequence[tuple[float, float]] | None = None) -> float:
    """Layers of a model of ``size`` parameters; beyond the table's ends its last slope goes on."""
    if table is None:
        return (size / (12 * 128**2)) ** (1 / 3)
    rows = sorted((math.log(n), math.log(layers)) for n, layers in table)
    if len(rows) == 1:
        return math.exp(rows[0][1])
    x = math.log(size)
    i = min(max(sum(n <= x for n, _ in rows) - 1, 0), len(rows) - 2)
    (n0, l0), (n1, l1) = rows[i], rows[i + 1]
    return math.exp(l0 + (l1 - l0) * (x - n0) / (n1 - n0))


def _least(f: Callable[[float], float], low: float, high: float) -> float:
    """Where ``f`` is least: a grid, then the golden section around its best point."""
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    best = min(range(201), key=lambda i: f(grid[i]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if f(left) < f(right):
            high = right
        else:
            low = left
    return (low + high) / 2
