"""What a model is trained on: the next token, or what its layers ask for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnzoo import Collector, Context
from attnzoo.data import IGNORED
from attnzoo.parallel.context import Span
from attnzoo.registry import lacking
from attnzoo.train.batches import Batch
from attnzoo.train.diffusion import Diffusion
from attnzoo.train.metrics import Measured


class Objective(Protocol):
    """A loss, its held-out measure, and what a token of data costs.

    Attributes:
        name: as the summary has it. measures: what ``val_loss`` and ``val_bpb`` are.
    """

    name: str
    measures: str

    def training(
        self, model: nn.Module, batch: Batch, collector: Collector | None = None, span: Span | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss summed over what it counts, in nats, and their number; those of the part ``span``."""

    def validation(self, model: nn.Module, batch: Batch, seed: int, span: Span | None = None) -> Measured:
        """What the targets of a held-out batch add up to; those of the part ``span``, zeros elsewhere."""

    def train_flops(self, model: nn.Module, seq_len: int) -> tuple[float, float]:
        """FLOPs of a forward and backward per token of data: needed, and run by the implementation."""


class NextToken:
    """Cross-entropy of each next token.

    Raises:
        ValueError: a layer sees later tokens, which would give the targets away.
    """

    name = "next_token"
    measures = "negative log-likelihood"

    def __init__(self, model: nn.Module) -> None:
        for i, mixer in enumerate(getattr(model, "mixers", ())):
            for name in lacking(mixer, "causal"):
                raise ValueError(
                    f"model.layout: next-token loss needs layers that see no later token, got {name!r} in "
                    f"layer {i}; train it by an objective of its own"
                )

    def training(
        self, model: nn.Module, batch: Batch, collector: Collector | None = None, span: Span | None = None
    ) -> tuple[Tensor, Tensor]:
        context = Context(segment_ids=batch["segment_ids"], collector=collector, span=span)
        logits = model(batch["tokens"], ctx=context)  # (B, T, V), of the rank's part
        targets = batch["targets"] if span is None else span.cut(batch["targets"])
        nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return nll, (targets != IGNORED).sum()

    @torch.no_grad()
    def validation(self, model: nn.Module, batch: Batch, seed: int, span: Span | None = None) -> Measured:
        context = Context(segment_ids=batch["segment_ids"], span=span)
        logits = model(batch["tokens"], ctx=context)  # (B, T, V), of the rank's part
        targets = batch["targets"] if span is None else span.cut(batch["targets"])
        exact = logits if logits.dtype == torch.float64 else logits.float()
        nll = cross_entropy(
            exact.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        counted, correct = targets != IGNORED, logits.argmax(-1) == targets
        sums = (nll.sum(0), counted.sum(0), correct.sum(0))
        return Measured(*(z if span is None else _in_place(z, span) for z in sums))

    def train_flops(self, model: nn.Module, seq_len: int) -> tuple[float, float]:
        cost = model.cost(seq_len)
        return cost.train_flops, 3 * cost.executed_flops


def _in_place(z: Tensor, span: Span) -> Tensor:
    """What a part's positions have, at their places in the whole sequence."""
    length = z.shape[0]
    whole = z.new_zeros(length * span.ranks)
    whole[span.rank * length : (span.rank + 1) * length] = z
    return whole


def objective_of(model: nn.Module, labelled: bool = False) -> Objective:
    """The objective that the model's layers ask for.

    Args:
        labelled: whether the targets are labels of the data's own and not the next tokens.

    Raises:
        ValueError: the layers fill in masked tokens, and so cannot learn labels.
    """
    if getattr(model, "objective", None) is None:
        return NextToken(model)
    if labelled:
        raise ValueError(
            f"data: {Diffusion.name} layers learn to fill in tokens and synthetic tasks ask for labels, got "
            f"model.layout={model.config['layout']!r}; use another variant, or text"
        )
    return Diffusion(model)
