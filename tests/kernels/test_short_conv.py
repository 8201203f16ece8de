"""The short convolution: the reference against a loop and gradcheck, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.short_conv import short_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def ages(T: int, starts: list[list[int]], held: int = 0) -> Tensor:
    """(B,T) places in documents that start at the given tokens, ``held`` tokens of the first before x."""
    rows = []
    for first in starts:
        row, count = [], held
        for t in range(T):
            count = 0 if t in first else count
            row.append(count)
            count += 1
        rows.append(row)
    return torch.tensor(rows, device=DEVICE)


def operands(B: int, T: int, C: int, n: int, bias: bool = True, tail: bool = True) -> list[Tensor | None]:
    return [
        draw(B, T, C),
        draw(C, n, seed=1),
        draw(C, seed=2) if bias else None,
        draw(B, n - 1, C, seed=3) if tail and n > 1 else None,
    ]


def looped(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, order: Tensor | None
) -> Tensor:
    (B, T, _), n = x.shape, weight.shape[1]
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            for m in range(n):
                back = n - 1 - m
                if order is not None and back > order[b % len(order), t]:
                    continue
                at = t - back
                if at >= 0:
                    y[b, t] += weight[:, m] * x[b, at]
                elif tail is not None:
                    y[b, t] += weight[:, m] * tail[b, n - 1 + at]
    return y if bias is None else y + bias


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_reference_matches_a_loop(T: int, n: int) -> None:
    x, weight, bias, tail = operands(2, T, 3, n)
    for order in (None, ages(T, [[], [0]], held=2), ages(T, [[0, 4]])):
        for state in (None, tail):
            exact = looped(x, weight, bias, state, order)
            got = short_conv(x, weight, bias, tail=state, order=order, impl="reference")
            torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
            got = short_conv(x, weight, bias, tail=state, order=order, activation="silu", impl="reference")
            torch.testing.assert_close(got, exact * exact.sigmoid(), rtol=0, atol=1e-12)


def test_reference_matches_conv1d() -> None:
    x, weight, bias, _ = operands(2, 9, 5, 4)
    both = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    exact = torch.nn.functional.conv1d(both, weight[:, None], bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(short_conv(x, weight, bias, impl="reference"), exact)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck_of_the_reference(activation: str | None) -> None:
    leaves = [z.requires_grad_() for z in operands(2, 5, 3, 3)]
    order = ages(5, [[0, 3], [2]], held=1)

    def run(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor) -> Tensor:
        return short_conv(x, weight, bias, activation=activation, tail=tail, order=order, impl="reference")

    assert torch.autograd.gradcheck(run, leaves)


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.short_conv.ops as ops

    monkeypatch.setattr(
        ops, "_empty", lambda like, shape, dtype: like.new_full(shape, torch.nan, dtype=dtype)
    )


def run(impl: str, given: list[Tensor | None], order: Tensor | None, activation: str | None, by_y: Tensor):
    leaves = [None if z is None else z.detach().clone().requires_grad_() for z in given]
    x, weight, bias, tail = leaves
    y = short_conv(x, weight, bias, activation=activation, tail=tail, order=order, impl=impl)
    held = [z for z in leaves if z is not None]
    return [y.detach(), *torch.autograd.grad(y, held, by_y)]


def compare(
    given: list[Tensor | None],
    order: Tensor | None = None,
    activation: str | None = "silu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Weights and bias stay in fp32, as a model keeps them, whatever x's dtype."""
    kinds = (dtype, torch.float32, torch.float32, dtype)
    given = [None if z is None else z.to(kind) for z, kind in zip(given, kinds, strict=True)]
    by_y = draw(*given[0].shape, seed=9, dtype=dtype)
    wide = [None if z is None else z.double() for z in given]
    exact = run("reference", wide, order, activation, by_y.double())
    got = run("triton", given, order, activation, by_y)
    same = run("reference", given, order, activation, by_y)
    held = [name for name, z in zip(("dx", "dweight", "dbias", "dtail"), given, strict=True) if z is not None]
    for name, *results in zip(("y", *held), got, same, exact, strict=True):
        assert results[0].dtype == results[1].dtype
        assert_within(name, *results)


@needs_triton
@pytest.mark.parametrize(("T", "C", "n"), [(1, 3, 4), (2, 16, 8), (37, 32, 4), (20, 130, 3), (40, 5, 1)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_kernels(poison, T: int, C: int, n: int, activation: str | None) -> None:
    compare(operands(2, T, C, n), activation=activation)
    compare(operands(1, T, C, n, bias=False, tail=False), activation=activation)


@needs_triton
def test_more_rows_than_a_program_walks(poison) -> None:
    compare(operands(2, 150, 6, 4))


@needs_triton
@pytest.mark.parametrize("n", [2, 4, 8])
def test_documents(poison, n: int) -> None:
    starts = [[0, 5, 6, 31, 33], [7, 32]]
    compare(operands(2, 41, 20, n), ages(41, starts, held=3))
    compare(operands(2, 41, 20, n), ages(41, starts[1:], held=1).int(), activation=None)


@needs_triton
@pytest.mark.parametrize(("groups", "length", "width"), [(1, 4, 16), (2, 3, 32), (4, 1, 16), (2, 16, 64)])
def test_walks(poison, monkeypatch, groups: int, length: int, width: int) -> None:
    """Stretches shorter than the taps reach, at odd places."""
    import attnzoo_kernels.short_conv.kernel as kernel

    walk = launch.Tile({"GROUPS": groups, "LENGTH": length, "BLOCK_C": width})
    monkeypatch.setattr(launch.tuner, "pick", lambda k, *_: walk if k is kernel.BACKWARD else k.tiles[1])
    compare(operands(2, 19, 33, 4), ages(19, [[0, 3, 12], [8]], held=2))
    compare(operands(1, 5, 33, 8))


@needs_triton
def test_documents_do_not_touch(poison) -> None:
    """What is not finite in one document shows in no other, forward or backward."""
    x, weight, _, _ = (None if z is None else z.float() for z in operands(1, 12, 8, 4))
    order = ages(12, [[0, 5]])
    clean = run("triton", [x, weight, None, None], order, "silu", torch.ones_like(x))
    x[:, :5] = torch.nan
    dirty = run("triton", [x, weight, None, None], order, "silu", torch.ones_like(x))
    for a, b in zip(clean[:2], dirty[:2], strict=True):
        assert torch.equal(a[:, 5:], b[:, 5:])
    assert torch.isnan(dirty[0][:, :5]).all()


@needs_triton
@pytest.mark.parametrize("scale", [1e-20, 50.0, 1e4])
def test_extreme_values(poison, scale: float) -> None:
    x, *others = operands(1, 9, 12, 4)
    compare([scale * x, *others])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(poison, dtype: torch.dtype) -> None:
    compare(operands(2, 37, 20, 4), ages(37, [[0, 9, 30], [3]], held=2), dtype=dtype)


@needs_triton
def test_strides(poison) -> None:
    wide = draw(2, 3, 2, 9, 24, dtype=torch.float32)
    weight = draw(8, 4, seed=1, dtype=torch.float32)
    order = ages(9, [[0, 4], [2]]).t().contiguous().t()
    for x in (wide[:, 1, 0, :, 8:16], wide[:, :, 0, 2, 3:11], wide[0, :2, :, :, 1].transpose(0, 1)[..., :8]):
        x = x.detach().requires_grad_()
        cuts = order[:, : x.shape[1]]
        got, same = (short_conv(x, weight, order=cuts, impl=impl) for impl in ("triton", "reference"))
        torch.testing.assert_close(got, same)
        got, same = (torch.autograd.grad(y.transpose(1, 2).square().sum(), x)[0] for y in (got, same))
        torch.testing.assert_close(got, same)


@needs_triton
def test_expanded_gradient() -> None:
    x, weight, _, _ = operands(1, 6, 8, 4)
    x, weight = x.float().requires_grad_(), weight.float()
    got, same = (
        torch.autograd.grad(short_conv(x, weight, impl=impl).sum(), x)[0] for impl in ("triton", "reference")
    )
    torch.testing.assert_close(got, same)


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("sizes", [[5, 1, 1, 3], [1, 1, 1, 7], [2, 8]])
def test_decoding_in_pieces(impl: str, sizes: list[int]) -> None:
    x, weight, bias, _ = (None if z is None else z.float() for z in operands(2, 10, 6, 5, tail=False))
    order = ages(10, [[0, 4], [0, 7, 8]])
    whole = short_conv(x, weight, bias, order=order, activation="silu", impl="reference")
    tail, start, pieces = None, 0, []
    for size in sizes:
        part = slice(start, start + size)
        y, tail = short_conv(
            x[:, part], weight, bias, tail=tail, order=order[:, part], activation="silu",
            return_tail=True, impl=impl,
        )  # fmt: skip
        assert tail.shape == (2, 4, 6)
        pieces.append(y)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert torch.equal(tail, x[:, 6:])


def test_tail_of_one_tap_and_its_gradient() -> None:
    x, weight, _, tail = operands(1, 2, 3, 4)
    y, none = short_conv(x, weight[:, :1], tail=tail[:, :0], return_tail=True)
    assert none.shape == (1, 0, 3)
    torch.testing.assert_close(y, x * weight[:, 0])
    x.requires_grad_()
    tail.requires_grad_()
    _, new = short_conv(x, weight, tail=tail, return_tail=True)
    by_x, by_tail = torch.autograd.grad(new.sum(), (x, tail))
    assert (by_x == 1).all()
    assert by_tail[0, :, 0].tolist() == [0, 0, 1]


@needs_triton
def test_opcheck() -> None:
    from attnzoo_kernels.short_conv.ops import short_conv_backward, short_conv_forward

    given = [z.float().requires_grad_() for z in operands(2, 6, 5, 3)]
    plain = [z.detach() for z in given]
    order = ages(6, [[0, 2], [1]])
    torch.library.opcheck(short_conv_forward, (*given, order, True))
    torch.library.opcheck(short_conv_forward, (*given[:2], None, None, None, False))
    torch.library.opcheck(short_conv_backward, (plain[0], *plain, order, True))
    torch.library.opcheck(short_conv_backward, (plain[0], *plain[:2], None, None, None, False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x: needs shape"),
        ({"x": torch.zeros(2, 0, 4)}, "x: needs shape"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.int32)}, "x: needs a floating"),
        ({"weight": torch.zeros(4, 9)}, "weight: needs shape"),
        ({"weight": torch.zeros(3, 2)}, "weight: needs shape"),
        ({"bias": torch.zeros(3)}, "bias: needs shape"),
        ({"activation": "relu"}, "activation: needs one of"),
        ({"tail": torch.zeros(2, 3, 4)}, "tail: needs shape"),
        ({"tail": torch.zeros(2, 1, 4, dtype=torch.bfloat16)}, "tail: needs x's dtype"),
        ({"order": torch.zeros(2, 3)}, "order: needs dtype"),
        ({"order": torch.zeros(3, 3, dtype=torch.int32)}, "order: needs shape"),
        ({"impl": "cuda"}, "impl: needs one of"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float64), "impl": "triton"}, "cannot run short_conv"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        short_conv(**({"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4, 2)} | change))
