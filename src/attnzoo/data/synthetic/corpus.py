"""A task as a corpus: sample n is drawn when it is asked for, by a generator that n itself numbers.

The generator is Philox, whose stream is a function of a key and a counter: the key is a hash of the task's
fingerprint and the seed, the counter is n. So there is no fixed set of samples, and nothing to store, shuffle
or fast-forward. Validation has a key of its own, without the seed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ..config import check_choice, check_keys, check_whole_number
from ..corpus import Sample, TrainStream
from ..tokenizer import SymbolTokenizer
from .task import TASKS, Task

PREFIX = "synthetic/"
_FORMAT = 1  # part of the fingerprint: raise it whenever a task draws otherwise


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """The `data` group of a task: `configs/data/synthetic/*.yaml` says what each key means."""

    task: Task
    seq_len: int = 32
    val_seq_len: int | None = None
    batch_size: int = 32
    val_samples: int = 512
    num_workers: int = 0
    worker_timeout: int = 300

    def __post_init__(self) -> None:
        for key in ("seq_len", "batch_size", "val_samples"):
            check_whole_number(f"data.{key}", getattr(self, key), 1)
        check_whole_number("data.val_seq_len", self.val_seq_len, 1, null=True)
        check_whole_number("data.num_workers", self.num_workers, 0)
        check_whole_number("data.worker_timeout", self.worker_timeout, 0)
        self.task.check_length("seq_len", self.seq_len)
        if self.val_seq_len is not None:
            self.task.check_length("val_seq_len", self.val_seq_len)


def parse_synthetic(values: Mapping[str, Any]) -> SyntheticConfig:
    """The checked `data` group of a synthetic task. Raises ValueError on an unknown key or illegal value."""
    name = str(values["name"])
    check_choice("data.name", name, [PREFIX + known for known in TASKS])
    kind = TASKS[name.removeprefix(PREFIX)]
    dials = [field.name for field in dataclasses.fields(kind)]
    common = [field.name for field in dataclasses.fields(SyntheticConfig) if field.name != "task"]
    check_keys("data", values, ["name", *dials, *common])
    task = kind(**{key: value for key, value in values.items() if key in dials})
    return SyntheticConfig(task, **{key: value for key, value in values.items() if key in common})


@dataclasses.dataclass(frozen=True)
class SyntheticCorpus:
    """Samples of a task; what `attnzoo.data.Corpus` is for text. A sample holds

    - `tokens` (seq_len,) int64, the inputs, and `labels` (seq_len,) int64, IGNORED where nothing is asked;
    - `segment_ids` (seq_len,) int64, all 1; `counter` () int64, n; `target_bytes` () int64, 0: no text.
    """

    task: Task
    seed: int
    seq_len: int
    val_seq_len: int | None = None
    val_samples: int = 512
    pack: ClassVar[int] = 1
    labelled: ClassVar[bool] = True

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """One id per symbol of the task."""
        return SymbolTokenizer(self.task.num_symbols)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the task, its dials and the length that it is validated at."""
        known = [_FORMAT, self.task.name, self.task.dials(), self.val_seq_len]
        return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest()

    def sample(self, n: int) -> Sample:
        """Training sample `n`."""
        return self._draw(self._train_key, n, self.seq_len)

    def train_dataset(self, start: int, total: int) -> TrainStream:
        """Samples `start` to `total - 1`, in the order of the counter."""
        return TrainStream(self, start, total)

    def validation(self) -> HeldOut:
        """The held-out samples, the same for every seed."""
        return HeldOut(self)

    def held_out(self, n: int) -> Sample:
        """Held-out sample `n`."""
        return self._draw(self._val_key, n, self.val_seq_len or self.seq_len)

    @functools.cached_property
    def _train_key(self) -> np.ndarray:
        return _key(f"{self.fingerprint} train {self.seed}")

    @functools.cached_property
    def _val_key(self) -> np.ndarray:
        return _key(f"{self.fingerprint} validation")

    def _draw(self, key: np.ndarray, n: int, length: int) -> Sample:
        tokens, labels = self.task.draw(generator(key, n), length)
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "segment_ids": torch.ones(length, dtype=torch.long),
            "counter": torch.tensor(n),
            "target_bytes": torch.tensor(0),
        }


class HeldOut(Dataset):
    """The validation samples of a task; `counter` is the item's number."""

    def __init__(self, corpus: SyntheticCorpus):
        self.corpus = corpus

    def __len__(self) -> int:
        return self.corpus.val_samples

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.corpus.held_out(i)


def build_synthetic(cfg: SyntheticConfig, seed: int = 0) -> SyntheticCorpus:
    """The corpus that a checked configuration describes."""
    return SyntheticCorpus(cfg.task, seed, cfg.seq_len, cfg.val_seq_len, cfg.val_samples)


def generator(key: np.ndarray, n: int) -> np.random.Generator:
    """The generator of sample ``n``: 2^128 draws of its own under ``key``."""
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, n, 0]))


def _key(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")
