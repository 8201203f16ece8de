"""A corpus that training can index: packed samples and the fixed held-out set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from .cache import TokenStream, open_cache
from .config import DataConfig, TokenizerConfig, parse_data, parse_tokenizer
from .sampler import Sampler
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .synthetic import SyntheticConfig, SyntheticCorpus

Sample = dict[str, torch.Tensor]
IGNORED = -100  # the target that torch's cross_entropy leaves out by default


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised text, packed: sample n is a function of n and of all but the validation below.

    A sample is cut from one stream of documents, each closed by the tokenizer's `eos_id`, and holds

    - `tokens` (seq_len + 1,) int64: inputs and, one further on, their targets;
    - `segment_ids` (seq_len + 1,) int64: 1, 2, ... by document within the sample, or all 1 without `isolate`;
    - `counter` () int64: n;
    - `target_bytes` () int64: UTF-8 bytes of the targets that count in the loss (see `targets`).
    """

    tokenizer: Tokenizer
    fingerprint: str
    seed: int
    seq_len: int
    isolate: bool
    val_samples: int | None
    train: TokenStream
    val: TokenStream
    pack: int = 1
    labelled: ClassVar[bool] = False  # the targets are the next tokens

    def __post_init__(self):
        for split, stream in (("training", self.train), ("validation", self.val)):
            if len(stream.tokens) <= self.seq_len:
                raise ValueError(
                    f"data.seq_len: must be under the {len(stream.tokens)} tokens of {split} text, "
                    f"got {self.seq_len}; lower it, give more text or change data.val_fraction"
                )
        if len(self.train.tokens) < self.pack * self.seq_len:
            raise ValueError(
                f"data.pack: packs of {self.seq_len} tokens per sample must fit the {len(self.train.tokens)} "
                f"tokens of training text, got {self.pack}; lower it or give more text"
            )

    @property
    def sampler(self) -> Sampler:
        """Where the training samples are cut."""
        return Sampler(self.fingerprint, self.seed, len(self.train.tokens), self.seq_len, self.pack)

    def sample(self, n: int) -> Sample:
        """Training sample `n`, which counts from 0 over all epochs."""
        return self.cut(self.train, self.sampler.start(n), n)

    def train_dataset(self, start: int, total: int) -> TrainStream:
        """Samples `start` to `total - 1`, in the order of the counter."""
        return TrainStream(self, start, total)

    def validation(self) -> ValidationSet:
        """The held-out samples: the same for every seed, evenly spread over the held-out text, disjoint."""
        return ValidationSet(self)

    def cut(self, stream: TokenStream, start: int, counter: int) -> Sample:
        """The sample of `stream` whose first token is at `start`."""
        index = (start + np.arange(self.seq_len + 1)) % len(stream.tokens)  # the stream is closed to a circle
        tokens = stream.tokens[index].astype(np.int64)
        document = np.searchsorted(stream.starts, index, side="right") - 1
        segments = np.ones_like(tokens)
        if self.isolate:
            segments[1:] += np.cumsum(index[1:] == stream.starts[document[1:]])
        ends = index == stream.starts[document + 1] - 1
        text_bytes = self.tokenizer.token_bytes[tokens] + np.where(ends, stream.extra[document], 0)
        counted = segments[1:] == segments[:-1]
        return {
            "tokens": torch.from_numpy(tokens),
            "segment_ids": torch.from_numpy(segments),
            "counter": torch.tensor(counter),
            "target_bytes": torch.tensor(int(text_bytes[1:][counted].sum())),
        }


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


class ValidationSet(Dataset):
    """Evenly spaced windows of the held-out text; `counter` is the item's number."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.windows = (len(corpus.val.tokens) - 1) // corpus.seq_len

    def __len__(self) -> int:
        return min(self.windows, self.corpus.val_samples or self.windows)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        window = i * self.windows // len(self)
        return self.corpus.cut(self.corpus.val, window * self.corpus.seq_len, i)


def build_data(
    data: Mapping[str, Any], tokenizer: Mapping[str, Any], seed: int = 0
) -> Corpus | SyntheticCorpus:
    """Reads, splits and tokenises a corpus, or opens it from the cache where that has been done.

    A synthetic task needs neither: its samples are drawn when asked for, in a vocabulary of its own.

    Args:
        data: the keys of `configs/data/*.yaml`.
        tokenizer: the keys of `configs/tokenizer/*.yaml`.
        seed: of the order of the training samples; the split and the held-out set do not depend on it.

    Raises:
        ValueError: an unknown key, an illegal value, or text that is missing, unreadable or too short.
    """
    cfg = parse_data(data)
    if not isinstance(cfg, DataConfig):
        return _build_synthetic(cfg, tokenizer, seed)
    cache = open_cache(cfg, parse_tokenizer(tokenizer))
    return Corpus(
        tokenizer=cache.tokenizer,
        fingerprint=cache.fingerprint,
        seed=seed,
        seq_len=cfg.seq_len,
        isolate=cfg.isolate,
        val_samples=cfg.val_samples,
        pack=cfg.pack,
        train=cache.train,
        val=cache.val,
    )


def _build_synthetic(cfg: SyntheticConfig, tokenizer: Mapping[str, Any], seed: int) -> SyntheticCorpus:
    from .synthetic import PREFIX, build_synthetic

    given = parse_tokenizer(tokenizer).name
    if given != TokenizerConfig.name:
        raise ValueError(
            f"tokenizer: {PREFIX}{cfg.task.name} has a vocabulary of its own, got {given!r}; leave it out"
        )
    return build_synthetic(cfg, seed)


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
