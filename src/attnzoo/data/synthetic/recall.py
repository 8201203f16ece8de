"""Recall: what followed this key earlier in the sequence?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..corpus import IGNORED
from .task import Task, check_at_most, count, nothing_asked, scatter, share


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall: key-value pairs first, then each key once more, asking for its value.

    Zoology, arXiv 2312.04927. The questions stand at random places after the pairs, with blanks (0) between;
    the answers are not shown. Keys are 1 to ``keys``, values follow.

    Args:
        pairs: to remember; a state must hold them all at once. distance: blanks between pairs and questions.
        keys, values: how many of each there are.

    EXAMPLE MQAR(pairs=3, distance=1, keys=4, values=4), 12 tokens
    """

    name = "mqar"
    pairs: int = count(16)
    distance: int = count(0, least=0)
    keys: int = count(32)
    values: int = count(32)

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

    EXAMPLE NoisyRecall(pairs=2, keys=4, values=4, noise=4), 12 tokens
    """

    name = "noisy_recall"
    pairs: int = count(8)
    keys: int = count(32)
    values: int = count(32)
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

    EXAMPLE FuzzyRecall(pairs=2, key_length=2, value_length=2, key_letters=3, value_letters=3), 17 tokens
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


@dataclass(frozen=True)
class Induction(Task):
    """Induction: what followed the last time that this symbol stood here?

    The pattern of an induction head, arXiv 2209.11895, [A][B] ... [A] -> [B], asked at every symbol that has
    occurred before, of a sequence of random symbols. What follows a symbol changes each time, so a memory
    must overwrite.

    Args:
        symbols: how many there are, and so how far back a symbol last stood.

    EXAMPLE Induction(symbols=4), 12 tokens
    """

    name = "induction"
    symbols: int = count(16, least=2)

    @property
    def num_symbols(self) -> int:
        return self.symbols

    @property
    def least_length(self) -> int:
        return self.symbols + 1  # with so many, some symbol occurs twice

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = rng.integers(self.symbols, size=length), nothing_asked(length)
        symbols, after = tokens.tolist(), {}
        for i, symbol in enumerate(symbols):
            if i:
                after[symbols[i - 1]] = symbol
            if symbol in after:
                labels[i] = after[symbol]
        return tokens, labels


@dataclass(frozen=True)
class Needle(Task):
    """Needle in a haystack: marked pairs hidden among random symbols, asked for at the end.

    A needle is the mark, a key and a value; a question is the question mark and the key, at which the value
    is asked for. Values are symbols of the haystack, so only the mark tells a needle. Symbols come first,
    then the keys, the mark and the question mark.

    Args:
        needles: hidden and asked for. keys, symbols: how many of each there are.
        depth: where the needles stand, all together, as a share of the haystack; null: anywhere.

    EXAMPLE Needle(needles=1, keys=2, symbols=6), 12 tokens
    """

    name = "needle"
    needles: int = count(1)
    depth: float | None = share(None, null=True)
    keys: int = count(8)
    symbols: int = count(32)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_most(self, "needles", "keys")

    @property
    def num_symbols(self) -> int:
        return self.symbols + self.keys + 2

    @property
    def least_length(self) -> int:
        return 5 * self.needles

    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        number, hay = self.needles, length - 2 * self.needles
        tokens, labels = rng.integers(self.symbols, size=length), nothing_asked(length)
        keys = self.symbols + rng.permutation(self.keys)[:number]
        if self.depth is None:
            starts = scatter(rng, number, 3, hay)
        else:
            starts = round(self.depth * (hay - 3 * number)) + 3 * np.arange(number)
        tokens[starts], tokens[starts + 1] = self.num_symbols - 2, keys
        values, order = tokens[starts + 2], rng.permutation(number)
        tokens[hay::2], tokens[hay + 1 :: 2] = self.num_symbols - 1, keys[order]
        labels[hay + 1 :: 2] = values[order]
        return tokens, labels
