"""The order of the samples: a random permutation per epoch that nothing has to remember."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from attnzoo.data.sampler import Sampler, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000])
def test_permute_is_a_bijection(size: int):
    for key in (b"a", b"b"):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_look_random():
    counts = Counter(permute(0, 6, b"%d" % key) for key in range(3000))
    assert sum((counts[i] - 500) ** 2 / 500 for i in range(6)) < 20.5  # chi-square of 5 degrees, 1 in 1000
    order = [permute(i, 4096, b"key") for i in range(4096)]
    assert abs(np.corrcoef(order, range(4096))[0, 1]) < 0.06
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 12


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(103, 7), (8, 7), (96, 8)])
def test_an_epoch_covers_the_stream_without_overlap(num_tokens: int, seq_len: int):
    sampler = Sampler("fingerprint", 5, num_tokens, seq_len)
    size = sampler.samples_per_epoch
    for epoch in range(4):
        starts = [sampler.start(epoch * size + i) for i in range(size)]
        seen = [(start + i) % num_tokens for start in starts for i in range(seq_len)]
        assert len(set(seen)) == len(seen) > num_tokens - seq_len


def test_epochs_seeds_and_corpora_differ():
    base = Sampler("fingerprint", 5, 1003, 10)
    orders = [[base.start(n) for n in range(i, i + 100)] for i in (0, 100, 200)]
    orders += [
        [Sampler(*args, 1003, 10).start(n) for n in range(100)] for args in (("fingerprint", 6), ("f", 5))
    ]
    assert len({tuple(order) for order in orders}) == 5
    assert len({order[0] % 10 for order in orders}) > 1  # the cuts move, not only their order
