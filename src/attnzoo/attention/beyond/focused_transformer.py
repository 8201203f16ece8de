"""Focused transformer: while training, some layers also read the keys of other rows of the batch.

Focused Transformer: Contrastive Training for Context Scaling, arXiv 2307.03170.

    row b, in memory layers:  o_i = softmax over { own keys j <= i } and { all T keys of rows b-1 .. b-R_b }
    own keys and queries are rotated as always; keys of other rows stand at position 0
    reading, last_context_length W:  keys at least W tokens back stand at the start of the local context, in
        the softmax of the W near ones (`attnzoo.attention.beyond.far_memory`), at most memory_topk of them
    R_b = min(R, b), and with stepping at most i ceil((R + 1) / max(k - 1, 1)) for row i of a pack of k

The rows of a pack hold consecutive parts of a document (``data.pack``), the next pack another document: keys
learn to be told apart among distractors, gradients flow into the other rows' keys and values. Cached: as the
host: far keys are turned back at the read. Our choice: with R = 0 and W unset, the defaults, every layer is
the host; other rows are read in training only, where documents packed into a row (segment ids) and caches
are refused, since a token would read documents that are not its own. Memory layers, unless named: a quarter,
a half and three quarters of the depth. ``memory_positions=none`` leaves positions out of memory layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention.beyond.far_memory import FarMemory
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Single
from attnzoo.attention.stages.mask import Mask, Static, band
from attnzoo.attention.stages.position import NoPosition, Rope
from attnzoo.attention.timeline import Axis
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.registry import Card, register


@dataclass(frozen=True)
class WithMemory(Mask):
    """``own`` for the sequence's keys, and every key of order -1, which lies outside of it."""

    own: Mask

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return (k < 0) & (q >= 0) | (k >= 0) & self.own.rule(q, k)


class CrossBatch(Single):
    """One softmax over a row's own keys and those of the R rows before it; see the module.

    Args:
        rows: R; 0 = none. pack, stepping: how rows of a pack differ in their range.
        sizes: heads with scores, widths of their keys and values, for the cost.
        memory: what is read in evaluation; None = the own row as it is.
    """

    counts = True

    def __init__(
        self,
        rows: int,
        pack: int,
        stepping: bool,
        mask: Mask,
        sizes: tuple[int, int, int],
        memory: FarMemory | None = None,
    ) -> None:
        super().__init__()
        self.memory_read, self.plain, self.whole = memory, memory is None, memory is not None
        self.exact = not rows  # the first rows of a batch have fewer before them
        self.rows, self.pack, self.stepping, self.mask, self.sizes = rows, pack, stepping, mask, sizes

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        if not self.training and self.memory_read is not None:
            return self.memory_read(q, keys, attend, call)
        if not self.training or not self.rows:
            return attend(q, keys)
        self._check(call, len(q))
        k, v = call.raw.k, call.raw.v  # unrotated: as at position 0
        source, seen = self.sources(len(q), q.device)
        others = [z[source].transpose(1, 2).flatten(2, 3) for z in (k, v)]  # (B, G, R T, d)
        T = k.shape[2]
        order = keys.axis.order.expand(len(q), -1)
        elsewhere = torch.where(seen, 0, -1).repeat_interleave(T, dim=1)  # document of nothing: not seen
        axis = Axis(
            torch.cat([order, torch.full_like(elsewhere, -1)], dim=1),
            torch.cat([torch.zeros_like(order), elsewhere], dim=1),
            ("other rows", self.rows, self.pack, self.stepping),
        )
        both = keys._replace(
            k=torch.cat([keys.k, others[0].to(keys.k.dtype)], dim=2),
            v=torch.cat([keys.v, others[1].to(keys.v.dtype)], dim=2),
            axis=axis,
            aligned=False,
        )
        return attend(q, (both, WithMemory(self.mask)))

    def sources(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(B, R)`` the row that is read, and whether it is."""
        row = torch.arange(batch, device=device)[:, None]
        back = torch.arange(1, self.rows + 1, device=device)[None]
        limit = row.clamp(max=self.rows)
        if self.stepping:
            step = -(-(self.rows + 1) // max(self.pack - 1, 1))
            limit = torch.minimum(limit, row % self.pack * step)
        return (row - back).clamp(min=0), back <= limit

    def _check(self, call: Call, batch: int) -> None:
        if call.line.doc is not None:
            raise ValueError(
                f"segment_ids: tokens would see other rows' documents, got cross_batch={self.rows}; "
                "train on whole rows (data.isolate=false) or set cross_batch=0"
            )
        if call.mem.cache is not None:
            raise ValueError(
                f"cache: other rows are read in training only, got cross_batch={self.rows}; call eval() first"
            )
        if self.rows >= batch:
            raise ValueError(
                f"cross_batch: must be less than the rows of a batch, {batch}, got {self.rows}; "
                "raise data.batch_size or lower it"
            )
        if batch % self.pack:
            raise ValueError(
                f"pack: must divide the rows of a batch, {batch}, got {self.pack}; change one of them"
            )

    def apart(self) -> str | None:
        return "in training it reads other rows' whole sequences (cross_batch)" if self.rows else None

    def work(self, length: int) -> Iterable[Work]:
        """Of training, where a row has R rows before it: a bound for the first R rows of a batch. With R = 0,
        of evaluation.
        """
        if not self.rows:
            yield from self.memory_read.work(length)
            return
        heads, width, v_width = self.sizes
        per_pair, others = 2 * heads * (width + v_width), self.rows * length**2
        needed = per_pair * (self.mask.pairs(length) + others)
        executed = per_pair * (length**2 + others)
        yield Work("mixing", "own and other rows", needed, executed, "hidden keys of a tile", per_head=True)


@register(
    Card(
        name="focused_transformer",
        title="Focused transformer",
        paper="Focused Transformer: Contrastive Training for Context Scaling",
        arxiv="2307.03170",
        family="beyond",
        summary="While training, memory layers also read the keys of other rows, in one softmax.",
        cached="as the host: 2 G d per token",
        claims=(Claim("passkeys found in 256k tokens", where="LongLLaMA 3B and 7B, fine-tuned at 8k"),),
    ),
)
def focused_transformer(
    draft: Draft,
    *,
    cross_batch: int = 0,
    pack: int = 2,
    stepping: bool = False,
    memory_layers: tuple[int, ...] | None = None,
    memory_positions: Literal["first", "none"] = "first",
    last_context_length: int | None = None,
    memory_topk: int | None = None,
) -> None:
    """Sets the read of memory layers.

    Args:
        cross_batch: R, rows before the own one that are read; 0 = none. Less than the rows of a micro-batch.
        pack: k, rows that hold consecutive parts of a document; must divide the rows of a micro-batch. Set
            ``data.pack`` to the same.
        stepping: rows of a pack get different ranges.
        memory_layers: which layers; default a quarter, a half and three quarters of the depth.
        memory_positions: keys of other rows at position 0, or no positions in memory layers.
        last_context_length: W, at least 1, in evaluation; default all of the past is near.
        memory_topk: far keys that a query reads, those of its highest scores; default all.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with R = 0, in evaluation, and in rows that have none before them, within W tokens.
    """
    depth = draft.site.depth
    layers = {depth // 4, depth // 2, 3 * depth // 4} if memory_layers is None else set(memory_layers)
    if cross_batch < 0:
        raise ValueError(f"cross_batch: must be at least 0 (0 = own row only), got {cross_batch}")
    if pack < 1:
        raise ValueError(f"pack: must be at least 1, got {pack}")
    for name, value in (("last_context_length", last_context_length), ("memory_topk", memory_topk)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if memory_topk is not None and last_context_length is None:
        raise ValueError(f"memory_topk: nothing is far, got {memory_topk}; set last_context_length")
    if not layers or not all(0 <= layer < max(depth, draft.site.layer + 1) for layer in layers):
        raise ValueError(f"memory_layers: must be some of 0..{depth - 1}, got {sorted(layers)}")
    if draft.site.layer not in layers or (cross_batch == 0 and last_context_length is None):
        return
    asked, wanted = "cross_batch", cross_batch
    if cross_batch == 0:
        asked, wanted = "last_context_length", last_context_length
    if memory_positions == "none":
        draft.put("position", NoPosition())

    def complete(done: Draft) -> None:
        mask = _own_mask(done, asked, wanted)
        sizes = (done.num_heads, done.qk_width, done.v_head_dim)
        memory = None
        if last_context_length is not None:
            memory = _memory(done, last_context_length, memory_topk, mask, sizes)
        done.put("read", CrossBatch(cross_batch, pack, stepping, mask, sizes, memory))

    draft.last(complete)


def _own_mask(draft: Draft, asked: str, wanted: int | None) -> Mask:
    """The host's mask, where keys from elsewhere have a place beside its own.

    Raises:
        ValueError: naming the option ``asked``, where they have none.
    """
    position = draft.slots.get("position")
    if getattr(draft.slots.get("project"), "turned", ()):
        raise ValueError(
            f"{asked}: keys with a rotary slice of their own have no position 0, got {wanted}; "
            "leave it or that projection out"
        )
    if getattr(position, "appended", 0) or "score" in draft.slots:
        raise ValueError(
            f"{asked}: the score here depends on a key's place in the row, got {wanted}; "
            "keys of a memory have none: leave it or that variant out"
        )
    host = draft.host
    mask = draft.fill("mask", lambda: Static(band(host["window"], host["n_sink"])))
    if type(mask) is not Static:
        raise ValueError(
            f"{asked}: keys are chosen by their place in the row here, got {wanted}; "
            "keys of a memory have none: leave it or that variant out"
        )
    return mask.mask


def _memory(draft: Draft, size: int, most: int | None, mask: Mask, sizes: tuple[int, int, int]) -> FarMemory:
    if "normalise" in draft.slots:
        raise ValueError(
            f"last_context_length: near and far keys share a softmax, got {size} with "
            f"{draft.owner['normalise']}; leave it or that variant out"
        )
    width, host = draft.qk_width, draft.host
    rotary = lambda: Rope(width, host["rope_theta"]) if host["pos"] == "rope" else NoPosition()  # noqa: E731
    return FarMemory(size, most, mask, draft.fill("position", rotary), draft.scale or width**-0.5, sizes)
