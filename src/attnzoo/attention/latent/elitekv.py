"""EliteKV: each head turns its r most useful frequency pairs only; all else of keys and values is one latent.

EliteKV: Scalable KV Cache Compression via RoPE Frequency Selection and Joint Low-Rank Projection, arXiv
2503.01586.

    F_g: r of the d/2 pairs of kv head g;  q_e, q_n: those 2r channels of q and the other d - 2r
    k_e = x W_ke (G heads, 2r wide),  q_e and k_e turned by the original frequencies theta^(-2f/d), f in F_g
    c   = x W_dkv (no norm),  [k_n,g ; v_g] = c W_ukv
    s   = (q_e . k_e + q_n . k_n) / sqrt(d);  softmax, values and W_o as in gqa
    absorbed: q~ = q_n U_K,g^T against c, o = (sum_j p_j c_j) U_V,g

Cached: k_e after RoPE and c, 2 r G + d_c per token. A head's channels are laid out as the first halves of its
pairs, in ascending index, then the second halves. Our choice: r = max(1, d / 16) and d_c = 3/8 G d, a quarter
of gqa's cache as in the paper; from scratch, where there is no model to select by, the pairs in the middle of
r equal bands ("uniform").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.latent.latent import Latent, settle
from attnzoo.attention.stages.position import NoPosition
from attnzoo.cards import Claim
from attnzoo.ops.fused import rotate
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class EliteRope(NoPosition):
    """Rotary slices whose pairs differ by kv head; the layout is rotate-half.

    Args:
        pairs: ``(G, r)`` pair indices, kept as a buffer. width: d, of whole heads. theta: base.
    """

    rotates = True

    def __init__(self, pairs: list[list[int]], width: int, theta: float) -> None:
        super().__init__()
        if theta <= 0:
            raise ValueError(f"rope_theta: must be positive, got {theta}")
        self.width, self.theta = width, theta
        self.register_buffer("pairs", torch.tensor(pairs))
        self.own = slice(None)  # kv heads that this rank has

    def split(self, share: Share) -> None:
        self.own = share.part(len(self.pairs)).rows

    def turn(self, z: Tensor, pos: Tensor, call: Call) -> Tensor:
        """``z`` ``(B, heads, T, 2r)``; consecutive query heads share a kv head's pairs."""
        work = torch.float64 if z.dtype == torch.float64 else torch.float32
        # the line's own positions by name, for compiled code would be bound to an id
        where = "line" if pos is call.line.pos else id(pos)
        name = ("elite", id(self), z.shape[1], work, where)
        # kept with what its ids name, so that nothing else can have them
        _, cos, sin = call.line.once(name, lambda: ((self, pos), *self._table(pos, z.shape[1], work)))
        return rotate(z, cos, sin).to(z.dtype)

    def _table(self, pos: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(B or 1, T, heads, 2r)``, as `rotate` wants them."""
        pairs = self.pairs[self.own]
        step = 2.0 * pairs.double() / self.width
        angle = pos.double()[:, :, None, None] * self.theta**-step
        angle = angle.repeat_interleave(heads // len(pairs), dim=2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def elementwise(self) -> dict[str, float]:
        return {"rope": 6.0 * self.pairs.shape[1]}


def choose_pairs(
    source: str | tuple, path: str | None, heads: int, r: int, total: int, layer: int
) -> list[list[int]]:
    """``(G, r)`` ascending pair indices of ``total``; ``source`` may be the table itself.

    Raises:
        ValueError: a file is missing, or a table is not ``[G][r]`` or ``[layers][G][r]`` distinct indices in
            range.
    """
    if (source == "file") != (path is not None):
        raise ValueError(
            f"rope_pairs_file: goes with rope_pairs=file, got {path!r} with {source!r}; set both"
        )
    if not isinstance(source, str):
        return _checked("rope_pairs", source, heads, r, total, layer)
    if source != "file":
        middle = [(2 * m + 1) * total // (2 * r) for m in range(r)]
        found = {"uniform": middle, "high": list(range(r)), "low": list(range(total - r, total))}[source]
        return [found] * heads
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"rope_pairs_file: must be JSON of equal lists, got {path!r}: {error}") from None
    return _checked("rope_pairs_file", found, heads, r, total, layer)


def _checked(field: str, table: Any, heads: int, r: int, total: int, layer: int) -> list[list[int]]:
    try:
        rows = [sorted(row) for row in (table if isinstance(table[0][0], int) else table[layer])]
        fits = len(rows) == heads and all(len(row) == r and set(map(type, row)) == {int} for row in rows)
    except (TypeError, LookupError):
        fits = False
    if not fits:
        raise ValueError(
            f"{field}: needs {heads} lists of num_rope_pairs={r} integers, for one layer or each, "
            f"got {table!r}"
        )
    for row in rows:
        if len(set(row)) < r or row[0] < 0 or row[-1] >= total:
            raise ValueError(f"{field}: pairs of a head must be distinct, of 0..{total - 1}, got {row}")
    return rows


@register(
    Card(
        name="elitekv",
        title="EliteKV",
        paper="EliteKV: Scalable KV Cache Compression via RoPE Frequency Selection and Joint Low-Rank "
        "Projection",
        arxiv="2503.01586",
        family="latent",
        summary="Heads keep RoPE on a few frequency pairs; other key channels and values are one latent.",
        cached="the turned key channels and the latent: 2 r G + d_c per token",
        claims=(
            Claim("cache -75 %", "cache_bytes", "lower", "mha", "LLaMA2-7B and 13B"),
            Claim("negligible loss", where="LLaMA2-7B and 13B uptrained on 0.6 % of the data"),
        ),
        small={"num_kv_heads": 2, "num_rope_pairs": 2, "kv_rank": 10},
    ),
)
def elitekv(
    draft: Draft,
    *,
    num_rope_pairs: int | None = None,
    rope_pairs: Literal["uniform", "high", "low", "file"] | tuple[Any, ...] = "uniform",
    rope_pairs_file: str | None = None,
    kv_rank: int | None = None,
) -> None:
    """Sets projection and position.

    Args:
        num_rope_pairs: r of 0..d/2; default max(1, d / 16), 0 with pos=none.
        rope_pairs: "uniform", "high" or "low" frequencies, the same for all heads; or G lists of r pair
            indices, or one such table per layer; or a "file".
        rope_pairs_file: JSON of such a table.
        kv_rank: d_c of 1..min(D, G (2d - 2r)); default 3/8 G d.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with r = d/2 and a full-rank latent; gqa that turns the pairs of F only, up to an order of
        channels; its own absorbed form.
    """
    d, G, rope = draft.head_dim, draft.num_kv_heads, draft.host["pos"] == "rope"
    r = (max(1, d // 16) if rope else 0) if num_rope_pairs is None else num_rope_pairs
    if rope and d % 2:
        raise ValueError(f"head_dim: RoPE turns pairs of channels, got {d}; make it even or set pos=none")
    if not 0 <= r <= d // 2:
        raise ValueError(f"num_rope_pairs: must be in 0..head_dim/2={d // 2}, got {r}")
    if r and not rope:
        raise ValueError(f"num_rope_pairs: must be 0 with pos=none, got {r}")
    most = min(draft.dim, G * (2 * d - 2 * r))
    rank = min(most, max(1, 3 * G * d // 8)) if kv_rank is None else kv_rank
    if not 1 <= rank <= most:
        raise ValueError(f"kv_rank: must be in 1..min(D, G (2d - 2r))={most}, got {rank}")
    if rope_pairs != "uniform" and not r:
        raise ValueError(
            f"rope_pairs: no pair is turned with num_rope_pairs=0, got {rope_pairs!r}; leave it out"
        )
    position = NoPosition()
    if r:
        pairs = choose_pairs(rope_pairs, rope_pairs_file, G, r, d // 2, draft.site.layer)
        position = EliteRope(pairs, d, draft.host["rope_theta"])
    widths = (d - 2 * r, 2 * r, d)
    latent = Latent(draft, widths, rank, 0, False, draft.host["norm_eps"], kv_heads=G, rope_heads=G)
    settle(draft, widths, latent)
    draft.put("position", position)
