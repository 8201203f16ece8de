"""The fixed validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnzoo.train.batches import Batch, collate
from attnzoo.train.objective import objective_of

Sample = dict[str, Tensor]
Autocast = Callable[[], AbstractContextManager]


class Validation:
    """The held-out samples, cut into this rank's batches once.

    Args:
        samples: the corpus's validation samples, the same in every run.
        batch_size: samples per forward pass.
    """

    def __init__(self, samples: Sequence[Sample], batch_size: int, rank: int = 0, world: int = 1) -> None:
        own = [samples[i] for i in range(rank, len(samples), world)]
        # sharded models talk in every forward pass, so every rank makes as many of them
        rounds = math.ceil(math.ceil(len(samples) / world) / batch_size)
        blank = {name: torch.zeros_like(value) for name, value in samples[0].items()}
        self.batches: list[Batch] = [
            collate(own[i * batch_size : (i + 1) * batch_size] or [blank]) for i in range(rounds)
        ]
        self.bytes = sum(int(batch["target_bytes"].sum()) for batch in self.batches)
        self.rank, self.world = rank, world

    @torch.no_grad()
    def run(self, model: nn.Module, device: torch.device, autocast: Autocast) -> dict[str, float]:
        """``val_loss`` in nats per token and ``val_bpb`` in bits per byte, of what the objective measures."""
        was_training, objective = model.training, objective_of(model)
        model.eval()
        nll = count = 0.0
        for i, batch in enumerate(self.batches):
            with autocast():
                seed = self.rank + self.world * i
                batch_nll, batch_count = objective.validation(model, to_device(batch, device), seed)
            nll, count = nll + batch_nll.double().cpu(), count + batch_count.cpu()
        model.train(was_training)
        totals = torch.stack([nll, count.double(), torch.tensor(float(self.bytes), dtype=torch.float64)])
        if self.world > 1:
            totals = totals.to(device)
            dist.all_reduce(totals)
        nll, count, size = totals.tolist()
        return {"val_loss": nll / count, "val_bpb": nll / math.log(2) / size}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {
        name: value.to(device, non_blocking=True) if value is not None else None
        for name, value in batch.items()
    }
