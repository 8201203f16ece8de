"""Recall: what followed this key earlier in the sequence?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..corpus import IGNORED
from .task import Task, check_at_most, count, nothing_asked, scatter


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall: key-value pairs first, then each key once more, asking for its value.

    Zoology, arXiv 2312.04927. The questions stand at random places after the pairs, with blanks (0) between;
    the answers are not shown. Keys are 1 to ``keys``, values follow.

    Args:
        pairs: to remember; a state must hold them all at once. distance: blanks between pairs and questions.
        keys, values: how many of each there are.

    Example: sample 0 of seed 0 of MQAR(pairs=3, distance=1, keys=4, values=4) at 12 tokens

        tokens  4 8 2 8 1 5 0 0 4 1 0 2
        labels  . . . . . . . . 8 5 . 8
    """

    name = "mqar"
    pairs: int = count(8)
    distance: int = count(0, least=0)
    keys: int = count(16)
    values: int = count(16)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_most(self, "pairs", "keys")

    @property
    def num_symbols(self) -> int:
        return 1 + self.keys + self.values

    @property
    def least_length(self) -> int:
        return 3 * self.pairs + self.distance

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = np.zeros(length, dtype=np.int64), nothing_asked(length)
        keys = 1 + rng.permutation(self.keys)[: self.pairs]
        values = 1 + self.keys + rng.integers(self.values, size=self.pairs)
        told = 2 * self.pairs
        tokens[0:told:2], tokens[1:told:2] = keys, values
        start = told + self.distance
        places = start + rng.permutation(length - start)[: self.pairs]
        tokens[places], labels[places] = keys, values
        return tokens, labels


@dataclass(frozen=True)
class NoisyRecall(Task):
    """Associative recall among noise: other symbols stand between the pairs and between the questions.

    The noisy in-context recall of MAD, arXiv 2403.17844. A pair stays together; half of the noise stands
    among the pairs and half among the questions. Keys come first, values next, noise last.

    Args:
        pairs: to remember. keys, values, noise: how many of each there are.

    Example: sample 0 of seed 0 of NoisyRecall(pairs=2, keys=4, values=4, noise=4) at 12 tokens

        tokens   1  5  2  6 11  9 10  1  9 10  2 11
        labels   .  .  .  .  .  .  .  5  .  .  6  .
    """

    name = "noisy_recall"
    pairs: int = count(6)
    keys: int = count(16)
    values: int = count(16)
    noise: int = count(16)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_most(self, "pairs", "keys")

    @property
    def num_symbols(self) -> int:
        return self.keys + self.values + self.noise

    @property
    def least_length(self) -> int:
        return 3 * self.pairs

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        labels = nothing_asked(length)
        tokens = self.keys + self.values + rng.integers(self.noise, size=length)
        keys = rng.permutation(self.keys)[: self.pairs]
        values = self.keys + rng.integers(self.values, size=self.pairs)
        told = 2 * self.pairs + (length - 3 * self.pairs) // 2
        pairs = scatter(rng, self.pairs, 2, told)
        tokens[pairs], tokens[pairs + 1] = keys, values
        places = told + rng.permutation(length - told)[: self.pairs]
        tokens[places], labels[places] = keys, values
        return tokens, labels


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """Associative recall of words: a key is several letters, and so is its value.

    The fuzzy in-context recall of MAD, arXiv 2403.17844, with words of one length. All pairs are told, then
    they are asked in random order, again and again as long as there is room: the key's letters, and then the
    value's, each of which is asked for at the token before it. Letters of keys come first, those of values
    next, and the last symbol fills the end of the sample.

    Args:
        pairs: to remember. key_length, value_length: letters of a word.
        key_letters, value_letters: how many of each there are.

    Example: sample 0 of seed 0 of FuzzyRecall(pairs=2, key_letters=3, value_letters=3) at 17 tokens

        tokens  1 1 4 5 1 0 4 4 1 0 4 4 1 1 4 5 6
        labels  . . . . . . . . . 4 4 . . 4 5 . .
    """

    name = "fuzzy_recall"
    pairs: int = count(4)
    key_length: int = count(2, most=8)
    value_length: int = count(2, most=8)
    key_letters: int = count(8, most=256)
    value_letters: int = count(8, most=256)

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.key_letters**self.key_length
        if self.pairs > words:
            raise ValueError(
                f"data.pairs: must be at most the {words} words of {self.key_length} letters, "
                f"got {self.pairs}; lower it or raise data.key_letters"
            )

    @property
    def num_symbols(self) -> int:
        return self.key_letters + self.value_letters + 1

    @property
    def least_length(self) -> int:
        return 2 * self.pairs * (self.key_length + self.value_length)

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        width = self.key_length + self.value_length
        words = rng.choice(self.key_letters**self.key_length, size=self.pairs, replace=False)
        places = self.key_letters ** np.arange(self.key_length)
        keys = words[:, None] // places % self.key_letters
        values = self.key_letters + rng.integers(self.value_letters, size=(self.pairs, self.value_length))
        pairs = np.concatenate([keys, values], axis=1)  # (pairs, width)
        rounds = length // (width * self.pairs)
        order = np.concatenate([rng.permutation(self.pairs) for _ in range(rounds)])
        told = pairs[order]
        tokens = np.full(length, self.num_symbols - 1, dtype=np.int64)
        tokens[: told.size] = told.ravel()
        asked = np.full(told.shape, IGNORED, dtype=np.int64)
        asked[self.pairs :, self.key_length - 1 : -1] = told[self.pairs :, self.key_length :]
        labels = nothing_asked(length)
        labels[: told.size] = asked.ravel()
        return tokens, labels
