"""Operands of every transition class of the scan, and how two results are compared."""

from __future__ import annotations

import torch

from attnzoo_kernels.scan import scan

Operands = dict[str, torch.Tensor]
# gate, transition and the kind that scan_flops bills
CLASSES = {
    "none": "scalar",
    "constant": "scalar",
    "scalar": "scalar",
    "diagonal": "diagonal",
    "none-delta": "delta",
    "constant-delta": "delta",
    "scalar-delta": "delta",
    "diagonal-delta": "delta_diagonal",
    "none-rank_one": "rank_one",
    "scalar-rank_one": "rank_one",
    "diagonal-rank_one": "rank_one",
}


def make(name: str, B: int = 2, T: int = 37, H: int = 2, K: int = 6, V: int = 4) -> Operands:
    """fp64 operands of a class; keys have unit length."""
    gate, _, transition = name.partition("-")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V)}
    x["k"] = x["k"] / x["k"].norm(dim=-1, keepdim=True)
    shape = {"constant": (H,), "scalar": (B, T, H), "diagonal": (B, T, H, K)}.get(gate)
    if shape:
        x["g"] = -torch.rand(shape, dtype=torch.float64)
    if transition == "delta":
        x["beta"] = 1.8 * torch.rand(B, T, H, dtype=torch.float64)
    if transition == "rank_one":
        x["e"], x["a"] = 0.3 * normal(B, T, H, K), 0.3 * normal(B, T, H, K)
    return x


def start(x: Operands) -> torch.Tensor:
    """An initial state for operands from `make`."""
    return torch.randn(x["q"].shape[0], *x["q"].shape[2:], x["v"].shape[-1], dtype=torch.float64)


def runs(B: int, T: int) -> torch.Tensor:
    """Nondecreasing document indices, some of which are skipped."""
    return torch.randint(0, 6, (B, T)).sort(-1).values


def gradients(x: Operands, do: torch.Tensor, dS: torch.Tensor, **kwargs) -> Operands:
    """Outputs o and S and the gradient of <o, do> + <S, dS> to every operand, named d<operand>."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    o, S = scan(**leaves, output_final_state=True, **kwargs)
    loss = (o.to(do.dtype) * do).sum() + (S.to(dS.dtype) * dS).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"o": o.detach(), "S": S.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def assert_same(actual: Operands, expected: Operands, tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert error(actual[name], value) < tolerance, name


def forms(x: Operands) -> list[dict]:
    chunked = [{"chunk_size": C} for C in (1, 16, 64)]
    return [{"form": "recurrent"}, *chunked, *([] if "a" in x else [{"form": "quadratic"}])]
