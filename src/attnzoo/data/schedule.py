"""Whose turn it is, among several with different shares.

The schedule is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): after
any number n of turns, each of m sources has had its share w_s of them to within one turn,

    |count_s(n) - w_s n| <= 1 - 1 / (2 m - 2),

where always taking the source with the largest deficit can be off by more. Shares are whole turns of a
period, and a period ends with no deficit: so a table of one period answers for every n.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Schedule:
    """Which source has turn n.

    Args:
        shares: turns of each source in a period; whole numbers of at least 1.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self.shares, self.period = tuple(shares), sum(shares)
        self.source = _turns(self.shares)
        self.before = np.empty_like(self.source)  # turns that the same source had earlier in the period
        for i, share in enumerate(self.shares):
            self.before[self.source == i] = np.arange(share)

    def turn(self, n: int) -> tuple[int, int]:
        """(source, how many turns it had before), in O(1)."""
        period, i = divmod(n, self.period)
        source = int(self.source[i])
        return source, period * self.shares[source] + int(self.before[i])

    def counts(self, n: int) -> list[int]:
        """Turns of each source among the first n."""
        period, rest = divmod(n, self.period)
        more = np.bincount(self.source[:rest], minlength=len(self.shares))
        return [period * share + int(extra) for share, extra in zip(self.shares, more, strict=True)]


def _turns(shares: Sequence[int]) -> np.ndarray:
    """(period,) sources. In units of 1 / (period * 2(m - 1)), so that every comparison is one of integers."""
    period, unit = sum(shares), max(1, 2 * (len(shares) - 1))
    share = np.array(shares, dtype=np.int64)
    due = np.zeros_like(share)  # period * (w n - count)
    turns = np.empty(period, dtype=np.int64)
    for n in range(period):
        due += share
        allowed = due * unit >= period  # a source that is further ahead would exceed the bound
        # of these, the one that would first fall behind by more than the bound if it got no turn
        slack = ((unit - 1) * period - unit * due) / share
        turns[n] = np.where(allowed, slack, np.inf).argmin()
        due[turns[n]] -= period
    assert not due.any(), shares
    return turns
