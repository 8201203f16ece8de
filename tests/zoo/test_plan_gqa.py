"""The planner of head counts: fits, inversion, costs by hand, and what the paper says of them."""

from __future__ import annotations

import math

import pytest

from attnzoo.plan_gqa import Curve, candidates, depth_of, fit, plan, rank

SIZES = [3e6, 1e7, 4e7, 1.5e8, 5e8, 1.2e9]
TRUE = Curve(2.0e8, 0.27, 1.7)
CURVES = {(h, g): Curve(2e8 * (1 + 0.3 / h + 0.05 / g), 0.27, 1.7) for h, g in candidates()}


def test_candidates_are_the_papers() -> None:
    pairs = candidates()
    assert len(pairs) == 21 == len(set(pairs))
    assert all(g <= h and h in (1, 2, 4, 8, 16, 32) for h, g in pairs)


@pytest.mark.parametrize("curve", [TRUE, Curve(5e6, 0.8, 0.0), Curve(3e12, 0.08, 0.9), Curve(1e7, 1.9, 3.0)])
def test_fit_finds_the_curve(curve: Curve) -> None:
    found = fit(SIZES, [curve.loss(n) for n in SIZES])
    assert found.b == pytest.approx(curve.b, rel=1e-3) and pytest.approx(curve.E, abs=2e-3) == found.E
    for n in (1e6, 5e7, 1e10):
        assert found.loss(n) == pytest.approx(curve.loss(n), rel=1e-3)
    assert found.r2 > 0.999999


def test_fit_of_noisy_runs_is_the_least_squares_one() -> None:
    losses = [TRUE.loss(n) + 0.01 * (-1) ** i for i, n in enumerate(SIZES)]
    found = fit(SIZES, losses)
    left = lambda c: sum((c.loss(n) - y) ** 2 for n, y in zip(SIZES, losses, strict=True))  # noqa: E731
    assert left(found) <= left(TRUE) and 0.99 < found.r2 < 1
    for change in (1.01, 0.99):
        assert left(found) <= left(found._replace(a=found.a * change))
        assert left(found) <= left(found._replace(b=found.b * change))
        assert left(found) <= left(found._replace(E=found.E * change))


def test_a_limit_below_zero_is_not_fitted() -> None:
    found = fit(SIZES, [(1e9 / n) ** 0.2 - 0.4 for n in SIZES])
    assert found.E == 0 and found.a > 0


def test_size_inverts_the_loss() -> None:
    assert TRUE.size(TRUE.loss(7e8)) == pytest.approx(7e8)
    assert TRUE.size(1.7) == math.inf == TRUE.size(1.0)


def test_costs_by_hand() -> None:
    (only,) = rank(2.4, 1000, {(8, 2): TRUE}, head_dim=32, depth=[(1e9, 10)], lam=0.3)
    size = TRUE.size(2.4)
    assert only[:4] == (8, 2, size, pytest.approx(10))
    assert only.memory == pytest.approx(size + 2 * 1000 * 10 * 32 * 2)
    assert only.flops == pytest.approx(2 * size + 4 * 1000 * 10 * 32 * 8)
    assert only.train_flops == pytest.approx(6 * size + 3 * 4 * 500 * 10 * 32 * 8)
    assert only.cost == pytest.approx(0.3 * only.memory**0.5 + 0.7 * only.flops ** (1 / 3))
    squares = rank(2.4, 10, {(8, 2): TRUE}, lam=1.0, exponents=(2.0, 1.0))[0]
    assert squares.cost == pytest.approx(squares.memory**2)


def test_without_context_the_smallest_model_wins() -> None:
    smallest = min(CURVES, key=lambda pair: CURVES[pair].size(2.6))
    assert plan(2.6, 0, CURVES) == (*smallest, CURVES[smallest].size(2.6))


def test_long_contexts_want_fewer_heads() -> None:
    short, long = (plan(2.6, T, CURVES) for T in (128, 1048576))
    assert long[0] < short[0] and long[1] <= short[1] and long[2] > short[2]
    at_full = rank(2.6, 1048576, {(32, 8): CURVES[32, 8]})[0]
    best = rank(2.6, 1048576, CURVES)[0]
    assert best.memory < at_full.memory and best.flops < at_full.flops


def test_fewer_kv_heads_cost_less_at_equal_loss() -> None:
    same = {(8, g): TRUE for g in (1, 2, 4, 8)}
    assert [p.num_kv_heads for p in rank(2.6, 4096, same)] == [1, 2, 4, 8]


def test_pairs_out_of_reach_are_left_out() -> None:
    curves = {(2, 1): Curve(1e8, 0.3, 2.5), (4, 1): Curve(1e9, 0.3, 1.5)}
    assert [p[:2] for p in rank(2.4, 100, curves)] == [(4, 1)]


def test_depth() -> None:
    assert depth_of(12 * 128**2 * 20**3) == pytest.approx(20)
    table = [(1e6, 4), (1e8, 16), (1e9, 24)]
    assert [depth_of(n, table) for n in (1e6, 1e7, 1e8, 1e9)] == pytest.approx([4, 8, 16, 24])
    assert depth_of(1e4, table) == pytest.approx(1) and depth_of(1e10, table) == pytest.approx(36)


@pytest.mark.parametrize(
    "run, field, value",
    [
        (lambda: fit([1e6, 2e6], [3.0, 2.0]), "sizes", "2 losses"),
        (lambda: fit([1e6, 2e6, 0], [3.0, 2.0, 1.0]), "sizes", "got 0"),
        (lambda: fit([1e6, 2e6, 4e6], [3.0, 2.0, -1.0]), "losses", "-1.0"),
        (lambda: fit(SIZES, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), "losses", "6.0"),
        (lambda: plan(2.6, -1, CURVES), "T", "-1"),
        (lambda: plan(2.6, 1, CURVES, lam=1.5), "lam", "1.5"),
        (lambda: plan(2.6, 1, CURVES, head_dim=0), "head_dim", "0"),
        (lambda: plan(2.6, 1, CURVES, exponents=(0.5, 0.0)), "exponents", "0.0"),
        (lambda: plan(2.6, 1, CURVES, depth=[]), "depth", "[]"),
        (lambda: plan(2.6, 1, {(4, 3): TRUE}), "curves", "G=3"),
        (lambda: plan(1.7, 1, CURVES), "target_loss", "1.7"),
    ],
)
def test_refused(run, field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: ") as caught:
        run()
    assert value in str(caught.value)
