"""Block diffusion as an objective: what is masked, the loss of masked tokens, and the likelihood bound.

Efficient-DLM, arXiv 2512.14067. Each block of B tokens (`attnzoo.objective.BlockDiffusion`) draws t in
(0.001, 1) and masks ceil(t B) of its tokens, without replacement and with weights exp(beta (1 - t) i), i
counted in the block, beta = ln 2 / (eta B). The loss is the cross-entropy of masked tokens at their own
place, times 1/t, over their number.

Validation estimates a bound that does not depend on the schedule: with m of a block's n tokens masked, m
drawn evenly from 1..n and the places evenly too, n / m times the cross-entropy of the masked ones has the
expectation of -log p over the orders in which the block can be filled in, which is at least -log p of the
block. As in next-token validation, the first token of each row and document is given, and ``count`` is the
number of targets, so that the bits per byte are of the same text.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnzoo import Collector, Context
from attnzoo.data import IGNORED
from attnzoo.objective import COPIES, BlockDiffusion
from attnzoo.train.metrics import Measured

LEAST_T = 1e-3


class Blocks(NamedTuple):
    """Where each token stands, ``(B, T)`` each: its block among those of the row, its place in it."""

    block: Tensor
    place: Tensor


def find_blocks(ids: Tensor, size: int) -> Blocks:
    """Blocks of ``size`` tokens, counted inside the documents ``ids`` ``(B, T)``."""
    step = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = (step - torch.where(begins, step, 0).cummax(1).values) % size
    return Blocks((place == 0).cumsum(1) - 1, place)


def draw_t(blocks: Blocks, spec: BlockDiffusion) -> Tensor:
    """``(B, T)``: one t per block, or per row without a half-life."""
    batch, length = blocks.block.shape
    t = torch.rand(batch, 1 if spec.half_life is None else length, device=blocks.block.device)
    t = LEAST_T + (1 - LEAST_T) * t
    return t.gather(1, blocks.block) if spec.half_life is not None else t.expand(batch, length)


def choose_masked(
    blocks: Blocks, number: Tensor, free: Tensor, slope: Tensor | float, noise: Tensor
) -> Tensor:
    """``(B, T)`` True for ``number`` tokens of each block, without replacement.

    Args:
        number: ``(B, T)`` at each token the number of its block. free: which tokens may be masked.
        slope: log-weight per place. noise: ``(B, T)`` in (0, 1).
    """
    gumbel = -(-noise.clamp(1e-12, 1 - 1e-7).log()).log()
    score = (slope * blocks.place + gumbel).masked_fill(~free, -math.inf)
    by_score = score.argsort(dim=1, descending=True)
    by_block = by_score.gather(1, blocks.block.gather(1, by_score).argsort(dim=1, stable=True))
    # blocks keep their places in the row, so a token's rank is how far it lies from where its block begins
    step = torch.arange(score.shape[1], device=score.device).expand_as(by_block)
    rank = torch.empty_like(by_block).scatter(1, by_block, step) - (step - blocks.place)
    return (rank < number) & free


def count_free(blocks: Blocks, free: Tensor) -> Tensor:
    """``(B, T)`` at each token the number of free tokens of its block."""
    return torch.zeros_like(blocks.block).scatter_add(1, blocks.block, free.long()).gather(1, blocks.block)


def masked_loss(logits: Tensor, labels: Tensor, masked: Tensor, weight: Tensor) -> Tensor:
    """Sum of the weighted cross-entropies of masked tokens at their own place."""
    rows = logits[masked]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    nll = cross_entropy(rows, labels[masked], reduction="none")
    return (nll * weight[masked].to(nll.dtype)).sum()


class Diffusion:
    """The objective `attnzoo.objective.BlockDiffusion` of a model; see `attnzoo.train.objective`."""

    name = "block_diffusion"
    measures = "upper bound of the negative log-likelihood, estimated from one masking of each block"

    def __init__(self, model: nn.Module) -> None:
        self.spec: BlockDiffusion = model.objective
        self.mask_id = self.spec.mask_id(model.config["vocab_size"])

    def training(
        self, model: nn.Module, batch: dict, collector: Collector | None = None, span: None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss summed over masked tokens, and their number; no rank has a part of the sequences."""
        tokens, ids, spec = batch["tokens"], _ids(batch), self.spec
        blocks, free = find_blocks(ids, spec.block_size), ids > 0
        t = draw_t(blocks, spec)
        wanted = t * count_free(blocks, free)
        number = wanted.ceil() if spec.mask_count == "ceil" else wanted.round()
        beta = 0.0 if spec.half_life is None else math.log(2) / (spec.half_life * spec.block_size)
        masked = choose_masked(blocks, number, free, beta * (1 - t), torch.rand_like(t))
        logits = self.logits(model, tokens, ids, masked, collector)
        return masked_loss(logits, tokens, masked, 1 / t), masked.sum()

    @torch.no_grad()
    def validation(self, model: nn.Module, batch: dict, seed: int, span: None = None) -> Measured:
        """The estimated bound summed over the targets, and their number; the same draws for a ``seed``."""
        tokens, ids = batch["tokens"], _ids(batch)
        blocks, free = find_blocks(ids, self.spec.block_size), ids > 0
        free[:, 0] = False
        free[:, 1:] &= ids[:, 1:] == ids[:, :-1]
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(len(tokens), 1, generator=generator)
        noise = torch.rand(tokens.shape, generator=generator).to(tokens.device)
        n = count_free(blocks, free)
        # numbers that walk through 1..n from block to block spread evenly over a row
        golden = (start.to(tokens.device) + blocks.block * 0.6180339887498949) % 1.0
        number = (golden * n).floor() + 1
        masked = choose_masked(blocks, number, free, 0.0, noise)
        logits = self.logits(model, tokens, ids, masked)
        bound = masked_loss(logits, tokens, masked, n / number)
        count = (batch["targets"] != IGNORED).sum()
        return Measured(bound * count / free.sum().clamp(min=1), count)

    def logits(
        self,
        model: nn.Module,
        tokens: Tensor,
        ids: Tensor,
        masked: Tensor,
        collector: Collector | None = None,
    ) -> Tensor:
        """``(B, T, vocab)`` of the noised copy."""
        noised, length = tokens.masked_fill(masked, self.mask_id), tokens.shape[1]
        if not self.spec.clean_context:
            return model(noised, ctx=Context(segment_ids=ids, collector=collector))
        both = torch.cat([noised, tokens], dim=1)
        copies = torch.cat([ids, torch.where(ids > 0, ids + ids.max(), 0)], dim=1)
        ctx = Context(segment_ids=copies, collector=collector, shared={COPIES: True})
        return model(both, ctx=ctx, keep=slice(0, length))

    def train_flops(self, model: nn.Module, seq_len: int) -> tuple[float, float]:
        """FLOPs per token of data, needed and executed: both copies pass the layers, one passes the head."""
        if not self.spec.clean_context:
            cost = model.cost(seq_len)
            return 3 * cost.forward_flops, 3 * cost.executed_flops
        once, twice = model.cost(seq_len), model.cost(2 * seq_len)
        # a noised token sees as many keys as its clean copy; the mask is a table over both copies
        needed = 2 * once.forward_flops - once.split["head"]
        return 3 * needed, 3 * (2 * twice.executed_flops - twice.split["head"])


def _ids(batch: dict) -> Tensor:
    ids = batch["segment_ids"]
    return torch.ones_like(batch["tokens"]) if ids is None else ids
