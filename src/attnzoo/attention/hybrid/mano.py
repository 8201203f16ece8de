"""Multipole attention: the same windowed attention at every level of a pooling pyramid, summed back up.

Linear Attention with Global Context: A Multipole Attention Mechanism for Vision and Physics,
arXiv 2507.02748.

    x^0 = x,   x^l_c = sum_(j < r) x^(l-1)_(c r + j) down_j                 or the mean
    out^l = W_o MHA(LN2(LN1(x^l))) inside blocks of w tokens of level l, causal, weights shared by the levels
    res = out^(L-1);   for n = 0, 1 ..:  l = L - 2 - n,
    res_i = out^l_i + up_((i+1) mod r) res_(floor((i+1) / r) - 1) / (n + 1),   y = res at level 0

Cached: at each level the keys and values of the current block (at most w - 1 earlier tokens), the r - 1
tokens of the level that are not pooled yet, the last res. Our choice (the published form is 2-D and reads
both sides): a token reads a coarse one once that is complete, which shifts the up-sampling; complete coarse
tokens, blocks and shifts are counted inside the document. No positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Choices, same
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.hybrid.level import Level, completed
from attnzoo.attention.own import Core, Flat
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Blocks, Causal
from attnzoo.attention.stages.refine import QKNorm
from attnzoo.attention.timeline import Axis
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys, attention, computed_pairs
from attnzoo.registry import Card, register


class Pyramid(Core):
    """See the module.

    Args:
        levels: L. rate: r. window: w. down, up: "conv" or "avg". eps: of the norms.
        kv_heads: heads of keys and values. qk_norm: RMSNorm of queries and keys. bias: of their projection.
    """

    unsplit = "its heads are channels of the stream, without an output projection"

    def __init__(
        self,
        draft: Draft,
        levels: int,
        rate: int,
        window: int,
        down: str,
        up: str,
        eps: float,
        kv_heads: int,
        qk_norm: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        D, self.kv_heads, self.kv_dim = draft.dim, kv_heads, kv_heads * draft.head_dim
        self.norm = QKNorm(draft.head_dim, eps) if qk_norm else None
        self.dim, self.heads, self.levels, self.rate, self.eps = D, draft.o_heads, levels, rate, eps
        self.window, self.mask = window, Causal() & Blocks(window)
        for name in ("ln1", "ln2"):
            self.register_parameter(f"{name}_gain", flag(nn.Parameter(torch.ones(D)), decay=False))
            self.register_parameter(f"{name}_bias", flag(nn.Parameter(torch.zeros(D)), decay=False))
        sizes = [D, self.kv_dim, self.kv_dim]
        self.qkv = draft.site.weights.linear("qkv", D, sum(sizes), bias, parts=sizes)
        self.out = draft.site.weights.linear("out", D, D, True, std=draft.site.out_std)
        std = (rate * D) ** -0.5
        self.down = nn.Parameter(std * torch.randn(rate, D, D)) if down == "conv" and levels > 1 else None
        self.up = nn.Parameter(D**-0.5 * torch.randn(rate, D, D)) if up == "conv" and levels > 1 else None
        for param in (self.down, self.up):
            if param is not None:
                flag(param, reinit=False)

    def forward(self, call: Call) -> Tensor:
        pyramid = self._pooled(call)
        outs = [self._attend(level, i, call) for i, level in enumerate(pyramid)]
        res = outs[-1]
        for fine in range(len(pyramid) - 2, -1, -1):
            # the published factor counts from the coarse end, empty levels included
            factor = 1 / (self.levels - 1 - fine)
            res = outs[fine] + factor * self._raised(res, pyramid[fine], pyramid[fine + 1], fine + 1, call)
        return res.unflatten(-1, (self.heads, -1))

    def _pooled(self, call: Call) -> list[Level]:
        """All levels that have tokens, or have had some."""
        line = call.line
        if line.clock is None:
            seen = torch.zeros_like(line.order[:, :1])
        elif line.clock.ragged:
            seen = (line.clock.used - line.clock.start)[:, None]
        else:
            seen = torch.full_like(line.order[:, :1], line.past)
        live = torch.ones_like(line.order, dtype=torch.bool) if line.valid is None else line.valid
        doc = line.doc if line.valid is None else line.doc.masked_fill(~live, -1)
        found = [Level(call.x, line.order, doc, live, None, seen)]
        while len(found) < self.levels:
            level = self._coarser(found[-1], len(found), call)
            if level is None:
                break
            found.append(level)
        return found

    def _coarser(self, fine: Level, index: int, call: Call) -> Level | None:
        r, n, line = self.rate, fine.x.shape[1], call.line
        ends = fine.live & ((fine.order + 1) % r == 0)
        reads = ends.cumsum(1)
        if line.doc is None:
            before = line.past // r ** (index - 1) if line.clock else 0
            room = (before + n) // r - before // r
        else:
            room = n // r if call.mem.alone else -(-n // r)
        both = self._held(f"pool{index}", fine.x, fine, r - 1, call)
        # ranks that share a sequence must make the same exchanges, so none leaves empty levels out
        if room == 0 and (call.mem.alone or n == 0) and line.whole is None:
            return None
        at, coarse = completed(fine, ends, reads, room, r)
        # token i of the finer level stands at r - 1 + i, its block begins r - 1 earlier
        place = (at[..., None] + torch.arange(r, device=at.device)).flatten(1)
        place = place[..., None].expand(len(fine.x), -1, self.dim)
        blocks = both.gather(1, place).unflatten(1, (room, r))
        x = blocks.mean(2) if self.down is None else blocks.flatten(2) @ self.down.flatten(0, 1)
        x = torch.where(coarse.live[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        return coarse._replace(x=x)

    def _attend(self, level: Level, index: int, call: Call) -> Tensor:
        """``(B, n, D)``."""
        z, past = level.x, self.window - 1
        for name in ("ln1", "ln2"):
            gain, bias = getattr(self, f"{name}_gain"), getattr(self, f"{name}_bias")
            z = F.layer_norm(z, z.shape[-1:], gain, bias, self.eps)
        q, kv = self.qkv(z).split([self.dim, 2 * self.kv_dim], dim=-1)
        axis = query = Axis(level.order, level.doc)
        if not call.mem.alone:
            kv = self._held(f"kv{index}", kv, level, past, call)
            earlier = level.seen - past + torch.arange(past, device=level.seen.device)
            doc = torch.where(earlier >= 0, 0, -1)
            own = torch.zeros_like(level.order) if level.doc is None else level.doc
            axis = Axis(torch.cat([earlier, level.order], 1), torch.cat([doc, own], 1))
        if level.x.shape[1] == 0:
            return level.x
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for t in kv.chunk(2, dim=-1))
        if self.norm is not None:
            q, k, v = self.norm(q, k, v, call)
        impl = self.choices["cpu" if q.device.type in ("cpu", "meta") else "cuda"].impl
        o = attention(q, Keys(k, v, axis), mask=self.mask, query=query, impl=impl)
        return self.out(o.transpose(1, 2).flatten(2))

    def _raised(self, res: Tensor, fine: Level, coarse: Level, index: int, call: Call) -> Tensor:
        """What every token of the finer level reads of the coarse ones that are complete, ``(B, n, D)``."""
        # one earlier token in front, so that place 0 is what the cache holds
        both, r = self._held(f"res{index}", res, coarse, 1, call), self.rate
        turn = (fine.order + 1) % r
        if self.up is None:
            read = both.gather(1, coarse.reads[..., None].expand(len(both), -1, self.dim))
        else:
            first = 1 if call.mem.alone else 0
            made = (both[:, first:] @ self.up.transpose(0, 1).flatten(1)).unflatten(-1, (r, self.dim))
            place = (coarse.reads - first).clamp(min=0) * r + turn
            read = made.flatten(1, 2).gather(1, place[..., None].expand(len(both), -1, self.dim))
        some = (fine.order + 1 >= r)[..., None]
        return torch.where(some, read, torch.zeros((), dtype=read.dtype, device=read.device))

    def _held(self, name: str, z: Tensor, level: Level, n: int, call: Call) -> Tensor:
        """The ``n`` tokens of the level before this forward, then its own; keeps its last ``n``."""
        old = call.mem.state(name)
        if old is None:
            return F.pad(z, (0, 0, n, 0))
        both = torch.cat([old.to(z.dtype), z], dim=1)
        last = level.live.sum(1, keepdim=True) + torch.arange(n, device=z.device)
        call.mem.put(name, both.gather(1, last[..., None].expand(len(both), -1, z.shape[2])))
        return both

    def choose(self, asked: str) -> Choices:
        if asked in ("auto", "sdpa"):
            self.choices = same("sdpa", "softmax inside windows: fused")
        else:
            self.choices = super().choose(asked)
        return self.choices

    def memory(self) -> dict[str, Slot]:
        shapes = {f"kv{i}": (self.window - 1, 2 * self.kv_dim) for i in range(self.levels)}
        for i in range(1, self.levels):
            shapes |= {f"pool{i}": (self.rate - 1, self.dim), f"res{i}": (1, self.dim)}
        return {name: Slot("tail", shape, carried=True) for name, shape in shapes.items()}

    def work(self, length: int) -> Iterable[Work]:
        n, D, r = length, self.dim, self.rate
        for i in range(self.levels):
            if n == 0:
                break
            each = 4 * n * D * (D + self.kv_dim)
            yield Work("projections", f"level {i}: W_q, W_k, W_v, W_o", each)
            pairs, run = self.mask.pairs(n), computed_pairs(self.mask, n, self.choices["cpu"].impl)
            yield Work("mixing", f"level {i}: attention", 4 * D * pairs, 4 * D * run, "hidden keys of a tile")
            coarse = n // r
            if i + 1 < self.levels and coarse:
                if self.down is not None:
                    yield Work("mixing", f"level {i}: down", 2 * coarse * r * D * D)
                if self.up is not None:
                    reads, made = n - r + 1, coarse * r
                    why = "what later tokens would read of the last coarse one"
                    yield Work("mixing", f"level {i}: up", 2 * reads * D * D, 2 * made * D * D, why)
            n = coarse


@register(
    Card(
        name="mano",
        title="Multipole attention",
        paper="Linear Attention with Global Context: A Multipole Attention Mechanism for Vision and Physics",
        arxiv="2507.02748",
        family="hybrid",
        summary="The same windowed attention at every level of a pooling pyramid: near fine, far coarse.",
        cached="per level the current window's k, v, what is not pooled yet, the last result",
        adapted="the paper's pyramid looks both ways; here a coarse token is read once it is complete",
        claims=("rivals ViT, Swin and neural operators at lower time and memory; no language results",),
        small={"levels": 3, "window": 4},
    ),
    frames=("own",),
    host={"norm_eps": 1e-5},
    fixed={"out_bias": "every level's output has its bias, and no projection follows their sum"},
)
def mano(
    draft: Draft,
    *,
    levels: int | None = None,
    rate: int = 2,
    window: int = 32,
    down: Literal["conv", "avg"] = "conv",
    up: Literal["conv", "avg"] = "conv",
    num_kv_heads: int | None = None,
    qk_norm: bool = False,
    qkv_bias: bool = False,
) -> None:
    """Sets the core.

    Args:
        levels: L, with window * rate^(L - 1) at most max_seq_len where L > 1; default the most that do.
        rate: r, tokens pooled into one, at least 2. window: w, tokens of a block at every level.
        down, up: learned maps, or the mean and its copies.
        num_kv_heads: heads of keys and values, a divisor of num_heads; default num_heads.
        qk_norm, qkv_bias: RMSNorm of queries and keys, a bias of their projection, at every level.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha of LN2(LN1(x)) without positions with one level and window >= T; attention in blocks where
        up is 0.
    """
    T_max = draft.site.max_len
    H = draft.num_heads
    G = H if num_kv_heads is None else num_kv_heads
    if not 1 <= G <= H or H % G:
        raise ValueError(f"num_kv_heads: must divide num_heads={H}, got {G}")
    if rate < 2:
        raise ValueError(f"rate: must pool at least 2 tokens, got {rate}")
    if window < 1:
        raise ValueError(f"window: must be at least 1, got {window}")
    if levels is None:
        levels = 1
        while window * rate**levels <= T_max:
            levels += 1
    if levels < 1:
        raise ValueError(f"levels: must be at least 1, got {levels}")
    if levels > 1 and window * rate ** (levels - 1) > T_max:
        most = 1 + int(math.log(max(1, T_max / window), rate))
        raise ValueError(
            f"levels: window * rate^(levels - 1) must be at most max_seq_len={T_max}, got {levels} levels, "
            f"which reach {window * rate ** (levels - 1)}; set levels={most} or raise max_seq_len"
        )
    eps = draft.host["norm_eps"]
    draft.put("core", Pyramid(draft, levels, rate, window, down, up, eps, G, qk_norm, qkv_bias))
    draft.put("out", Flat())
