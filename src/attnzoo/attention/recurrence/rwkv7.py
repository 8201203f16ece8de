"""RWKV-7 time mix: a state that decays per channel, removes under one key and writes under another.

RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv 2503.14456.

    x^c = x_t + mu_c (x_(t-1) - x_t),  c in r w k v a g;   r, k, v = x^r W_r, x^k W_k, x^v W_v
    log decay = -e^(-1/2) sigmoid(w0 + tanh(x^w W_w1) W_w2),   a = sigmoid(a0 + x^a W_a1 W_a2)
    v <- v + (v_first - v) sigmoid(v0 + x^v W_v1 W_v2) after layer 0, whose v is v_first
    kappa = unit(k k_k) per head,   k~ = k (1 + (a - 1) k_a)
    S_t = Diag(decay) S_(t-1) - (kappa a)(kappa^T S_(t-1)) + k~ v^T,   o_t = S_t^T r_t       the old S is read
    o <- GroupNorm_head(o) + (r . (k~ r_k)) v,   y = (o * (sigmoid(x^g W_g1) W_g2)) W_o

Cached: S (H d d) in fp32 and the last x. v_first crosses layers in `Context.shared`, ``(B, T, D)``. Starts as
the released code's, W_o at 0. Our choice: default ranks are not above D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrence.rwkv7_start import Start
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.score import Early
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.gates import wide
from attnzoo.attention.stages.out import LinearOut
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.blends import blends
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register

MIXES = ("r", "w", "k", "v", "a", "g")


class LowRank(nn.Module):
    """``act(x W_1) W_2``."""

    def __init__(self, start: Start, name: str, rank: int) -> None:
        super().__init__()
        D, weights = start.dim, start.site.weights
        self.dim, self.rank, self.act = D, rank, {"w": torch.tanh, "g": torch.sigmoid}.get(name, lambda z: z)
        self.down = start.zero(weights.linear(f"{name}_down", D, rank))
        self.up = start.orthogonal(weights.linear(f"{name}_up", rank, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x)))

    @property
    def flops(self) -> int:
        return 2 * self.rank * (self.dim + self.up.out_features)

    def split(self, share: Share, heads: int) -> None:
        """Keeps the rank's heads of what comes out."""
        share.keep(self.down)
        share.rows(self.up, (heads, self.up.out_features // heads))


class ShiftedLerp(Early, Stage):
    """r, k and v of blends of each token with the one before; leaves those of the gates in ``call.notes``."""

    def __init__(self, start: Start, heads: int, v_rank: int) -> None:
        super().__init__()
        self.dim, self.heads, self.layer = start.dim, heads, start.site.layer
        self.mu = start.param(start.mixes(MIXES))
        self.r, self.v = (start.uniform(start.linear(name), 0.5) for name in "rv")
        self.k = start.uniform(start.linear("k"), 0.05)
        self.v_mix = None
        if self.layer:
            self.v_mix, self.v0 = LowRank(start, "v", v_rank), start.param(start.value_bias())

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(B, T, D)`` -> r, k, v ``(B, H, T, d)``."""
        last = call.mem.tail("x", x, 1)[:, :-1]
        if call.line.doc is not None:
            last = torch.where((call.line.order >= 1)[..., None], last, torch.zeros((), dtype=x.dtype))
        blend = dict(zip(MIXES, blends(x, last, self.mu.to(x.dtype)), strict=True))
        call.notes |= {f"x^{name}": blend[name] for name in "wag"}
        r, k, v = self.r(blend["r"]), self.k(blend["k"]), self.v(blend["v"])
        if self.v_mix is None:  # the first layer
            call.shared["v_first"] = v
        else:
            share = torch.sigmoid(self.v0.to(v.dtype) + self.v_mix(blend["v"]))
            v = torch.lerp(v, self._first(call, v), share.to(v.dtype))
        return tuple(z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (r, k, v))

    def split(self, share: Share) -> None:
        head = (self.heads, self.dim // self.heads)
        for layer in (self.r, self.k, self.v):
            share.rows(layer, head)
        if self.v_mix is not None:
            self.v_mix.split(share, self.heads)
            share.cut(self, "v0", head)
        self.heads = share.count(self.heads)
        share.keep(self)

    def _first(self, call: Call, v: Tensor) -> Tensor:
        first = call.shared.get("v_first")
        if first is None:
            raise ValueError(
                f"v_first: layer {self.layer} reads the values of layer 0 in Context.shared, got none; run "
                "layer 0 with the same Context before it, or set layer_idx=0"
            )
        if first.shape != v.shape:
            raise ValueError(f"v_first: must be (B, T, D) = {tuple(v.shape)}, got {tuple(first.shape)}")
        return first.to(v.dtype)

    def memory(self) -> dict[str, Slot]:
        return {"x": Slot("tail", (1, self.dim))}

    def work(self, length: int) -> Iterable[Work]:
        one = 2 * length * self.dim * self.r.out_features
        yield Work("projections", "W_r", one, per_head=True)
        yield Work("projections", "W_k, W_v", 2 * one)
        if self.v_mix is not None:
            yield Work("projections", "share of v_first", length * self.v_mix.flops)


class Goose(Stage):
    """Decay, rate of removal, removal key and write key; leaves the write key in ``call.notes``."""

    kind = "rank_one"

    def __init__(self, start: Start, heads: int, decay_rank: int, a_rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.decay, self.rate = LowRank(start, "w", decay_rank), LowRank(start, "a", a_rank)
        self.w0 = start.param(start.decay_bias(), lr_scale=2.0)
        self.a0, self.k_k = start.param(start.rate_bias()), start.param(start.removal())
        self.k_a = start.param(torch.full((start.dim,), 1.02))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        decay, rate = wide(self.decay(call.notes["x^w"])), wide(self.rate(call.notes["x^a"]))
        g = -math.exp(-0.5) * torch.sigmoid(self.w0.to(decay.dtype) + decay)
        a = torch.sigmoid(self.a0.to(rate.dtype) + rate)
        g, a, k_k, k_a = (
            z.unflatten(-1, (self.heads, -1)) for z in (g, a, self.k_k.to(a.dtype), self.k_a.to(a.dtype))
        )
        key = wide(k)
        removal = key * k_k
        removal = removal / removal.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        write = (key * torch.addcmul(1 - k_a, a, k_a)).to(k.dtype)
        call.notes["k~"] = write
        return Terms(q, write, v, g=g, e=(-removal * a).to(k.dtype), a=removal.to(k.dtype))

    def split(self, share: Share) -> None:
        head = (self.heads, len(self.w0) // self.heads)
        for name in ("w0", "a0", "k_k", "k_a"):
            share.cut(self, name, head)
        for low in (self.decay, self.rate):
            low.split(share, self.heads)
        self.heads = share.count(self.heads)

    def work(self, length: int) -> Iterable[Work]:
        yield Work("gates", "decay and rate", length * (self.decay.flops + self.rate.flops))


class NormBonus(Stage):
    """GroupNorm over each head, then the token's own value by ``r . (k~ r_k)``."""

    rank = 30

    def __init__(self, start: Start, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gain = start.param(torch.full((heads * width,), start.norm_gain()))
        self.bias = start.param(torch.zeros(heads * width))
        self.r_k = start.param(torch.full((heads, width), -0.04))

    def forward(self, o: Tensor, call: Call) -> Tensor:
        z, shape = wide(o), self.r_k.shape
        z = F.layer_norm(z, z.shape[-1:], eps=self.eps)
        gain, bias = (p.to(z.dtype).view(shape) for p in (self.gain, self.bias))
        z = torch.addcmul(bias, z, gain)
        r, v = (wide(part.transpose(1, 2)) for part in (call.raw.q, call.raw.v))
        own = (r * wide(call.notes["k~"]) * self.r_k.to(r.dtype)).sum(-1, keepdim=True)
        return torch.addcmul(z, own, v).to(o.dtype)

    def split(self, share: Share) -> None:
        heads, width = self.r_k.shape
        share.cut(self, "gain", (heads, width))
        share.cut(self, "bias", (heads, width))
        share.cut(self, "r_k", (heads, 1))


class MixGate(Stage):
    """``o * (sigmoid(x^g W_g1) W_g2)``: the gate has no activation at its end."""

    rank = 40

    def __init__(self, start: Start, heads: int, rank: int) -> None:
        super().__init__()
        self.heads, self.low = heads, LowRank(start, "g", rank)

    def split(self, share: Share) -> None:
        self.low.split(share, self.heads)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return o * self.low(call.notes["x^g"]).view_as(o)

    def work(self, length: int) -> Iterable[Work]:
        yield Work("gates", "output gate", length * self.low.flops)


def default_rank(dim: int, factor: float) -> int:
    """``factor sqrt(D)`` in steps of 32, from 32 on but not above D."""
    return min(dim, max(32, 32 * round(factor * math.sqrt(dim) / 32)))


@register(
    Card(
        name="rwkv7",
        title="RWKV-7 time mix",
        paper='RWKV-7 "Goose" with Expressive Dynamic State Evolution',
        arxiv="2503.14456",
        family="recurrence",
        summary="A state that decays per channel, removes under one key and writes under another.",
        cached="the state S (H d d) and the last x (D): constant in the length",
        claims=(Claim("best multilingual results of its class with fewer tokens", where="2.9B"),),
        small={"chunk_size": 4},
        layers=2,
    ),
    frames=("recurrent",),
    fixed={
        "num_kv_heads": "every channel of every head has its own decay, removal key and rate",
        "pos": "order comes from the shift and the recurrence; a rotation would part removal and write keys",
        "rope_theta": "there is no rotary embedding",
        "qkv_bias": "the blended projections have none",
    },
)
def rwkv7(
    draft: Draft,
    *,
    decay_rank: int | None = None,
    a_rank: int | None = None,
    v_rank: int | None = None,
    gate_rank: int | None = None,
    gn_eps: float | None = None,
) -> None:
    """Sets every slot.

    Args:
        decay_rank, a_rank, v_rank, gate_rank: of the low-rank maps; default 2.5, 2.5, 1.7 and 5 times sqrt(D)
            in steps of 32, not above D. gn_eps: of the group norm, default d * 1e-5.
        head_dim (of the frame): d; where given, D / d is the number of heads, whatever num_heads says.
        layer_idx, num_layers (of the frame): where it starts; layers after 0 need v_first.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: a diagonal gate with keys k (1 - k_a) where a = 0.
    """
    D, d = draft.dim, draft.head_dim
    if D % d:
        raise ValueError(f"head_dim: must divide dim={D}, got {d}")
    ranks = {"decay_rank": 2.5, "a_rank": 2.5, "v_rank": 1.7, "gate_rank": 5.0}
    given = {"decay_rank": decay_rank, "a_rank": a_rank, "v_rank": v_rank, "gate_rank": gate_rank}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
        ranks[name] = default_rank(D, ranks[name]) if value is None else value
    if gn_eps is not None and gn_eps <= 0:
        raise ValueError(f"gn_eps: must be positive, got {gn_eps}")
    heads = draft.num_heads = draft.num_kv_heads = draft.o_heads = D // d
    start, draft.scale = Start(draft.site, D, d), 1.0
    draft.put("project", ShiftedLerp(start, heads, ranks["v_rank"]))
    draft.put("gates", Goose(start, heads, ranks["decay_rank"], ranks["a_rank"]))
    draft.put("combine", NormBonus(start, heads, d, d * 1e-5 if gn_eps is None else gn_eps))
    draft.put("combine", MixGate(start, heads, ranks["gate_rank"]))
    out = LinearOut(draft.site, heads, d, D, draft.host["out_bias"])
    start.zero(out.out_proj)
    draft.put("out", out)
    if draft.site.layer == 0:
        draft.gives["v_first"] = D
    else:
        draft.needs["v_first"] = D
