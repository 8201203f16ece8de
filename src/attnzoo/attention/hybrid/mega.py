"""Mega: a damped moving average gives every token its surroundings, then one gated head of attention.

Mega: Moving Average Equipped Gated Attention, arXiv 2209.10655.

    n = LayerNorm(x);  EMA per channel, N states: p = sigmoid(delta), q = 1 - p sigmoid(alpha)
    h_t = q h_(t-1) + p beta n_t,   m_t = silu(sum_N gamma h_t / sqrt(N) + omega n_t)
    v = silu(n W_v),  [u | z | r | c] = m W,  u = sigmoid(u), z = silu(z), r = silu(r)
    queries z gamma_0 + beta_0, keys z gamma_1 + beta_1, width Z, one head;  b = relative bias
    softmax(q k / sqrt(Z) + b);  laplace (1 + erf((q k / n_t + b - sqrt(1/2)) / (sigma sqrt 2))) / 2;
    relu2: relu(q k / n_t + b)^2;   n_t visible keys
    y = u * (silu(c + ((A v) * r) W_h) - residual)

Cached: h (D N) in fp32; k and v (Z + E per token), of the current chunk only where ``attn_chunk`` is set.
Our choice: the EMA is a convolution by its own kernel, which is exact at documents; ``truncation`` cuts the
kernel when decoding too, where the released code goes on by the recurrence, and keeps that many inputs in
place of h; x is what the block hands over, so that LayerNorm follows its norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Choices, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.hybrid.bias import RotaryBias, TableBias
from attnzoo.attention.hybrid.ema import DampedAverage
from attnzoo.attention.own import Core
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Retain, Slot
from attnzoo.attention.stages.mask import Blocks, band
from attnzoo.attention.stages.refine import QKNorm
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Geo, Keys, attention, computed_pairs
from attnzoo.registry import Card, register


class GatedHead(Core):
    """EMA, one head of attention, its reset gate; what the output needs lies in ``call.notes``.

    Args:
        sizes: Z, E. ema: the average. act: of the scores. chunk, window: tokens attention reaches; None =
            all. bias: the relative bias. limit: positions it knows; None = all. eps: of the norms.
        qk_norm: RMSNorm of queries and keys.
    """

    unsplit = "there is one head"

    def __init__(
        self,
        draft: Draft,
        sizes: tuple[int, int],
        ema: DampedAverage,
        act: str,
        chunk: int | None,
        window: int | None,
        bias: nn.Module,
        limit: int | None,
        eps: float,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        self.dim, (self.z_dim, self.h_dim) = draft.dim, sizes
        self.act, self.chunk, self.bias, self.limit, self.eps = act, chunk, bias, limit, eps
        self.ln_gain = flag(nn.Parameter(torch.ones(draft.dim)), decay=False)
        self.ln_bias = flag(nn.Parameter(torch.zeros(draft.dim)), decay=False)
        self.ema = ema
        self.parts = [draft.dim, self.z_dim, self.h_dim, draft.dim]
        self.value = draft.linear("value", draft.dim, self.h_dim, bias=True)
        site = draft.site
        self.mixed = site.weights.linear("mixed", draft.dim, sum(self.parts), True, parts=self.parts)
        self.gamma_z = flag(nn.Parameter(0.02 * torch.randn(2, self.z_dim)), reinit=False)
        self.beta_z = flag(nn.Parameter(torch.zeros(2, self.z_dim)), decay=False, reinit=False)
        self.norm = QKNorm(self.z_dim, eps) if qk_norm else None
        self.window, near = window, band(window)
        self.mask = near & Blocks(chunk) if chunk else near

    def forward(self, call: Call) -> Tensor:
        """``(B, T, 1, E)``: what attention reads, under the reset gate."""
        if self.limit is not None:  # the table has a place for every distance
            call.line.place(self.limit, "max_seq_len")
        normed = F.layer_norm(call.x, call.x.shape[-1:], self.ln_gain, self.ln_bias, self.eps)
        v = F.silu(self.value(normed))
        u, z, r, call.notes["candidate"] = self.mixed(F.silu(self.ema(normed, call))).split(self.parts, -1)
        call.notes["update"] = torch.sigmoid(u)
        q, k = ((F.silu(z) * g + b)[:, None] for g, b in zip(self.gamma_z, self.beta_z, strict=True))
        if self.norm is not None:
            q, k, _ = self.norm(q, k, v, call)
        rows = call.mem.rows
        keys = Keys(rows("k", k), rows("v", v[:, None]), call.mem.axis(), call.mem.aligned)
        o = self._attend(q, keys, call)[:, 0]
        return (o * F.silu(r))[:, :, None]

    def _attend(self, q: Tensor, keys: Keys, call: Call) -> Tensor:
        q, score = q * self._per_query(call).to(q.dtype), None
        pos, places = call.line.pos, call.mem.places()
        if self.bias.appended:  # part of a longer dot product
            a, b = self.bias(self.bias.a, pos, call), self.bias(self.bias.b, places, call)
            q, k = (
                torch.cat([z, c.to(z.dtype).expand(len(z), -1, -1, -1)], -1) for z, c in ((q, a), (keys.k, b))
            )
            keys = keys._replace(k=k)
        else:
            score = lambda q, geo: q @ geo.keys.k.mT + self._table(geo, pos, places, q.dtype)  # noqa: E731
        return attention(
            q,
            keys,
            mask=self.mask,
            query=call.query,
            scale=1.0,
            score=score,
            normalise={"softmax": None, "laplace": _laplace, "relu2": _relu2}[self.act],
            impl=self.choices["cpu" if q.device.type in ("cpu", "meta") else "cuda"].impl,
            once=call.line.once,
        )

    def _per_query(self, call: Call) -> Tensor:
        """What divides the scores: sqrt(Z), or the number of visible keys."""
        order = call.line.order.double()
        if self.act == "softmax":
            return torch.full_like(order[:, None, :, None], self.z_dim**-0.5)
        seen = (order % self.chunk if self.chunk else order) + 1
        return 1 / (seen.clamp(max=self.window) if self.window else seen)[:, None, :, None]

    def _table(self, geo: Geo, pos: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
        """``(B or 1, 1, t, S)``."""
        places = places if geo.cols is None else places[:, geo.cols]
        return self.bias(places[:, None, None, :] - pos[:, None, geo.rows, None]).to(dtype)

    @property
    def _plain(self) -> bool:
        return self.act == "softmax" and self.bias.appended > 0

    def choose(self, asked: str) -> Choices:
        if asked == "auto":
            plain = self._plain
            why = "softmax of one longer dot product: fused" if plain else "scores of its own: plain torch"
            self.choices = same("sdpa" if plain else "reference", why)
        elif asked == "sdpa" and self._plain:
            self.choices = same(asked, "asked for")
        else:
            self.choices = super().choose(asked)
        return self.choices

    def memory(self) -> dict[str, Slot]:
        rows = {"k": Slot("rows", (1, self.z_dim)), "v": Slot("rows", (1, self.h_dim))}
        return rows | self.ema.memory()

    def retain(self) -> Retain | None:
        return self.mask.retain()

    def work(self, length: int) -> Iterable[Work]:
        yield from self.ema.work(length)
        yield Work("projections", "W_v", 2 * length * self.dim * self.h_dim)
        yield Work("projections", "W", 2 * length * self.dim * sum(self.parts))
        visible = self.mask.pairs(length)
        computed = computed_pairs(self.mask, length, self.choices["cpu"].impl)
        per = 2 * (self.z_dim + self.h_dim)
        yield Work("mixing", "attention", per * visible, per * computed, "hidden keys of a tile")
        if self.bias.appended:
            bias = 2 * self.bias.appended * computed
            yield Work("mixing", "bias", 0, bias, "channels that carry the bias")

    def elementwise(self) -> dict[str, float]:
        return self.ema.elementwise()


class Update(Stage):
    """``u * (silu(c + o W_h) - residual)``."""

    def __init__(self, draft: Draft, width: int) -> None:
        super().__init__()
        self.sizes = (width, draft.dim)
        self.hidden = draft.site.weights.linear("out", *self.sizes, True, std=draft.site.out_std)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        h = F.silu(call.notes["candidate"] + self.hidden(o.flatten(2)))
        return call.notes["update"] * (h - call.residual)

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_h", 2 * length * self.sizes[0] * self.sizes[1])


def _laplace(s: Tensor, visible: Tensor) -> Tensor:
    deviation = 0.282095
    p = 0.5 * (1 + torch.erf((s - 0.707107) / (deviation * math.sqrt(2))))
    return p.masked_fill(~visible, 0.0)


def _relu2(s: Tensor, visible: Tensor) -> Tensor:
    return s.relu().square().masked_fill(~visible, 0.0)


@register(
    Card(
        name="mega",
        title="Moving-average equipped gated attention",
        paper="Mega: Moving Average Equipped Gated Attention",
        arxiv="2209.10655",
        family="hybrid",
        summary="A damped multi-dimensional moving average, then one gated head of attention.",
        cached="the average's state h (D N); k, v (Z + E) per token, or of the current chunk",
        claims=(
            Claim("perplexity 18.07", where="252M, WikiText-103"),
            Claim("1.02 bits per character", where="enwik8"),
            Claim("88.21 on average, 85.66 in chunks", where="Long Range Arena"),
        ),
        small={"attn_chunk": 6, "rel_pos_bias": "rotary", "attn_act": "laplace", "ema_dim": 3},
    ),
    frames=("own",),
    host={"norm_eps": 1e-5},
    fixed={"out_bias": "the output always has its bias"},
)
def mega(
    draft: Draft,
    *,
    z_dim: int | None = None,
    h_dim: int | None = None,
    ema_dim: int = 16,
    attn_act: Literal["softmax", "laplace", "relu2"] = "softmax",
    rel_pos_bias: Literal["simple", "rotary"] = "simple",
    attn_chunk: int | None = None,
    truncation: int | None = None,
    window: int | None = None,
    qk_norm: bool = False,
) -> None:
    """Sets core and output.

    Args:
        z_dim: Z, even with the rotary bias; default D / 4, rounded down to an even number, at least 2.
        h_dim: E; default 2 D. ema_dim: N.
        attn_act: softmax (language), laplace or relu2.
        rel_pos_bias: a table, which ends at max_seq_len (or attn_chunk, or window), or two rotated vectors.
        attn_chunk: attention inside fixed chunks of the document only; default all of the past.
        window: only the last so many tokens, the own one included. qk_norm: RMSNorm of queries and keys.
        truncation: lags of the average that count, at least 1; default all (released: 8192).

    Shape: (B, T, D) -> (B, T, D). There is one head whatever num_heads says.
    Reduces to: the stream itself where u = 0; attn_chunk >= T to none; a plain moving average (no damping).
    """
    Z = max(2, draft.dim // 8 * 2) if z_dim is None else z_dim
    E = 2 * draft.dim if h_dim is None else h_dim
    sizes = {"z_dim": Z, "h_dim": E, "ema_dim": ema_dim, "attn_chunk": attn_chunk, "truncation": truncation}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    reach, longest, limit = min(filter(None, (attn_chunk, window)), default=None), draft.site.max_len, None
    if rel_pos_bias == "rotary":
        bias: nn.Module = RotaryBias(Z)
    else:
        limit = None if reach else longest
        bias = TableBias(reach or longest)
    ema, eps = DampedAverage(draft.dim, ema_dim, truncation), draft.host["norm_eps"]
    core = GatedHead(draft, (Z, E), ema, attn_act, attn_chunk, window, bias, limit, eps, qk_norm)
    draft.o_heads, draft.v_head_dim = 1, E
    draft.put("core", core)
    draft.put("out", Update(draft, E))
