"""alpha-entmax: the reference against closed forms and gradcheck, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.entmax import entmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def sorted_sparsemax(z: Tensor) -> Tensor:
    """Martins & Astudillo, arXiv 1602.02068, algorithm 1."""
    ordered = z.sort(-1, descending=True).values
    total = ordered.cumsum(-1) - 1
    k = torch.arange(1, z.shape[-1] + 1, device=z.device)
    size = (ordered * k > total).sum(-1, keepdim=True)
    return (z - total.gather(-1, size - 1) / size).clamp_min(0)


def sorted_entmax15(z: Tensor) -> Tensor:
    """Peters et al., arXiv 1905.05702, algorithm 2."""
    ordered = (z / 2).sort(-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1, device=z.device)
    mean, square = ordered.cumsum(-1) / k, (ordered**2).cumsum(-1) / k
    tau = mean - ((1 - k * (square - mean**2)) / k).clamp_min(0).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    return (z / 2 - tau.gather(-1, size - 1)).clamp_min(0) ** 2


@pytest.mark.parametrize("S", [1, 2, 17, 300])
@pytest.mark.parametrize(("alpha", "exact"), [(2.0, sorted_sparsemax), (1.5, sorted_entmax15)])
def test_reference_matches_sorting(alpha: float, exact, S: int) -> None:
    z = 3 * draw(2, 3, 4, S)
    torch.testing.assert_close(entmax(z, alpha, impl="reference"), exact(z), rtol=0, atol=1e-12)


def test_near_one_is_softmax() -> None:
    z = draw(1, 2, 3, 9)
    torch.testing.assert_close(entmax(z, 1.0001, impl="reference"), z.softmax(-1), rtol=0, atol=1e-3)


def test_every_row_satisfies_the_definition() -> None:
    z, alpha = draw(2, 3, 4, 30), torch.tensor([1.05, 1.3, 1.9], dtype=torch.float64, device=DEVICE)
    p = entmax(z, alpha, impl="reference")
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 4, dtype=p.dtype, device=DEVICE))
    less = alpha[:, None, None] - 1
    tau = less * z - p**less
    inside = torch.where(p > 0, tau, torch.nan)
    spread = (inside - inside.nanmean(-1, keepdim=True))[p > 0]
    assert spread.abs().max() < 1e-11
    assert ((less * z <= inside.nanmean(-1, keepdim=True) + 1e-11) | (p > 0)).all()


def test_gradcheck_of_the_reference() -> None:
    z = draw(2, 3, 2, 7).requires_grad_()
    alpha = torch.tensor([1.2, 1.5, 1.8], dtype=torch.float64, device=DEVICE, requires_grad=True)
    visible = draw(1, 3, 2, 7, seed=1) > -0.5
    visible[0, 1, 1] = False
    assert torch.autograd.gradcheck(lambda z, a: entmax(z, a, visible, impl="reference"), (z, alpha))


def test_reference_in_chunks(monkeypatch) -> None:
    import attnzoo_kernels.entmax.reference as reference

    z, visible = draw(2, 2, 5, 7), draw(2, 1, 5, 7, seed=1) > 0
    whole = entmax(z, 1.5, visible, impl="reference")
    monkeypatch.setattr(reference, "CHUNK", 30)
    assert torch.equal(entmax(z, 1.5, visible, impl="reference"), whole)


def run(impl: str, z: Tensor, alpha: Tensor, visible: Tensor | None, weight: Tensor) -> list[Tensor]:
    z, alpha = z.clone().requires_grad_(), alpha.clone().requires_grad_()
    p = entmax(z, alpha, visible, impl=impl)
    return [p.detach(), *torch.autograd.grad(p, (z, alpha), weight)]


def compare(z: Tensor, alpha: Tensor, visible: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    weight = draw(*z.shape, seed=9, dtype=dtype)
    z, alpha = z.to(dtype), alpha.to(torch.float32)
    exact = run("reference", z.double(), alpha.double(), visible, weight.double())
    got = run("triton", z, alpha, visible, weight)
    same = run("reference", z, alpha, visible, weight)
    # dalpha sums dz (ln p)^2 / 2, at most, over p as it was rounded when stored
    terms = (exact[1].abs() * exact[0].clamp(min=1e-300).log().square() / 2).sum((0, 2, 3)).max().item()
    bands = (0.0, 0.0, terms * torch.finfo(dtype).eps / 2)
    for name, band, *results in zip(("p", "dz", "dalpha"), bands, got, same, exact, strict=True):
        assert_within(name, *results, band=band)
    if visible is not None:
        assert (got[0].masked_select(~visible.expand_as(z)) == 0).all()


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.entmax.ops as ops

    monkeypatch.setattr(
        ops, "_empty", lambda like, shape, dtype: like.new_full(shape, torch.nan, dtype=dtype)
    )


ALPHA = torch.tensor([1.2, 1.5, 2.0], dtype=torch.float64, device=DEVICE)


@needs_triton
@pytest.mark.parametrize("shape", [(2, 3, 5, 37), (1, 3, 1, 1), (1, 3, 2, 129), (1, 3, 1, 2500)])
def test_kernels(poison, shape: tuple[int, ...]) -> None:
    compare(2 * draw(*shape), ALPHA, None)


@needs_triton
@pytest.mark.parametrize(("b", "h"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_kernels_where_visible(poison, b: int, h: int) -> None:
    visible = draw(b, h, 4, 21, seed=3) > 0
    visible[:, :, 2] = False
    compare(draw(2, 3, 4, 21), ALPHA, visible)


@needs_triton
def test_rows_longer_than_registers(poison, monkeypatch) -> None:
    import attnzoo_kernels.entmax.kernel as kernel

    monkeypatch.setattr(kernel, "WHOLE", 64)
    visible = draw(1, 1, 2, 4500, seed=3) > 0
    visible[:, :, 1] = False
    compare(draw(1, 3, 2, 4500), ALPHA, None)
    compare(draw(1, 3, 2, 4500), ALPHA, visible)


@needs_triton
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_per_program(poison, monkeypatch, rows: int) -> None:
    import attnzoo_kernels.entmax.kernel as kernel

    tile = launch.Tile({"ROWS": rows})
    monkeypatch.setattr(launch.tuner, "pick", lambda k, *_: tile if k is kernel.SHORT_ROWS else k.tiles[0])
    compare(draw(1, 3, 3, 19), ALPHA, draw(1, 3, 3, 19, seed=2) > 0)


@needs_triton
def test_strided_scores(poison) -> None:
    z = draw(1, 5, 3, 12, dtype=torch.float32).transpose(1, 2)
    torch.testing.assert_close(entmax(z, 1.5, impl="triton"), entmax(z, 1.5, impl="reference"))
    z, visible = z.transpose(2, 3), (draw(1, 1, 5, 12, seed=1) > 0).transpose(2, 3)
    got = entmax(z, 1.5, visible, impl="triton")
    torch.testing.assert_close(got, entmax(z, 1.5, visible, impl="reference"))


@needs_triton
@pytest.mark.parametrize("scale", [1e-3, 1e4, 1e30])
def test_extreme_scores(poison, scale: float) -> None:
    compare(scale * draw(1, 3, 2, 33), ALPHA, None)


@needs_triton
def test_equal_scores(poison) -> None:
    z = torch.full((1, 3, 2, 33), 1e4, device=DEVICE)
    p, dz, dalpha = run("triton", z, ALPHA.float(), None, draw(1, 3, 2, 33, dtype=torch.float32))
    torch.testing.assert_close(p, torch.full_like(p, 1 / 33))
    assert dz.sum(-1).abs().max() < 1e-5
    assert dalpha.abs().max() < 1e-4


@needs_triton
def test_nan_shows() -> None:
    from attnzoo_kernels.entmax.ops import entmax_forward

    z, alpha = draw(1, 2, 2, 9, dtype=torch.float32), torch.tensor([1.5, torch.nan], device=DEVICE)
    p = entmax_forward(z, alpha, None, 24)
    assert torch.isfinite(p[:, 0]).all()
    assert torch.isnan(p[:, 1]).all()


@needs_triton
def test_low_alpha(poison) -> None:
    compare(draw(1, 3, 2, 33), torch.tensor([1.01, 1.02, 1.05], device=DEVICE), None)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_half_precision(poison, dtype: torch.dtype) -> None:
    """Gradients from the same p: its rounding moves them by more than the kernels do."""
    from attnzoo_kernels.entmax.ops import entmax_backward
    from attnzoo_kernels.entmax.reference import gradients

    z, g, alpha = draw(1, 3, 3, 40, dtype=dtype), draw(1, 3, 3, 40, seed=9, dtype=dtype), ALPHA.float()
    p = entmax(z, alpha, impl="triton")
    exact = entmax(z.double(), alpha.double(), impl="reference")
    assert_within("p", p, entmax(z, alpha, impl="reference"), exact)
    exact = gradients(g.double(), p.double(), ALPHA.float().double()[:, None, None])
    same = gradients(g.float(), p.float(), alpha[:, None, None])
    for name, got, *others in zip(("dz", "dalpha"), entmax_backward(g, p, alpha), same, exact, strict=True):
        assert_within(name, got, *others)


@needs_triton
def test_opcheck() -> None:
    from attnzoo_kernels.entmax.ops import entmax_backward, entmax_forward

    z = draw(1, 2, 2, 9, dtype=torch.float32).requires_grad_()
    alpha = torch.tensor([1.3, 1.7], device=DEVICE, requires_grad=True)
    torch.library.opcheck(entmax_forward, (z, alpha, z.detach() > 0, 8))
    torch.library.opcheck(entmax_backward, (z.detach(), z.detach().softmax(-1), alpha.detach()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 3)}, "scores: needs shape"),
        ({"scores": torch.zeros(1, 2, 3, 4, dtype=torch.int32)}, "scores: needs a floating"),
        ({"alpha": 1.0}, "alpha: needs to be above 1"),
        ({"alpha": 2.5}, "at most 2, got 2.5"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": torch.tensor([1.5, 1.0])}, "alpha: needs to be above 1"),
        ({"alpha": torch.tensor([1.5])}, "alpha: needs shape"),
        ({"visible": torch.ones(1, 1, 3, 4)}, "visible: needs dtype bool"),
        ({"visible": torch.ones(1, 1, 1, 4, dtype=torch.bool)}, "visible: needs shape"),
        ({"n_iter": 0}, "n_iter: needs an integer"),
        ({"impl": "cuda"}, "impl: needs one of"),
        ({"scores": torch.zeros(1, 2, 3, 4, dtype=torch.float64), "impl": "triton"}, "cannot run entmax"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entmax(**({"scores": torch.zeros(1, 2, 3, 4), "alpha": 1.5} | change))
