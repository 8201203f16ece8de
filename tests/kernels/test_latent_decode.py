"""Decoding over latents: the reference against a loop over keys, the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.latent_decode import latent_decode
from attnzoo_kernels.span import Span

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def operands(B: int, H: int, S: int, d_c: int, d_r: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """c and k_rope lie side by side in a longer cache whose other rows are NaN."""
    cache = torch.full((B, S + 3, d_c + d_r), torch.nan, dtype=torch.float64, device=DEVICE)
    cache[:, :S] = draw(B, S, d_c + d_r, seed=1)
    c, k_rope = cache[:, :S].split([d_c, d_r], dim=-1)
    return draw(B, H, 1, d_c + d_r), c, k_rope if d_r else None


def column(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)[:, None]


def by_loop(q: Tensor, c: Tensor, k_rope: Tensor | None, span: Span, scale: float) -> Tensor:
    B, H, _, _ = q.shape
    o = q.new_zeros(B, H, 1, c.shape[-1])
    for b in range(B):
        first, own = (int(x[b if x.shape[0] > 1 else 0, 0]) for x in (span.first, span.own))
        keys = [
            j for j in range(first, own + 1)
            if span.window is None or own - j < span.window or j - first < span.n_sink
        ]  # fmt: skip
        for h in range(H):
            total = 0.0
            for j in keys:
                key = c[b, j] if k_rope is None else torch.cat([c[b, j], k_rope[b, j]])
                weight = math.exp(scale * float(q[b, h, 0] @ key))
                o[b, h, 0] += weight * c[b, j]
                total += weight
            o[b, h, 0] /= total or 1.0
    return o


SPANS = {
    "all": Span(column(0), column(36)),
    "rows": Span(column(0, 5), column(36, 20)),
    "window": Span(column(0, 5), column(36, 20), window=9),
    "sinks": Span(column(0, 5), column(36, 20), window=9, n_sink=3),
    "sinks_meet_window": Span(column(0, 15), column(36, 20), window=4, n_sink=4),
    "one": Span(column(36, 0), column(36, 0)),
    "nothing": Span(column(4, 2), column(3, 30)),
}


@pytest.mark.parametrize("name", SPANS)
@pytest.mark.parametrize("d_r", [0, 6])
def test_reference_matches_loop(name: str, d_r: int, monkeypatch) -> None:
    import attnzoo_kernels.latent_decode.reference as reference

    monkeypatch.setattr(reference, "COLUMNS", 10)
    q, c, k_rope = operands(2, 3, 37, 8, d_r)
    got = latent_decode(q, c, k_rope, SPANS[name], scale=0.3, impl="reference")
    torch.testing.assert_close(got, by_loop(q, c, k_rope, SPANS[name], 0.3))


def test_reference_ignores_unwritten_rows() -> None:
    q, c, k_rope = operands(2, 3, 37, 8, 6)
    span = Span(column(0, 5), column(30, 20))
    clean = latent_decode(q, c, k_rope, span, scale=0.3, impl="reference")
    c, k_rope = c.clone(), k_rope.clone()
    c[0, 31:], k_rope[0, 31:], c[1, :5] = torch.nan, torch.nan, torch.nan
    assert torch.equal(latent_decode(q, c, k_rope, span, scale=0.3, impl="reference"), clean)


def test_gradcheck_of_the_reference() -> None:
    given = [x.detach().clone().requires_grad_() for x in operands(2, 2, 7, 4, 2)]
    span = Span(column(0, 3), column(6, 2))
    assert torch.autograd.gradcheck(lambda *x: latent_decode(*x, span, scale=0.5), given)


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.latent_decode.ops as ops

    monkeypatch.setattr(
        ops, "_empty", lambda like, shape, dtype: like.new_full(shape, torch.nan, dtype=dtype)
    )


def compare(given, span: Span, scale: float, dtype: torch.dtype = torch.float32) -> None:
    low = [None if x is None else x.to(dtype) for x in given]
    exact = latent_decode(
        *(None if x is None else x.double() for x in low), span, scale=scale, impl="reference"
    )
    got = latent_decode(*low, span, scale=scale, impl="triton")
    same = latent_decode(*low, span, scale=scale, impl="reference")
    assert_within("o", got, same, exact)


@needs_triton
@pytest.mark.parametrize("name", SPANS)
def test_spans(poison, name: str) -> None:
    compare(operands(2, 3, 37, 16, 8), SPANS[name], 0.2)


@needs_triton
@pytest.mark.parametrize(
    ("H", "S", "d_c", "d_r"),
    [(1, 1, 16, 0), (17, 70, 20, 6), (16, 33, 64, 32), (40, 100, 128, 64), (2, 65, 512, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(poison, H: int, S: int, d_c: int, d_r: int, dtype: torch.dtype) -> None:
    span = Span(column(0, S // 3), column(S - 1, S - 1))
    compare(operands(2, H, S, d_c, d_r), span, (d_c + d_r) ** -0.5, dtype)


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_number_of_splits(poison, monkeypatch, splits: int) -> None:
    import attnzoo_kernels.latent_decode.ops as ops

    monkeypatch.setattr(ops, "_splits", lambda *_: splits)
    compare(operands(2, 3, 150, 16, 8), Span(column(0, 130), column(149, 140)), 0.3)


@needs_triton
def test_every_tile(poison, monkeypatch) -> None:
    import attnzoo_kernels.latent_decode.kernel as kernel

    for tile in kernel.PARTIAL.tiles:
        for last in kernel.MERGE.tiles:
            monkeypatch.setattr(
                launch.tuner, "pick", lambda k, *_, t=tile, m=last: t if k is kernel.PARTIAL else m
            )
            compare(operands(1, 20, 150, 16, 8), Span(column(2), column(147)), 0.3)


@needs_triton
def test_strided_cache(poison) -> None:
    """Slices of one cache and a batch stride that is no multiple of 16; unwritten rows are NaN."""
    cache = torch.full((2, 53, 27), torch.nan, device=DEVICE)
    cache[:, :50] = draw(2, 50, 27).float()
    c, k_rope = cache[..., 3:19], cache[..., 19:27]
    q, span = draw(2, 5, 1, 24, seed=4).float(), Span(column(0), column(49))
    got = latent_decode(q, c, k_rope, span, scale=0.3, impl="triton")
    torch.testing.assert_close(got, latent_decode(q, c, k_rope, span, scale=0.3, impl="reference"))
    apart = latent_decode(q, c.mT.contiguous().mT, k_rope.mT.contiguous().mT, span, scale=0.3, impl="triton")
    torch.testing.assert_close(apart, got)


@needs_triton
@pytest.mark.parametrize("size", [1e-6, 1e3, 1e6])
def test_extreme_scores(poison, size: float) -> None:
    q, c, k_rope = operands(2, 3, 70, 16, 8)
    compare((size * q, c, k_rope), Span(column(0, 3), column(69, 60)), 1.0)


@needs_triton
def test_opcheck_and_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from attnzoo_kernels.latent_decode.ops import latent_decode_forward

    q, c, k_rope = (x.float() for x in operands(2, 3, 20, 16, 8))
    args = (q, c, k_rope, column(0), column(19), 7, 1, 0.3)
    torch.library.opcheck(latent_decode_forward, args)
    with FlopCounterMode(display=False) as counter:
        latent_decode_forward(*args)
    assert counter.get_total_flops() == 2 * 2 * 3 * 8 * (24 + 16)


def test_splits_fill_the_gpu() -> None:
    from attnzoo_kernels.latent_decode.ops import _splits

    cpu = torch.device("cpu")
    for programs in (1, 8, 64, 300):
        assert programs * _splits(programs, 1 << 20, 32, cpu) >= 2 * 132
    assert _splits(1, 100, 32, cpu) == 4


@needs_triton
def test_gradients_are_the_reference_s() -> None:
    q, c, k_rope = (x.float() for x in operands(1, 2, 9, 16, 8))
    q.requires_grad_()
    span = Span(column(0), column(8))
    with pytest.raises(ValueError, match="no gradient; use impl='reference'"):
        latent_decode(q, c, k_rope, span, scale=0.3, impl="triton")
    assert latent_decode(q, c, k_rope, span, scale=0.3).requires_grad
    with torch.no_grad():
        latent_decode(q, c, k_rope, span, scale=0.3, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 3, 24)}, "q: needs shape .*one token"),
        ({"q": torch.zeros(1, 2, 1, 20)}, "q: needs shape"),
        ({"c": torch.zeros(1, 1, 9, 16)}, "c: needs shape .*drop the axis"),
        ({"c": torch.zeros(2, 9, 16)}, "c: needs shape"),
        ({"c": torch.zeros(1, 9, 16).half()}, "c: needs q's dtype"),
        ({"k_rope": torch.zeros(1, 8, 8)}, "k_rope: needs shape"),
        ({"k_rope": None}, "q: needs shape"),
        ({"span": Span(torch.zeros(1, 1), torch.zeros(1, 1))}, "span.first: needs int32"),
        ({"impl": "cuda"}, "impl: needs one of"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    span = Span(torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 8, dtype=torch.int32))
    good = {
        "q": torch.zeros(1, 2, 1, 24),
        "c": torch.zeros(1, 9, 16),
        "k_rope": torch.zeros(1, 9, 8),
        "span": span,
    }
    with pytest.raises(ValueError, match=message):
        latent_decode(**(good | {"scale": 1.0} | change))
