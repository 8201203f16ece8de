"""Multi-head temporal latent attention: latents of s neighbouring tokens are merged, so the cache shrinks.

Multi-head Temporal Latent Attention, arXiv 2505.13544.

    q, c_0, k_r as in mla;  c^_j = LayerNorm(c_0,j),  chunk n(j) = floor(j / s), j counted in the document
    w_j  = sigmoid((PE(n(j)) A + a) . (c^_j E + e))      one weight per token
    c~_i = sum of w_j c^_j over the tokens of i's chunk up to i;  then mla on c~_i, with i's own rotary key
    i sees j  where j = i, or j < i and j is the last of its chunk: finished chunks, and its own so far

Cached: c~ and k_r of finished chunks, (d_c + d_r) / s per token, and the running chunk's c~ as a state (its
rotary key is always the newest token's). Merged in parallel by a sum within chunks, never by a T x T matrix.
Attention runs over T / s chunk ends and one key that stands for the query's own: its score is a channel of
the query, its weight a channel of the output, so one softmax has both and any fused kernel computes it.
Our choice: d_c as in mla, rounded down to what A and PE divide; a window counts tokens to a chunk's last.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import lcm
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.latent.chunk_read import ChunkEnds, ChunkRead, wide
from attnzoo.attention.latent.latent import FIXED, Latent, check_rank, settle, sizes
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Mask, Static, band
from attnzoo.attention.stages.running import running_block_sum
from attnzoo.attention.timeline import Axis
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.registry import Card, register


class TemporalLatent(Latent):
    """`Latent` whose rows are chunks of ``rate`` tokens.

    Args:
        layernorm: LayerNorm on the latents, else RMSNorm. hidden: width of A and E.
    """

    def __init__(
        self,
        draft: Draft,
        widths: tuple[int, int, int],
        rank: int,
        q_rank: int,
        eps: float,
        rate: int,
        layernorm: bool,
        hidden: int,
    ) -> None:
        super().__init__(draft, widths, rank, q_rank, True, eps)
        self.rate, self.layernorm, self.hidden = rate, layernorm, hidden
        for side, width in (("q", q_rank), ("kv", rank)) if layernorm else ():
            if width:
                self.register_parameter(f"{side}_shift", flag(nn.Parameter(torch.zeros(width)), decay=False))
        self.chunk_map, self.token_map = nn.Linear(rank, hidden), nn.Linear(rank, hidden)

    split = Latent.split

    def normed(self, z: Tensor, side: str) -> Tensor:
        if not self.layernorm:
            return super().normed(z, side)
        gain, shift = getattr(self, f"{side}_gain"), getattr(self, f"{side}_shift")
        z_wide = wide(z)
        gain, shift = gain.to(z_wide.dtype), shift.to(z_wide.dtype)
        return F.layer_norm(z_wide, z.shape[-1:], gain, shift, self.eps).to(z.dtype)

    def latents(self, c: Tensor, call: Call) -> Tensor:
        c = self.normed(c, "kv")
        code = call.line.once(("chunk code", self.rank, self.rate), lambda: self._code(call.line.order))
        of_chunk = self.chunk_map(code.to(c.dtype).expand(len(c), -1, -1))
        w = torch.sigmoid((wide(of_chunk) * wide(self.token_map(c))).sum(-1, keepdim=True))
        return running_block_sum(w * wide(c), call, "chunk", self.rate).to(c.dtype)[:, None]

    def _code(self, order: Tensor) -> Tensor:
        """PE ``(B or 1, T, d_c)`` of each token's chunk, sines and cosines in turn."""
        step = torch.arange(0, self.rank, 2, device=order.device, dtype=torch.float64) / self.rank
        angle = (order // self.rate).double()[..., None] * 10000.0**-step
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)

    def cached(self, rows: dict[str, Tensor], call: Call) -> tuple[dict[str, Tensor], Axis, bool]:
        rows = {name: call.mem.blocks(name, row, self.rate) for name, row in rows.items()}
        return rows, call.mem.block_axis(self.rate), True

    def memory(self) -> dict[str, Slot]:
        rows = {name: Slot("blocks", slot.shape, self.rate) for name, slot in super().memory().items()}
        return rows | {"chunk": Slot("state", (self.rank,))}

    def work(self, length: int) -> Iterable[Work]:
        yield from super().work(length)
        yield Work("gates", "merge weights", 4 * length * self.rank * self.hidden)


@register(
    Card(
        name="mtla",
        title="Multi-head temporal latent attention",
        paper="Multi-head Temporal Latent Attention",
        arxiv="2505.13544",
        family="latent",
        summary="Latents of neighbouring tokens are merged with learned weights: the cache shrinks in time.",
        cached="a latent and a rotary key per s tokens: (d_c + d_r) / s per token, and the running chunk",
        claims=(
            Claim("BLEU of mha", where="MuST-C En-De, s = 2"),
            Claim("5.3 x faster inference", "decode_ms", "lower", "mha", "MuST-C En-De, s = 2"),
            Claim("8.3 x less memory in inference", "cache_bytes", "lower", "mha", "MuST-C En-De, s = 2"),
        ),
        small={"down_rate": 3, "q_lora_rank": 12, "kv_lora_rank": 12},
    ),
    host={"norm_eps": 1e-5},
    fixed=FIXED,
)
def mtla(
    draft: Draft,
    *,
    down_rate: int = 2,
    hyper_reduction: int = 4,
    latent_norm: Literal["layernorm", "rmsnorm"] = "layernorm",
    kv_lora_rank: int | None = None,
    q_lora_rank: int = 0,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    v_head_dim: int | None = None,
    allow_expand: bool = False,
) -> None:
    """Sets projection, mask and read.

    Args:
        down_rate: s of at least 1, tokens per cached row.
        hyper_reduction: A and E are d_c x d_c / this. latent_norm: on both latents.
        kv_lora_rank: d_c, even and a multiple of hyper_reduction; default min(4, H) D / H, rounded down.
        q_lora_rank: r_q, 0 = none. allow_expand: lets d_c reach H (d_n + d_v).
        qk_nope_head_dim, v_head_dim: d_n, d_v; default D / H.
        qk_rope_head_dim: d_r, even; default half of D / H; 0 with pos=none.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mla with s = 1, rmsnorm and merge weights of 1; its own absorbed form.
    """
    for name, value in (("down_rate", down_rate), ("hyper_reduction", hyper_reduction)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    widths, _, rank = sizes(draft, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank)
    unit = lcm(2, hyper_reduction)
    rank = max(unit, rank // unit * unit) if kv_lora_rank is None else kv_lora_rank
    check_rank("kv_lora_rank", rank, draft.num_heads, widths, allow_expand)
    if rank % unit:
        raise ValueError(
            f"kv_lora_rank: must be even (sines and cosines in pairs) and a multiple of "
            f"hyper_reduction={hyper_reduction}, got {rank}; choose a multiple of {unit}"
        )
    near = band(draft.host["window"], draft.host["n_sink"])
    project = TemporalLatent(
        draft,
        widths,
        rank,
        q_lora_rank,
        draft.host["norm_eps"],
        down_rate,
        latent_norm == "layernorm",
        rank // hyper_reduction,
    )

    settle(draft, widths, project)
    draft.put("mask", Static(ChunkEnds(down_rate, near)))
    draft.very_last(lambda done: _put_read(done, down_rate, near))


def _put_read(done: Draft, rate: int, near: Mask) -> None:
    """The read in two parts, where nothing else acts on scores or weights."""
    own = [done.slots[slot] for slot in ("score", "normalise") if slot in done.slots]
    for stage in own:
        if any(slot.kind == "rows" for slot in stage.memory().values()):
            raise ValueError(
                f"add: {type(stage).__name__} keeps something for every key token, but keys here are "
                f"chunks of down_rate={rate} tokens; leave it out, or use mla"
            )
    if not own and "read" not in done.slots:
        appended = getattr(done.slots.get("position"), "appended", 0)
        heads = done.score_heads or done.num_heads
        done.put("read", ChunkRead(rate, near, (heads, done.qk_width, done.v_head_dim, appended)))
