"""Verdicts over seeds: against scipy's paired test, against brute force, and over many simulated sweeps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from attnzoo.compare import statistics
from attnzoo.compare.statistics import Comparison, Method, compare_family, mean_interval

T, BOOTSTRAP = Method(), Method(interval="bootstrap")


def by_seed(values) -> dict[int, float]:
    return {seed: float(value) for seed, value in enumerate(values, 1)}


def one(values, baseline, method: Method = T) -> Comparison:
    return compare_family({"arm": by_seed(values)}, by_seed(baseline), method)["arm"]


def test_a_pair_is_judged_as_by_the_paired_t_test() -> None:
    rng = np.random.default_rng(3)
    own, other = rng.normal(2, 0.3, 7), rng.normal(1.8, 0.3, 7)
    found = one(own, other, Method(level=0.9))
    reference = stats.ttest_rel(own, other)
    half = stats.t.ppf(0.95, 6) * np.std(own - other, ddof=1) / math.sqrt(7)
    assert found.p == pytest.approx(reference.pvalue, rel=1e-12)
    assert found.difference == pytest.approx(np.mean(own) - np.mean(other), rel=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-9)
    assert (found.high + found.low) / 2 == pytest.approx(found.difference, rel=1e-9)
    assert found.n == 7 and found.p_adjusted == found.p


def test_only_shared_seeds_are_paired_whatever_their_order() -> None:
    arms = {"arm": {5: 2.0, 1: 1.0, 3: 4.0, 9: 100.0}}
    found = compare_family(arms, {3: 1.0, 1: 0.5, 5: 1.2, 7: -50.0}, T)["arm"]
    assert (found.n, found.difference) == (3, pytest.approx((0.5 + 3.0 + 0.8) / 3))
    assert found.p == pytest.approx(stats.ttest_rel([1.0, 4.0, 2.0], [0.5, 1.0, 1.2]).pvalue)


@pytest.mark.parametrize("correction", ["holm", "fdr_bh", "none"])
def test_corrections_are_those_of_statsmodels(correction: str) -> None:
    rng = np.random.default_rng(0)
    baseline = rng.normal(size=6)
    shifts = zip("abcd", (0.0, 3.0, 1.0, 0.3), strict=True)
    arms = {name: baseline + rng.normal(shift, 1.0, 6) for name, shift in shifts}
    found = compare_family(
        {k: by_seed(v) for k, v in arms.items()}, by_seed(baseline), Method(correction=correction)
    )
    raw = [stats.ttest_rel(values, baseline).pvalue for values in arms.values()]
    expected = raw if correction == "none" else multipletests(raw, method=correction)[1]
    assert [found[name].p_adjusted for name in arms] == pytest.approx(list(expected), rel=1e-9)
    assert sorted(raw) != raw  # or the order would not matter


def test_an_arm_without_pairs_does_not_count_in_the_family() -> None:
    baseline = by_seed([1.0, 2.0, 3.0])
    arms = {"a": by_seed([1.5, 2.4, 3.7]), "none": {8: 1.0}, "single": {1: 4.0}}
    found = compare_family(arms, baseline, T)
    assert found["a"].p_adjusted == found["a"].p
    assert found["none"] == Comparison(0)
    assert (found["single"].n, found["single"].difference, found["single"].p) == (1, 3.0, None)
    assert not found["single"].distinguishable(T)


@pytest.mark.parametrize("n", [2, 5, 7])
def test_the_bootstrap_has_the_p_of_all_sign_flips(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.8, 1.0, n)
    center = abs(differences.mean())
    flips = [abs(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=n)]
    expected = sum(flip >= center * (1 - 1e-12) for flip in flips) / 2**n
    found = one(differences, np.zeros(n), BOOTSTRAP)
    assert found.p == pytest.approx(expected, rel=1e-9) and found.p >= 2 / 2**n
    assert differences.min() <= found.low <= found.difference <= found.high <= differences.max()
    assert found == one(differences, np.zeros(n), BOOTSTRAP)  # the same for every call


def test_the_bootstrap_interval_nears_students_with_many_seeds() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 200)
    found, expected = one(values, np.zeros(200), BOOTSTRAP), one(values, np.zeros(200))
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


@pytest.mark.parametrize("method", [T, BOOTSTRAP])
def test_differences_without_spread_have_an_answer(method: Method) -> None:
    same = one([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], method)
    assert (same.difference, same.low, same.high, same.p, same.seeds_needed) == (0.0, 0.0, 0.0, 1.0, None)
    shifted = one([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], method)
    assert (shifted.difference, shifted.low, shifted.high) == (1.0, 1.0, 1.0)
    assert shifted.distinguishable(method) == (method is T)
    assert shifted.seeds_needed == (None if method is T else 6)


@pytest.mark.parametrize("method", [T, Method(correction="none")])
def test_verdicts_where_nothing_differs(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chance of any verdict among four arms: 5 % if corrected, far more if not."""
    monkeypatch.setattr(statistics, "_seeds_needed", lambda *_: None)  # slow, and no part of a verdict
    rng, trials, wrong = np.random.default_rng(11), 600, 0
    for _ in range(trials):
        values = rng.normal(0.0, 1.0, (5, 4)) + rng.normal(0.0, 3.0, 4)  # what a seed gives to all arms
        arms = {str(i): by_seed(row) for i, row in enumerate(values[1:])}
        found = compare_family(arms, by_seed(values[0]), method)
        wrong += any(c.distinguishable(method) for c in found.values())
    error = 3 * math.sqrt(0.05 * 0.95 / trials)
    assert (wrong / trials <= 0.05 + error) == (method is T)
    assert wrong / trials > 0.01  # or the verdicts were blind


@pytest.mark.parametrize(("effect", "arms"), [(0.8, 1), (0.8, 4), (2.5, 2)])
def test_the_seeds_needed_give_the_power_they_promise(effect: float, arms: int) -> None:
    """A difference of that size is found in about 80 % of sweeps with so many seeds, not with fewer."""
    pattern = np.array([-1.0, 1.0])
    observed = effect + pattern / np.std(pattern, ddof=1)  # mean `effect`, standard deviation 1, two seeds
    family = {str(i): by_seed(observed) for i in range(arms)}
    needed = compare_family(family, by_seed([0.0, 0.0]), T)["0"].seeds_needed
    alpha, trials, rng = 0.05 / arms, 6000, np.random.default_rng(5)

    def power(n: int) -> float:
        return np.mean(stats.ttest_1samp(rng.normal(effect, 1.0, (trials, n)), 0.0, axis=1).pvalue < alpha)

    error = 3 * math.sqrt(0.8 * 0.2 / trials)
    assert power(needed) > 0.8 - error
    assert power(needed - 1) < 0.8 + error


def test_seeds_needed_at_the_ends() -> None:
    assert one([1.0, 2.0], [2.0, 1.0]).seeds_needed is None  # no difference at all
    hopeless = one([1e-4 + 1, 1e-4 - 1], [0.0, 0.0])
    assert hopeless.seeds_needed is None  # beyond any sweep
    close = one([1.0, 1.2], [0.0, 0.0])
    assert close.p > 0.05 and close.seeds_needed == 3
    assert one([1.0, 1.01], [0.0, 0.0]).seeds_needed is None  # is distinguishable
    # a sign-flip test cannot reach 0.05 before the sixth seed, however clear the difference
    assert one([1.0, 1.01, 1.02], [0.0] * 3, BOOTSTRAP).seeds_needed == 6


def test_the_interval_of_a_mean() -> None:
    values = [0.9, 0.95, 0.97]
    expected = stats.t.interval(0.8, 2, np.mean(values), stats.sem(values))
    assert mean_interval(values, 0.8) == pytest.approx(expected)
    assert mean_interval([0.5], 0.8) is None
    assert mean_interval([0.5, 0.5], 0.8) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"interval": "z"}, "--interval"),
        ({"correction": "sidak"}, "--correction"),
        ({"level": 95}, "--level"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(options: dict, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: must be"):
        Method(**options)
