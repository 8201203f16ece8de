"""The gated norm: the reference against formulas and gradcheck, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.norm_gate import norm_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def operands(*shape: int, gate: bool = True) -> list[Tensor | None]:
    return [draw(*shape), 1 + draw(shape[-1], seed=1) / 2, 2 * draw(*shape, seed=2) if gate else None]


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("shape", [(7,), (3, 1), (2, 3, 5, 16)])
def test_reference_matches_a_loop(shape: tuple[int, ...], activation: str) -> None:
    o, gain, gate = operands(*shape)
    d = shape[-1]
    exact = torch.zeros_like(o).reshape(-1, d)
    for i, (x, z) in enumerate(zip(o.reshape(-1, d).tolist(), gate.reshape(-1, d).tolist(), strict=True)):
        root = (sum(v * v for v in x) / d + 0.01) ** 0.5
        for c in range(d):
            sigmoid = torch.tensor(z[c], dtype=torch.float64).neg().exp().add(1).reciprocal().item()
            act = sigmoid * z[c] if activation == "silu" else sigmoid
            exact[i, c] = x[c] / root * gain[c] * act
    got = norm_gate(o, gain, gate, activation=activation, eps=0.01, impl="reference")
    torch.testing.assert_close(got, exact.reshape(shape), rtol=0, atol=1e-12)


def test_reference_without_a_gate() -> None:
    o, gain, _ = operands(2, 3, 9, gate=False)
    exact = torch.nn.functional.rms_norm(o, (9,), gain, 1e-6)
    torch.testing.assert_close(norm_gate(o, gain, impl="reference"), exact)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gradcheck_of_the_reference(activation: str) -> None:
    leaves = [z.requires_grad_() for z in operands(2, 3, 5)]
    assert torch.autograd.gradcheck(
        lambda *given: norm_gate(*given, activation=activation, impl="reference"), leaves
    )


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.norm_gate.ops as ops

    plain = ops._empty
    monkeypatch.setattr(ops, "_empty", lambda *args: plain(*args).fill_(torch.nan))


def run(impl: str, given: list[Tensor | None], activation: str, eps: float, by_y: Tensor) -> list[Tensor]:
    leaves = [None if z is None else z.detach().requires_grad_() for z in given]
    y = norm_gate(*leaves, activation=activation, eps=eps, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, [z for z in leaves if z is not None], by_y)]


def compare(
    given: list[Tensor | None],
    activation: str = "silu",
    eps: float = 1e-6,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3,
) -> None:
    """``dtypes`` of o, gain and gate."""
    given = [None if z is None else z.to(dtype) for z, dtype in zip(given, dtypes, strict=True)]
    by_y = draw(*given[0].shape, seed=9, dtype=dtypes[0])
    wide = [None if z is None else z.double() for z in given]
    exact = run("reference", wide, activation, eps, by_y.double())
    got = run("triton", given, activation, eps, by_y)
    same = run("reference", given, activation, eps, by_y)
    names = ("y", "do", "dgain", "dgate") if given[2] is not None else ("y", "do", "dgain")
    for name, *results in zip(names, got, same, exact, strict=True):
        assert results[0].dtype == results[1].dtype
        assert_within(name, *results)


@needs_triton
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (5,), (3, 16), (1, 2, 7, 32), (2, 3, 5, 64), (2, 1, 9, 2, 3, 128), (2, 5, 192), (3, 1024)],
)
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_kernels(poison, shape: tuple[int, ...], activation: str) -> None:
    compare(operands(*shape), activation)
    compare(operands(*shape, gate=False), activation, eps=0.1)


@needs_triton
def test_more_rows_than_programs(poison, monkeypatch) -> None:
    import attnzoo_kernels.norm_gate.ops as ops

    monkeypatch.setattr(ops, "PROGRAMS", 2)
    compare(operands(3, 37, 70))


@needs_triton
@pytest.mark.parametrize("block", [64, 128, 512])
def test_blocks(poison, monkeypatch, block: int) -> None:
    monkeypatch.setattr(launch.tuner, "pick", lambda *_: launch.Tile({"BLOCK": block}))
    compare(operands(2, 5, 3, 60))


@needs_triton
@pytest.mark.parametrize("scale", [0.0, 1e-10, 1e4, 1e15])
def test_extreme_values(poison, scale: float) -> None:
    o, gain, gate = operands(2, 7, 20)
    compare([scale * o, gain, gate])
    compare([o, gain, min(scale, 1e4) * gate])


@needs_triton
def test_no_eps_and_rows_past_the_end(poison) -> None:
    compare(operands(3, 20), eps=0.0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_half_precision(poison, dtype: torch.dtype, activation: str) -> None:
    compare(operands(2, 3, 9, 40), activation, dtypes=(dtype, torch.float32, dtype))
    compare(operands(2, 3, 9, 40), activation, dtypes=(torch.float32, dtype, dtype))


@needs_triton
def test_strides_are_kept(poison) -> None:
    wide, gain = draw(2, 5, 3, 40, dtype=torch.float32), operands(16)[1].float()
    head, gate = wide[..., 8:24].transpose(1, 2), wide[..., 24:].transpose(1, 2)
    views = [
        head,
        head.flip(-1).transpose(2, 3)[..., :1].expand(-1, -1, -1, 5).mT.mT,
        head[:, 0].mT.contiguous().mT,
    ]
    for o in views:
        gain_of, gates = gain[: o.shape[-1]], gate if o is head else None
        got, same = (run(i, [o, gain_of, gates], "silu", 1e-6, 2 * o) for i in ("triton", "reference"))
        for a, b in zip(got, same, strict=True):
            torch.testing.assert_close(a, b)
    dense = wide.transpose(1, 2)
    assert norm_gate(dense, wide[0, 0, 0].clone(), impl="triton").stride() == dense.stride()


@needs_triton
def test_expanded_gradient() -> None:
    o, gain, gate = (z.float() for z in operands(2, 4, 12))
    o.requires_grad_()
    got, same = (
        torch.autograd.grad(norm_gate(o, gain, gate, impl=impl).sum(), o)[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(got, same)


@needs_triton
def test_opcheck() -> None:
    from attnzoo_kernels.norm_gate.ops import norm_gate_backward, norm_gate_forward

    given = [z.float().requires_grad_() for z in operands(2, 3, 4, 12)]
    plain = [z.detach() for z in given]
    torch.library.opcheck(norm_gate_forward, (*given, True, 1e-6))
    torch.library.opcheck(norm_gate_forward, (given[0].detach().transpose(1, 2), plain[1], None, False, 1e-6))
    torch.library.opcheck(norm_gate_backward, (plain[0], *plain, False, 1e-6))
    torch.library.opcheck(norm_gate_backward, (plain[0], *plain[:2], None, True, 1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"o": torch.tensor(1.0)}, "o: needs shape"),
        ({"o": torch.zeros(2, 0)}, "o: needs shape"),
        ({"o": torch.zeros(2, 4, dtype=torch.int32)}, "o: needs a floating"),
        ({"o": torch.zeros(2, 1025)}, "o: needs a last axis of at most 1024, got 1025"),
        ({"gain": torch.zeros(3)}, "gain: needs shape"),
        ({"gate": torch.zeros(2, 1)}, "gate: needs shape"),
        ({"activation": "relu"}, "activation: needs one of silu, sigmoid"),
        ({"eps": -1e-6}, "eps: needs a finite"),
        ({"eps": float("nan")}, "eps: needs a finite"),
        ({"impl": "cuda"}, "impl: needs one of"),
        ({"o": torch.zeros(2, 4, dtype=torch.float64), "impl": "triton"}, "cannot run norm_gate"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_gate(**({"o": torch.zeros(2, 4), "gain": torch.zeros(4)} | change))
