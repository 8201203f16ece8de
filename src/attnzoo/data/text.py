"""A corpus of tokenised text: samples are cut from one stream of documents that is stored on this machine."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from .corpus import Sample, TrainStream
from .sampler import Sampler
from .stream import Piece, TokenStream
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextCorpus:
    """A `Corpus` of two token streams. The order of the samples is the `Sampler`'s."""

    tokenizer: Tokenizer
    fingerprint: str
    seed: int
    seq_len: int
    isolate: bool
    val_samples: int | None
    train: TokenStream
    val: TokenStream
    pack: int = 1
    labelled: ClassVar[bool] = False

    def __post_init__(self):
        for split, stream in (("training", self.train), ("validation", self.val)):
            check_length(split, stream, self.seq_len)
        if len(self.train) < self.pack * self.seq_len:
            raise ValueError(
                f"data.pack: packs of {self.seq_len} tokens per sample must fit the {len(self.train)} "
                f"tokens of training text, got {self.pack}; lower it or give more text"
            )

    @property
    def sampler(self) -> Sampler:
        """Where the training samples are cut."""
        return Sampler(self.fingerprint, self.seed, len(self.train), self.seq_len, self.pack)

    def sample(self, n: int) -> Sample:
        """Training sample `n`, which counts from 0 over all epochs."""
        piece = self.train.read(self.sampler.start(n), self.seq_len + 1)
        return packed(piece, self.tokenizer, self.isolate, n)

    def train_dataset(self, start: int, total: int) -> TrainStream:
        """Samples `start` to `total - 1`, in the order of the counter."""
        return TrainStream(self, start, total)

    def validation(self) -> ValidationSet:
        """The held-out samples: the same for every seed, evenly spread over the held-out text, disjoint."""
        return ValidationSet(self.val, self.seq_len, self.val_samples, self.tokenizer, self.isolate)


def check_length(split: str, stream: TokenStream, seq_len: int) -> None:
    """Raise a ValueError unless `stream` holds a sample."""
    if len(stream) <= seq_len:
        raise ValueError(
            f"data.seq_len: must be under the {len(stream)} tokens of {split} text, "
            f"got {seq_len}; lower it, give more text or change data.val_fraction"
        )


def packed(piece: Piece, tokenizer: Tokenizer, isolate: bool, counter: int) -> Sample:
    """The sample whose tokens are `piece`. With `isolate`, its documents are numbered 1, 2, ..."""
    segments = np.ones_like(piece.tokens)
    if isolate:
        begins = piece.ends[piece.ends < len(segments) - 1] + 1
        segments[begins] += 1
        segments = np.cumsum(segments) - np.arange(len(segments))
    try:
        text_bytes = tokenizer.token_bytes[piece.tokens]
    except IndexError:
        raise ValueError(
            f"data.path: token {piece.tokens.max()} is outside the vocabulary of {tokenizer.vocab_size}: the "
            "tokenised text is damaged; attnzoo tokenize --check names the shard"
        ) from None
    text_bytes[piece.ends] += piece.extra
    counted = segments[1:] == segments[:-1]
    return {
        "tokens": torch.from_numpy(piece.tokens),
        "segment_ids": torch.from_numpy(segments),
        "counter": torch.tensor(counter),
        "target_bytes": torch.tensor(int(text_bytes[1:][counted].sum())),
    }


class ValidationSet(Dataset):
    """Evenly spaced windows of held-out text; `counter` is the item's number.

    Args:
        samples: at most so many; all windows when None.
    """

    def __init__(
        self, stream: TokenStream, seq_len: int, samples: int | None, tokenizer: Tokenizer, isolate: bool
    ) -> None:
        self.stream, self.seq_len, self.tokenizer, self.isolate = stream, seq_len, tokenizer, isolate
        self.windows = (len(stream) - 1) // seq_len
        self.samples = min(self.windows, samples or self.windows)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = i * self.windows // len(self) * self.seq_len
        return packed(self.stream.read(start, self.seq_len + 1), self.tokenizer, self.isolate, i)
