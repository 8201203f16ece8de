"""Batches by sample counter: which samples a step sees is a function of the step, not of an iterator."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from attnzoo.data import Corpus, targets
from attnzoo.data import collate as stack

Batch = dict[str, Tensor | None]


class CounterBatches(Sampler[list[int]]):
    """Sample counters of one rank's micro-batches, step after step.

    Step ``s`` takes the samples from ``s * batch_size``, cut into ``accumulate * world`` micro-batches; so
    neither ranks nor accumulation nor workers change which samples a step sees.

    Args:
        first, last: the steps to serve, ``last`` excluded; None goes on for ever.
        batch_size: samples per optimiser step, over all ranks and micro-batches.
        accumulate, rank, world: how a step is cut.
    """

    def __init__(
        self,
        first: int,
        last: int | None,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        parts = accumulate * world
        if batch_size % parts:
            raise ValueError(
                f"data.batch_size: must be a multiple of accumulate x ranks = {parts}, got {batch_size}"
            )
        self.first, self.last, self.batch_size = first, last, batch_size
        self.size = batch_size // parts  # of one micro-batch of one rank
        self.accumulate, self.rank, self.world = accumulate, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        steps = itertools.count(self.first) if self.last is None else range(self.first, self.last)
        for step in steps:
            for micro in range(self.accumulate):
                start = step * self.batch_size + (micro * self.world + self.rank) * self.size
                yield list(range(start, start + self.size))


def train_loader(corpus: Corpus, batches: CounterBatches, workers: int = 0) -> DataLoader:
    """Micro-batches of ``corpus`` in the order of ``batches``."""
    return DataLoader(
        corpus.train_dataset(0, sys.maxsize),  # item n is sample n
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def collate(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """Inputs, targets and documents of some samples of a corpus.

    Shape: ``tokens``, ``targets`` and ``segment_ids`` are (B, T); ``target_bytes`` (B,) is the text of the
    targets. ``segment_ids`` is None where every row is one document: mixers need no mask then.
    """
    stacked = stack(samples)
    tokens, labels, segments = targets(stacked)
    whole = bool((segments == segments[:, :1]).all() and (segments > 0).all())
    return {
        "tokens": tokens.contiguous(),
        "targets": labels,
        "segment_ids": None if whole else segments.contiguous(),
        "target_bytes": stacked["target_bytes"],
    }


def batch_fingerprint(batches: Sequence[Batch]) -> str:
    """Hash of the input tokens, to find a batch again."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["tokens"].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
