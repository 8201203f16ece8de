"""The fixed validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.parallel.ranks import Ranks
from attnzoo.parallel.shard import reshard
from attnzoo.train.batches import Batch, collate
from attnzoo.train.metrics import Measured, loss_by_position
from attnzoo.train.objective import objective_of

Sample = dict[str, Tensor]
Autocast = Callable[[], AbstractContextManager]


class Validation:
    """The held-out samples, cut into this rank's batches once.

    Args:
        samples: the corpus's validation samples, the same in every run.
        batch_size: samples per forward pass.
        ranks: who shares the samples, and each of them.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        rank, world = self.ranks.layout.data_rank, self.ranks.layout.data
        own = [samples[i] for i in range(rank, len(samples), world)]
        # sharded models talk in every forward pass, so every rank makes as many of them
        rounds = math.ceil(math.ceil(len(samples) / world) / batch_size)
        blank = {name: torch.zeros_like(value) for name, value in samples[0].items()}
        self.batches: list[Batch] = [
            collate(own[i * batch_size : (i + 1) * batch_size] or [blank]) for i in range(rounds)
        ]
        # ranks that share a sequence have its bytes together
        size = sum(int(batch["target_bytes"].sum()) for batch in self.batches)
        self.bytes = size / self.ranks.layout.context
        self.labelled = "labels" in samples[0]

    @torch.no_grad()
    def run(self, model: nn.Module, device: torch.device, autocast: Autocast) -> dict[str, Any]:
        """What the objective measures: ``val_loss`` in nats per token; of text ``val_bpb`` in bits per byte
        and ``val_loss_by_position``, of labelled samples ``val_accuracy``. What does not apply is None.
        """
        was_training, objective = model.training, objective_of(model, self.labelled)
        model.eval()
        layout, sums = self.ranks.layout, list[Tensor]()
        for i, batch in enumerate(self.batches):
            with autocast():
                seed = layout.data_rank + layout.data * i
                part = objective.validation(model, to_device(batch, device), seed, self.ranks.span)
            known = [value.cpu().double() for value in part if value is not None]
            sums = [a + b for a, b in zip(sums, known, strict=True)] if sums else known
        model.train(was_training)
        reshard(model)
        size = torch.tensor(self.bytes, dtype=torch.float64)
        if layout.world > 1:
            for value in (*sums, size):
                value.copy_(self.ranks.add(value.to(device)))
        return self._report(Measured(*sums), size.item())

    def _report(self, total: Measured, size: float) -> dict[str, Any]:
        nll, count = total.nll.sum().item(), total.count.sum().item()
        by_position = not self.labelled and total.nll.ndim == 1
        return {
            "val_loss": nll / count,
            "val_bpb": None if self.labelled else nll / math.log(2) / size,
            "val_accuracy": total.correct.sum().item() / count if self.labelled else None,
            "val_loss_by_position": loss_by_position(total.nll, total.count) if by_position else None,
        }


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if value is not None else None
        for name, value in batch.items()
    }
