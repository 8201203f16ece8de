"""A network that chooses the rank of each segment of a document from the segment before it.

Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self-Attention in Large Language Models.

    state   [mean over the previous segment of relu(conv1d(x)); W (mean, variance, norm of W_q, W_k, W_v);
             embedding of the previous rank], 128 wide; two post-norm layers of length one, then an MLP
    action  the largest logit among ranks with |dA| <= safety |A|,  |dA|² = sum_(c between the ranks) sigma_c²
    reward  cos(o of all channels, o) - 0.05 GFLOP of the segment's scores - 0.1 |dA|;  REINFORCE

Causal: a segment's own tokens never change its rank, and the first segment of a document has the largest.
Our choice, beyond the causal form: the convolution looks back inside its segment; self-attention of length
one is W_o W_v, so it has no W_q and W_k; exploration (rate 0.1, times 0.995 per step) is drawn once per
optimiser step for the k-th segment of all documents; the reward is taken per token on the heads before W_o
and compared with its mean over the tokens; x is detached, so the loss trains the policy only. Every rank
differs by row and segment, so channels are zeroed, not skipped: the FLOPs are a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.factorised.ordered import OrderedFactors
from attnzoo.attention.slots import Slot
from attnzoo.cost import Work

POOL, PART, WIDE, TAPS = 64, 32, 128, 3
EXPLORES, FADES = 0.1, 0.995


class Layer(nn.Module):
    """A post-norm encoder layer over a sequence of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.mix = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE)
        self.up, self.down = nn.Linear(WIDE, 2 * WIDE), nn.Linear(2 * WIDE, WIDE)
        self.first, self.second = nn.LayerNorm(WIDE), nn.LayerNorm(WIDE)

    def forward(self, z: Tensor) -> Tensor:
        z = self.first(z + self.mix(self.value(z)))
        return self.second(z + self.down(self.up(z).relu()))


class SegmentRank(Stage):
    """Zeroes the channels of queries beyond the rank of their segment.

    Args:
        project: whose factors it orders and measures. ranks: ascending. length: tokens of a segment.
        refresh: steps between measurements. safety: see the module. longest: tokens of a sequence.
    """

    rank = 60
    exact = False
    sides = "q"

    unsplit = "one policy decides by the weights of all heads"

    def __init__(
        self,
        project: OrderedFactors,
        ranks: tuple[int, ...],
        length: int,
        refresh: int,
        safety: float,
        longest: int,
    ) -> None:
        super().__init__()
        self.owner, self.ranks, self.length = (project,), ranks, length
        self.refresh, self.safety, n = refresh, safety, len(ranks)
        self.conv = nn.Linear(project.dim, TAPS * POOL, bias=False)
        self.conv_bias = nn.Parameter(torch.zeros(POOL))
        self.weights, self.previous = nn.Linear(9, PART), nn.Embedding(n, PART)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Sequential(nn.Linear(WIDE, POOL), nn.ReLU(), nn.Linear(POOL, n))
        self.register_buffer("table", torch.tensor(ranks))
        self.register_buffer("measured", self._measure())
        self.register_buffer("change", torch.zeros(n, n))  # |dA| / |A| of each pair of ranks
        self.register_buffer("explore", torch.full((-(-longest // length),), -1))  # -1 = does not explore

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        ranks = self.table[self._choose(call)]
        call.stat("dynamic_rank/rank", ranks)
        call.notes |= {"ranks": ranks, "all channels": q}
        keep = torch.arange(q.shape[-1], device=q.device) < ranks[:, None, :, None]
        return torch.where(keep, q, torch.zeros((), dtype=q.dtype, device=q.device)), k, v

    def _choose(self, call: Call) -> Tensor:
        """``(B, T)`` which of the ranks each token has."""
        line, L, (B, T) = call.line, self.length, call.x.shape[:2]
        order, full = line.order.expand(B, T), len(self.ranks) - 1
        place = order % L
        state = call.mem.state("rank_chosen")
        held = torch.full((B,), full, device=order.device) if state is None else state[:, 0].long()
        with torch.autocast(call.x.device.type, enabled=False):
            before = self._pooled(place, call)
            count = _boundaries(call, L)
            if not count:
                return torch.where(order < L, full, held[:, None])
            begins = (place == 0) & (order > 0)
            begins = begins if line.valid is None else begins & line.valid
            where = (~begins).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]  # (B, n)
            valid, order_at = begins.gather(1, where), order.gather(1, where)
            logits = self._logits(before.gather(1, where[..., None].expand(-1, -1, POOL)) / L)
        last, priors, acts = held, [], []
        for j in range(where.shape[1]):
            prior = torch.where(order_at[:, j] == L, full, last)
            act = self._act(logits[:, j].detach(), prior, order_at[:, j] // L)
            last = torch.where(valid[:, j], act, last)
            priors.append(prior)
            acts.append(act)
        call.mem.put("rank_chosen", last[:, None].to(before.dtype))
        index, priors, acts = begins.cumsum(1) - 1, torch.stack(priors, dim=1), torch.stack(acts, dim=1)
        if self.training and call.collects:
            call.notes["rank policy"] = self._taken(logits, priors, acts, index, order)
        chosen = torch.where(index >= 0, acts.gather(1, index.clamp(min=0)), held[:, None])
        return torch.where(order < L, full, chosen)

    def _pooled(self, place: Tensor, call: Call) -> Tensor:
        """``(B, T, 64)`` at each token the sum over its segment up to the token before it."""
        x, T = call.x.detach().to(self.conv.weight.dtype), call.x.shape[1]
        parts = self.conv(x)  # taps of the token two back, one back, and of the token itself
        both = call.mem.tail("rank_conv", parts[..., : 2 * POOL], TAPS - 1)
        y = parts[..., 2 * POOL :] + self.conv_bias
        for back in (1, 2):
            at = slice(TAPS - 1 - back, TAPS - 1 - back + T)
            tap = both[:, at, (2 - back) * POOL : (3 - back) * POOL]
            y = y + torch.where((place >= back)[..., None], tap, torch.zeros((), dtype=y.dtype))
        wide = y.relu() if y.dtype == torch.float64 else y.relu().float()
        return _segment_sums(wide, place, call, "rank_pool").to(y.dtype)

    def _logits(self, pooled: Tensor) -> Tensor:
        """``(B, n, ranks, ranks)``: of each rank after each previous one."""
        n = len(self.ranks)
        measured = self.weights(self.measured.to(pooled.dtype)).expand(*pooled.shape[:2], n, -1)
        previous = self.previous.weight.expand(*pooled.shape[:2], -1, -1)
        z = torch.cat([pooled[:, :, None].expand(-1, -1, n, -1), measured, previous], dim=-1)
        for layer in self.layers:
            z = layer(z)
        return self.head(z).masked_fill(self.change > self.safety, float("-inf"))

    def _act(self, logits: Tensor, prior: Tensor, segment: Tensor) -> Tensor:
        """``(B,)`` the action after ``prior``, of logits ``(B, ranks, ranks)``."""
        own = logits[torch.arange(len(prior), device=prior.device), prior]
        act = own.argmax(-1)
        if not self.training:
            return act
        drawn = self.explore[segment.clamp(max=len(self.explore) - 1)]
        drawn = torch.where(segment < len(self.explore), drawn, -1)
        allowed = own.gather(1, drawn.clamp(min=0)[:, None])[:, 0] > float("-inf")
        return torch.where((drawn >= 0) & allowed, drawn, act)

    def _taken(
        self, logits: Tensor, prior: Tensor, act: Tensor, index: Tensor, order: Tensor
    ) -> tuple[Tensor, ...]:
        """Per token ``(B, T)``: log-probability of its segment's action, |dA|, and whether there was one."""
        own = logits.gather(2, prior[..., None, None].expand(-1, -1, 1, logits.shape[-1]))[:, :, 0]
        log_p = own.log_softmax(-1).gather(2, act[..., None])[..., 0]
        at = index.clamp(min=0)
        decided = (index >= 0) & (order >= self.length)
        return log_p.gather(1, at), self.change[prior, act].gather(1, at), decided

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        n, size = len(self.ranks), self.explore.shape
        wants = torch.rand(size, generator=generator) < EXPLORES * FADES**step
        drawn = torch.randint(n, size, generator=generator)
        self.explore.copy_(torch.where(wants, drawn, -1))
        if step == 1 or step % self.refresh == 0:
            energy = self.owner[0].order().square().sum(0).cumsum(0)
            kept = energy[self.table.to(energy.device) - 1] / energy[-1].clamp(min=1e-300)
            self.change.copy_((kept[:, None] - kept).abs().sqrt())
        self.measured.copy_(self._measure())

    @torch.no_grad()
    def _measure(self) -> Tensor:
        """Mean, variance and norm of W_q, W_k, W_v."""
        weights = [getattr(self.owner[0], name).weight for name in ("a_proj", "b_proj", "v_proj")]
        return torch.stack([f(w) for w in weights for f in (torch.mean, torch.var, torch.norm)])

    def apart(self) -> str:
        return "a segment may begin on one rank, which alone knows what its policy's loss asks (rank_policy)"

    def memory(self) -> dict[str, Slot]:
        return {
            "rank_conv": Slot("tail", (TAPS - 1, 2 * POOL)),
            "rank_pool": Slot("state", (POOL,)),
            "rank_chosen": Slot("state", (1,)),
        }

    def work(self, length: int) -> Iterable[Work]:
        dim, n, decisions = self.owner[0].dim, len(self.ranks), (length - 1) // self.length
        layer = 2 * WIDE * WIDE + 4 * WIDE * WIDE
        each = n * (2 * layer + WIDE * POOL + POOL * n)
        yield Work("gates", "rank policy", 2 * (length * dim * TAPS * POOL + decisions * each))

    def weight_flops(self) -> float:
        return 2.0 * 9 * PART


def _boundaries(call: Call, length: int) -> int:
    """A bound of the segments after the first that begin in this forward, per row; exact in lockstep."""
    line, T = call.line, call.x.shape[1]
    if line.clock is not None and line.doc is None:
        return (line.past + T - 1) // length - max(line.past - 1, 0) // length
    return (T - 1) // length + (line.clock is not None)


def _segment_sums(z: Tensor, place: Tensor, call: Call, slot: str) -> Tensor:
    """``sum`` of ``z`` ``(B, T, C)`` over the earlier tokens of each segment, and of all of the one that ends
    before a token that begins one; ``place``: of tokens in their segment. The slot holds the sum so far."""
    line, start, T = call.line, call.mem.state(slot), z.shape[1]
    z = line.blank(z)
    first = torch.arange(T, device=z.device) - place  # where the segment begins in this forward
    total = z.cumsum(1)
    index = first.clamp(min=0)[..., None].expand_as(z)
    sums = total - (total.gather(1, index) - z.gather(1, index))
    head = torch.zeros_like(z[:, :1])
    if start is not None:
        head = head + start[:, None]  # a copy: the slot is written below
        sums = sums + head * (first < 0)[..., None]
        ends = sums[:, -1]
        if line.valid is not None:
            count = line.valid.sum(1)
            ends = sums.gather(1, (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, z.shape[2]))[:, 0]
            ends = torch.where((count > 0)[:, None], ends, head[:, 0])
        call.mem.put(slot, ends)
    return torch.cat([head, sums[:, :-1]], dim=1)
