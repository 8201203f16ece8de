"""Where sample n is cut from the token stream: a function of (fingerprint, seed, n), without any state.

An epoch lays a grid of disjoint windows over the stream, which is closed to a circle, and visits them in a
random order; the next epoch shifts the grid and draws another order. Both come from a keyed hash, so nothing
has to be stored, shuffled or fast-forwarded to resume at any n, on any number of workers and ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

_ROUNDS = 4  # of the Feistel network; four rounds of a random function make a permutation that looks random


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Start positions of the training samples.

    Args:
        fingerprint: of the corpus.
        seed: of the run.
        num_tokens: length of the stream, more than `seq_len`.
        seq_len: distance of the windows; a sample reads one token more, the last target.
        pack: consecutive samples that read on from one another; packs, not samples, are in random order.
    """

    fingerprint: str
    seed: int
    num_tokens: int
    seq_len: int
    pack: int = 1

    @property
    def samples_per_epoch(self) -> int:
        return self.num_tokens // (self.seq_len * self.pack) * self.pack

    def start(self, n: int) -> int:
        """Position in [0, num_tokens) where sample `n` starts; `n` counts from 0 over all epochs."""
        assert n >= 0, n
        epoch, i = divmod(n, self.samples_per_epoch)
        key = f"{self.fingerprint} {self.seed} {epoch}".encode()
        pack, part = divmod(i, self.pack)
        window = permute(pack, self.samples_per_epoch // self.pack, key) * self.pack + part
        return (_hash(key, b"offset") + window * self.seq_len) % self.num_tokens


def permute(i: int, size: int, key: bytes) -> int:
    """The image of `i` under the permutation of range(size) that `key` names, in O(1) time and memory."""
    assert 0 <= i < size, (i, size)
    # A Feistel network permutes numbers of an even count of bits; walking along its cycle until the number is
    # back in range leaves a permutation of the range. The domain is at most four times the range: few steps.
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_hash(key, b"%d %d" % (number, right)) & mask)
        i = (left << half) | right
        if i < size:
            return i


@functools.lru_cache(maxsize=8)
def _keyed(key: bytes) -> hashlib.blake2b:
    return hashlib.blake2b(hashlib.sha256(key).digest(), digest_size=8)


def _hash(key: bytes, message: bytes) -> int:
    """A 64-bit number that looks random, of a key and a message."""
    state = _keyed(key).copy()
    state.update(message)
    return int.from_bytes(state.digest(), "little")
