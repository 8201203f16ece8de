"""The scan at its limits: extreme gates, low precision, causality bit by bit, derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from attnzoo_kernels.scan import scan
from scans import CLASSES, Operands, assert_same, error, gradients, make, start


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("none")])
@pytest.mark.parametrize("low", [-50.0, -math.inf])
def test_extreme_gates(name: str, low: float) -> None:
    """Gates of 0, -1e-7 and -50 (or -inf) side by side: finite everywhere and as good as the recurrence."""
    x = make(name, T=101, K=16)
    pick = torch.rand_like(x["g"])
    for below, value in ((0.8, -1e-7), (0.5, 0.0), (0.2, low)):
        x["g"] = torch.where(pick < below, value, x["g"])
    x["initial_state"] = start(x)
    do, dS = torch.randn_like(x["v"]), torch.randn_like(x["initial_state"])
    exact = gradients(x, do, dS, form="recurrent")
    assert_same(gradients(x, do, dS), exact, 1e-10)
    check_rounding({n: v.float() for n, v in x.items()}, do, dS)


def check_rounding(x: Operands, do: torch.Tensor, dS: torch.Tensor) -> None:
    """Error against fp64 within twice that of the recurrence in the same precision and a rounding band.

    The band is one rounding of the result, or of the fp32 work behind it: a random walk over the 64 terms of
    a chunk. The gradient of a constant gate is a difference of sums of q * dq and k * dk, which may cancel to
    nothing (at -50 it is 0) and in which a token's error counts once for every earlier token of its chunk.
    """
    exact = gradients({n: v.double() for n, v in x.items()}, do, dS, form="recurrent")
    same = gradients(x, do, dS, form="recurrent")
    for name, value in gradients(x, do, dS).items():
        assert value.isfinite().all(), name
        scale, terms = exact[name].abs().max().clamp(min=1.0), math.sqrt(64)
        if value.dim() == 1:
            scale, terms = (x["q"] * exact["dq"]).sum(-1).abs().sum((0, 1)).max(), 64
        band = scale * max(torch.finfo(value.dtype).eps, terms * torch.finfo(torch.float32).eps) / 2
        allowed = 2 * ((same[name] - exact[name]).abs().max() + band)
        assert (value - exact[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    x = make(name, T=150, K=16, V=24)
    x = {n: v.to(dtype if n in ("q", "k", "v") else torch.float32) for n, v in x.items()}
    x["initial_state"] = torch.randn(2, 2, 16, 24)
    o, S = scan(**x, output_final_state=True)
    assert (o.dtype, S.dtype) == (dtype, torch.float32)
    check_rounding(x, torch.randn(2, 150, 2, 24).double(), torch.randn(2, 2, 16, 24).double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(**x)[0], o)


def test_repeated_keys_do_not_blow_up() -> None:
    """The same key at beta = 2 flips the state at every token; powers of the matrix would reach 1e18."""
    x = {n: v.float() for n, v in make("none-delta", T=64).items()}
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["beta"] = torch.full_like(x["beta"], 2.0)
    exact, _ = scan(**{n: v.double() for n, v in x.items()}, form="recurrent")
    assert error(scan(**x)[0], exact) < 1e-4


@pytest.mark.parametrize("name", CLASSES)
def test_causal(name: str) -> None:
    x = make(name, B=1, T=21)
    leaves = {n: v.requires_grad_() for n, v in x.items()}
    o, _ = scan(**leaves, chunk_size=8)
    for t in (0, 6, 7, 8, 20):
        grads = torch.autograd.grad(o[:, t].sum(), list(leaves.values()), retain_graph=True)
        for n, grad in zip(leaves, grads, strict=True):
            if grad.dim() > 1:
                assert not grad[:, t + 1 :].any(), n
        later = {n: v.detach() if v.dim() == 1 else v.detach().clone() for n, v in x.items()}
        for value in later.values():
            if value.dim() > 1:
                value[:, t + 1 :] *= 3
        assert torch.equal(scan(**later, chunk_size=8)[0][:, : t + 1], o[:, : t + 1])


@pytest.mark.parametrize("name", CLASSES)
def test_gradcheck(name: str) -> None:
    x = make(name, B=1, T=6, H=1, K=2, V=2)
    x["initial_state"] = start(x)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])

    def call(*values: torch.Tensor, form: dict) -> tuple[torch.Tensor, ...]:
        return scan(**dict(zip(x, values, strict=True)), output_final_state=True, **form)

    for form in ({"chunk_size": 3}, {"chunk_size": 4, "segments": segments}):
        values = [value.requires_grad_() for value in x.values()]
        assert torch.autograd.gradcheck(lambda *v, form=form: call(*v, form=form), values)


@pytest.mark.parametrize("name", CLASSES)
def test_second_derivatives_are_refused(name: str) -> None:
    x = {n: v.requires_grad_() for n, v in make(name).items()}
    with pytest.raises(RuntimeError, match="no second derivatives; use form='recurrent'"):
        torch.autograd.grad(scan(**x)[0].sum(), list(x.values()), create_graph=True)
    torch.autograd.grad(scan(**x, form="recurrent")[0].sum(), list(x.values()), create_graph=True)
