"""`ops.attention` and the mask descriptors, against a brute-force loop in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnzoo.attention.stages.mask import Both, Causal, Either, Mask, Sinks, Window, band
from attnzoo.attention.timeline import Axis
from attnzoo.ops import Keys, attention
from attnzoo.ops.attention import LEAST_RECOMPUTED, computed_pairs

MASKS = [
    Causal(),
    band(1),
    band(7),
    band(7, 3),
    band(50, 4),
    Causal() & Window(9),
    Causal() & (Window(3) | Sinks(5)),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(q: Tensor, k: Tensor, v: Tensor, visible, scale: float) -> Tensor:
    """One query, one head, one key at a time; ``visible(b, i, j)``."""
    B, H, T, _ = q.shape
    out = torch.zeros(B, H, T, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = [j for j in range(k.shape[2]) if visible(b, i, j)]
                if not seen:
                    continue
                kg, vg = k[b, h * k.shape[1] // H], v[b, h * v.shape[1] // H]
                e = torch.tensor([math.exp(float(q[b, h, i] @ kg[j]) * scale) for j in seen], dtype=q.dtype)
                out[b, h, i] = (e / e.sum()) @ vg[seen]
    return out


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_equals_brute_force(mask: Mask, impl: str) -> None:
    q, k, v = draw(1, 4, 19, 6), draw(1, 2, 19, 6, seed=1), draw(1, 2, 19, 5, seed=2)
    table = mask.dense(19)
    want = brute(q, k, v, lambda b, i, j: bool(table[i, j]), 0.3)
    got = attention(q, Keys(k, v), mask=mask, scale=0.3, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [band(7), band(40, 3), band(130), Causal()], ids=str)
def test_long_runs_in_pieces_equal_one_dense_read(mask: Mask) -> None:
    """Banded and chunked paths, T far above their chunk, also where the keys began earlier than the
    queries.
    """
    T, S = 401, 523
    q, k, v = draw(2, 2, T, 4), draw(2, 2, S, 4, seed=1), draw(2, 2, S, 4, seed=2)
    table = mask.dense(T, S)
    s = (q @ k.mT / 2).masked_fill(~table, float("-inf"))
    want = s.softmax(-1) @ v
    for impl in ("sdpa", "reference"):
        got = attention(q, Keys(k, v), mask=mask, impl=impl)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_documents_do_not_mix(mask: Mask, impl: str) -> None:
    sizes = (5, 1, 300, 94)
    order = torch.cat([torch.arange(n) for n in sizes])[None]
    doc = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))[None]
    q, k, v = draw(1, 2, 400, 4), draw(1, 2, 400, 4, seed=1), draw(1, 2, 400, 4, seed=2)
    axis = Axis(order, doc)
    got = attention(q, Keys(k, v, axis), mask=mask, query=axis, impl=impl)
    for d in range(4):
        own = (doc[0] == d).nonzero()[:, 0]
        alone = attention(q[:, :, own], Keys(k[:, :, own], v[:, :, own]), mask=mask, impl="reference")
        torch.testing.assert_close(got[:, :, own], alone, rtol=1e-11, atol=1e-11)


def test_several_sets_are_one_softmax() -> None:
    q, k, v = draw(2, 4, 9, 4), draw(2, 2, 9, 4, seed=1), draw(2, 2, 9, 4, seed=2)
    whole = attention(q, Keys(k, v), mask=Causal())
    places = torch.arange(9)[None]
    sets = [
        Keys(k[:, :, part], v[:, :, part], Axis(places[:, part], None)) for part in (slice(0, 4), slice(4, 9))
    ]
    query = Axis(places, None)
    torch.testing.assert_close(attention(q, *sets, mask=Causal(), query=query), whole, rtol=1e-12, atol=1e-12)
    near, far = Causal() & Window(3), Causal()
    got = attention(q, (sets[0], far), (sets[1], near), query=query)
    want = brute(q, k, v, lambda b, i, j: j <= i and (j < 4 or i - j < 3), 0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_also_returns_weights_and_lse() -> None:
    q, k, v = draw(1, 2, 200, 4), draw(1, 2, 200, 4, seed=1), draw(1, 2, 200, 4, seed=2)
    o, more = attention(q, Keys(k, v), mask=band(20), also=("p", "lse"))
    s = (q @ k.mT / 2).masked_fill(~band(20).dense(200), float("-inf"))
    torch.testing.assert_close(more["p"], s.softmax(-1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(more["lse"], s.logsumexp(-1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(o, more["p"] @ v, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_head_maps(impl: str) -> None:
    q, k, v = draw(1, 4, 7, 4), draw(1, 3, 7, 4, seed=1), draw(1, 2, 7, 4, seed=2)
    k_map, v_map = torch.tensor([2, 0, 1, 2]), torch.tensor([1, 1, 0, 0])
    got = attention(q, Keys(k, v, k_map=k_map, v_map=v_map), impl=impl)
    want = brute(q, k[:, k_map], v[:, v_map], lambda b, i, j: j <= i, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_know_themselves(mask: Mask) -> None:
    T = 64
    table = mask.dense(T)
    assert mask.pairs(T) == int(table.sum())
    assert mask.causal and not table.triu(1).any()
    assert computed_pairs(mask, T, "reference") >= mask.pairs(T)
    retain = mask.retain()
    if retain is None:
        assert table[-1].all()
        return
    for i in range(T):
        kept = {j for j in range(i + 1) if j < retain.sinks or i - j < retain.window}
        assert set(table[i].nonzero()[:, 0].tolist()) <= kept
    for j in range(T):  # once dropped, never used again
        column = table[j:, j].int()
        assert (column.diff() <= 0).all()


def test_window_row_counts() -> None:
    """min(i + 1, w + min(n_sink, max(0, i + 1 - w))), the spec of sliding windows with sinks."""
    for w, n in ((1, 0), (5, 2), (3, 4)):
        rows = band(w, n).dense(20).sum(1)
        want = [min(i + 1, w + min(n, max(0, i + 1 - w))) for i in range(20)]
        assert rows.tolist() == want


def test_combinations() -> None:
    a, b = Window(4), Sinks(2)
    assert isinstance(a & b, Both) and isinstance(a | b, Either)
    assert torch.equal((a & b).dense(9), a.dense(9) & b.dense(9))
    assert torch.equal((a | b).dense(9), a.dense(9) | b.dense(9))
    mod = band(4, 2).mask_mod()
    table = band(4, 2).dense(9)
    assert all(
        bool(mod(0, 0, torch.tensor(i), torch.tensor(j))) == bool(table[i, j])
        for i in range(9)
        for j in range(9)
    )


def test_rows_that_see_nothing_are_zero() -> None:
    q, k, v = draw(1, 1, 3, 4).requires_grad_(), draw(1, 1, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    query, key = (
        Axis(torch.arange(3)[None], torch.tensor([[0, 0, 1]])),
        Axis(torch.arange(3)[None], torch.tensor([[0, 0, 0]])),
    )
    o = attention(q, Keys(k, v, key, aligned=False), query=query, impl="reference")
    assert bool((o[0, 0, 2] == 0).all()) and bool(o.isfinite().all())
    (grad,) = torch.autograd.grad(o.sum(), q)
    assert bool(grad.isfinite().all()) and bool((grad[0, 0, 2] == 0).all())


@pytest.mark.parametrize(
    "window, n_sink, field", [(0, 0, "window"), (-1, 0, "window"), (4, -1, "n_sink"), (None, 2, "n_sink")]
)
def test_bad_bands(window: int | None, n_sink: int, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        band(window, n_sink)


def test_long_rows_are_recomputed_not_kept() -> None:
    """Gradients that come from scores made again are those of dense scores."""
    T = LEAST_RECOMPUTED + 40
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, T, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    o = attention(q, Keys(k, v), impl="reference")
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    dense = (q @ k.mT / 2).masked_fill(hidden, float("-inf")).softmax(-1) @ v
    do = torch.randn(o.shape, generator=g, dtype=torch.float64)
    found, expected = (torch.autograd.grad(y, (q, k, v), do) for y in (o, dense))
    for a, b in zip((o, *found), (dense, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
