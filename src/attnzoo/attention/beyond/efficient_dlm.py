"""Block diffusion: attention is causal between blocks and sees both ways inside a block.

Efficient-DLM: From Autoregressive to Diffusion Language Models, and Beyond in Speed, arXiv 2512.14067; the
mask is that of Block Diffusion, arXiv 2503.09573.

    blk(i) = i // B, inside the document;  reading:  i sees j where blk(j) <= blk(i)
    training on [x_t ; x_0], a noised and a clean copy at the same positions:
        noised i sees noised j of its own block and clean j of earlier blocks
        clean i sees clean j where blk(j) <= blk(i), and no noised token
    loss: cross-entropy of masked tokens at their own place, weighted by 1/t (`attnzoo.train.diffusion`)
    sampling: block by block, the surest masked tokens first (`attnzoo.model.denoise`)

Cached: k, v of finished blocks, 2 G d per token; the block in flight is computed anew in each step. A token's
output depends on later tokens of its block, so a model of these layers has no next-token loss, a cache takes
whole blocks only, and every layer of a model has the same objective. Our choice: the last block of a document
may be shorter; a masked token has an embedding of its own beside the vocabulary's unless ``mask_token_id``
names one; a ``window`` narrows the past, never the own block, and the cache keeps all rows, since a block in
flight is read again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.mask import Mask, Static, band
from attnzoo.attention.timeline import Axis
from attnzoo.cards import Claim
from attnzoo.objective import COPIES, BlockDiffusion
from attnzoo.registry import Card, register


@dataclass(frozen=True)
class BlockCausal(Mask):
    """Keys of the own block of ``size`` tokens and of earlier ones.

    Args:
        window, n_sink: keys of earlier blocks must be nearer than ``window``, or among the first ``n_sink``.
    """

    size: int
    window: int | None = None
    n_sink: int = 0

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        own = q // self.size
        return (k // self.size == own) | (k // self.size < own) & self.near(q, k)

    def near(self, q: Tensor, k: Tensor) -> Tensor:
        """Which keys of earlier blocks are seen."""
        if self.window is None:
            return k <= q
        return (q - k < self.window) | (k < self.n_sink)

    def reach(self) -> int | None:
        return None if self.window is None else max(self.window, self.size) - 1

    def sinks(self) -> int:
        return self.n_sink

    def retain(self) -> None:
        return None


@dataclass(frozen=True)
class Copies(BlockCausal):
    """`BlockCausal` over noised documents followed by their clean copies.

    Places are numbered twice as densely, clean ones odd, and both copies count as one document.
    """

    def axes(self, query: Axis, key: Axis) -> tuple[Axis, Axis]:
        noised = key.doc.amax(1, keepdim=True) // 2  # documents of each row that are noised copies
        return tuple(
            Axis(2 * axis.order + (axis.doc > noised), axis.doc - noised * (axis.doc > noised))
            for axis in (query, key)
        )

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        q_clean, k_clean, q, k = q % 2 == 1, k % 2 == 1, q // 2, k // 2
        own = k // self.size == q // self.size
        before = k_clean & (k // self.size < q // self.size) & self.near(q, k)
        return own & (q_clean == k_clean) | before

    def reach(self) -> None:
        return None


class BlockMask(Static):
    """Mask stage: `BlockCausal`, or `Copies` where the caller says that the input is doubled."""

    mask: BlockCausal
    alike = True

    def forward(self, q: Tensor, keys: object, call: Call) -> Mask:
        mask, line = self.mask, call.line
        if call.shared.get(COPIES):
            if line.doc is None or call.mem.cache is not None:
                raise ValueError(
                    "segment_ids: noised and clean copies are documents of their own, got "
                    f"{'a cache' if call.mem.cache is not None else 'none'}; give both copies ids"
                )
            return Copies(mask.size, mask.window, mask.n_sink)
        if call.mem.cache is not None:
            line.once(("whole blocks", mask.size), lambda: self._check_whole(call))
        return mask

    def _check_whole(self, call: Call) -> None:
        """A block's outputs depend on all of its tokens."""
        line, size = call.line, self.mask.size
        last = line.order[:, -1:]
        if line.valid is not None:
            n = line.count()[:, None]
            last = torch.where(n > 0, line.order.gather(1, (n - 1).clamp(min=0)), -1)
        if bool(((last + 1) % size != 0).any()):
            raise ValueError(
                f"cache: takes whole blocks of {size} tokens, got a piece that ends inside one; "
                "complete it with masked tokens, as generate does"
            )


@register(
    Card(
        name="efficient_dlm",
        title="Block-diffusion attention",
        paper="Efficient-DLM: From Autoregressive to Diffusion Language Models, and Beyond in Speed",
        arxiv="2512.14067",
        family="beyond",
        summary="Causal between blocks, both ways inside a block; trained to fill masked tokens in.",
        cached="k, v of finished blocks: 2 G d per token",
        traits={"causal": False, "prefix_consistent": False, "decodes": False},
        claims=(
            Claim(
                "+5.4 % and +2.7 % accuracy at 4.5 x and 2.7 x the throughput of Dream 7B and Qwen3 4B",
                where="8B, continued from an autoregressive model",
            ),
        ),
        small={"block_size": 4, "num_kv_heads": 2},
    ),
)
def efficient_dlm(
    draft: Draft,
    *,
    block_size: int = 16,
    clean_context: bool = True,
    half_life: float | None = 0.25,
    mask_token_id: int | None = None,
    mask_count: Literal["ceil", "round"] = "ceil",
) -> None:
    """Sets the mask, and what training and sampling need to know.

    Args:
        block_size: B, at least 1; 16 suited 1.5B parameters, 64 suited 4B and 8B.
        clean_context: train on a noised and a clean copy; false: on the noised one alone, weaker.
        half_life: eta > 0, see `attnzoo.objective.BlockDiffusion`; null = all places alike.
        mask_token_id: a token that stands for masked ones; null = an embedding of its own.
        mask_count: whether t B masked tokens are rounded up, so that no block stays whole, or to the nearest.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with B = 1; attention without a mask with B >= T.
    """
    if block_size < 1:
        raise ValueError(f"block_size: must be at least 1, got {block_size}")
    if half_life is not None and half_life <= 0:
        raise ValueError(f"half_life: must be positive, got {half_life}; null masks all places alike")
    if mask_token_id is not None and mask_token_id < 0:
        raise ValueError(f"mask_token_id: must be at least 0, got {mask_token_id}")
    window, n_sink = draft.host["window"], draft.host["n_sink"]
    band(window, n_sink)
    draft.put("mask", BlockMask(BlockCausal(block_size, window, n_sink)))
    draft.objective = BlockDiffusion(block_size, mask_token_id, clean_context, half_life, mask_count)
