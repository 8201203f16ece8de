"""What training needs of any corpus: samples that are a function of a counter, and a fixed held-out set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch.utils.data import Dataset

from .tokenizer import Tokenizer

Sample = dict[str, torch.Tensor]
IGNORED = -100  # the target that torch's cross_entropy leaves out by default


class Corpus(Protocol):
    """Text, a mixture of texts, or a synthetic task.

    Sample n is a function of `fingerprint`, the run's seed and n, and of nothing else: not of what was read
    before, nor of how many processes read. It holds at least

    - `tokens` (seq_len + 1,) int64: inputs and, one further on, their targets; or, where the corpus is
      `labelled`, the (seq_len,) inputs, with `labels` (seq_len,) beside them;
    - `segment_ids` (as `tokens`) int64: 1, 2, ... by document within the sample, or all 1;
    - `counter` () int64: n;
    - `target_bytes` () int64: UTF-8 bytes of the targets that count in the loss (see `targets`).
    """

    @property
    def fingerprint(self) -> str:
        """Equal for corpora with equal samples at equal seeds, across machines; resume compares it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the ids."""

    @property
    def labelled(self) -> bool:
        """Whether samples bring targets of their own; otherwise these are the next tokens."""

    @property
    def pack(self) -> int:
        """How many consecutive samples, counted from 0, read on from one another."""

    def sample(self, n: int) -> Sample:
        """Training sample `n`, which counts from 0 over all epochs."""

    def train_dataset(self, start: int, total: int) -> TrainStream:
        """Samples `start` to `total - 1`, in the order of the counter."""

    def validation(self) -> Dataset:
        """The held-out samples, the same for every seed; it has a length."""


class TrainStream(Dataset):
    """The training samples `start` to `total - 1` of a run of `total`: item i is sample `start + i`.

    Read in order and without shuffling (the corpus has shuffled), so that a run which stopped after `start`
    samples goes on with the next one. Split over R ranks by `i % R`, as `DistributedSampler(shuffle=False)`
    does, a step takes the same samples as on one rank with an R times larger batch.
    """

    def __init__(self, corpus: Corpus, start: int, total: int):
        assert 0 <= start <= total, (start, total)
        self.corpus = corpus
        self.start = start
        self.total = total

    def __len__(self) -> int:
        return self.total - self.start

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.corpus.sample(self.start + i)


def targets(sample: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(inputs, targets, segment_ids), each (..., T), of a sample or batch with (..., T + 1) tokens.

    A target in another document than its input is -100, and so left out of the loss: nothing that the model
    may see announces it. Padding (segment 0) is left out too. A sample with `labels` has T tokens, and its
    labels are the targets.
    """
    tokens, segments = sample["tokens"], sample["segment_ids"]
    if "labels" in sample:
        return tokens, sample["labels"].masked_fill(segments == 0, IGNORED), segments
    own = (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] != 0)
    return tokens[..., :-1], tokens[..., 1:].masked_fill(~own, IGNORED), segments[..., :-1]


def collate(samples: Sequence[Sample]) -> Sample:
    """A batch: each entry of the samples stacked along a new first axis."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
