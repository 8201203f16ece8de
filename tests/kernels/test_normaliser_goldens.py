"""Normalisers against the outputs of the papers' own implementations, in fp64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo_kernels.attention import attention
from attnzoo_kernels.span import Span

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")


def load(name: str) -> dict:
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def project(x: Tensor, weights: dict[str, Tensor], heads: int = 4) -> list[Tensor]:
    """q, k, v (B,heads,T,d)."""
    width = weights["W_q"].shape[1] // heads
    return [(x @ weights[f"W_{name}"]).unflatten(-1, (-1, width)).transpose(1, 2) for name in "qkv"]


def merge(o: Tensor, weights: dict[str, Tensor]) -> Tensor:
    return o.transpose(1, 2).flatten(2) @ weights["W_o"]


def rope(z: Tensor) -> Tensor:
    """Rotates pairs (f, f + d/2) of (B,H,T,d) by theta = 10000."""
    T, d = z.shape[2:]
    angle = torch.arange(T, dtype=z.dtype)[:, None] * 10000.0 ** -(torch.arange(0, d, 2, dtype=z.dtype) / d)
    a, b = z.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def weights_of(q: Tensor, k: Tensor, span: Span, **options) -> Tensor:
    """The (B,H,T,S) weights, read off with unit vectors as values."""
    eye = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return attention(q, k, eye, span, **options)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_clipped_softmax() -> None:
    file = load("clipped_softmax")
    options = file["spec_options"]
    clip = (-float(options["alpha"]) / float(options["max_len"]), float(options["zeta"]))
    x = file["x"].requires_grad_()
    q, k, v = project(x, file["weights"])
    span, given = Span.causal(27, 27, CPU), {"normaliser": "clipped_softmax", "clip": clip}
    y = merge(attention(q, k, v, span, **given), file["weights"])
    close(y, file["y"])
    close(weights_of(q, k, span, **given), file["extra"]["probs"])
    close(torch.autograd.grad(y, x, file["extra"]["dy"])[0], file["extra"]["dx"])


def test_softmax_sink() -> None:
    file = load("softmax_sink")
    extra, weights, x = file["extra"], file["weights"], file["x"].requires_grad_()
    q, k, v = project(x, weights)
    q, k, b = rope(q), rope(k), weights["b"].requires_grad_()
    span = Span.causal(29, 29, CPU)
    y = merge(attention(q, k, v, span, sink=b), weights)
    close(y, file["y"])
    close(weights_of(q, k, span, sink=b), extra["P"])
    close(merge(attention(q, k, v, span, sink="off_by_one"), weights), extra["y_off_by_one"])
    near = Span.causal(29, 29, CPU, window=7)
    close(merge(attention(q, k, v, near, sink=b), weights), extra["y_window7"])
    dx, db = torch.autograd.grad(y, (x, b), extra["grad_y"])
    close(dx, extra["dx"])
    close(db, extra["db"])


@pytest.mark.parametrize("case", ["rope", "alibi", "plain"])
def test_sigmoid(case: str) -> None:
    file = load("sigmoid")
    weights, given = file["weights"], {"normaliser": "sigmoid", "bias": -math.log(64)}
    q, k, v = project(file["x"], weights)
    if case != "plain":
        q, k = (
            F.layer_norm(z, z.shape[-1:], weights[f"gamma_{n}"], weights[f"beta_{n}"], 1e-5)
            for n, z in (("q", q), ("k", k))
        )
    span = Span.causal(27, 27, CPU)
    if case == "rope":
        q, k = rope(q), rope(k)
        close(weights_of(q, k, span, **given), file["extra"]["P"])
    if case == "alibi":
        given["slopes"] = 2.0 ** (-8 * torch.arange(1, 5, dtype=q.dtype) / 4)
    expected = {"rope": file["y"], "alibi": file["extra"]["y_alibi"], "plain": file["extra"]["y_nope_noqk"]}
    close(merge(attention(q, k, v, span, **given), weights), expected[case])


def test_rela() -> None:
    file = load("rela")
    q, k, _ = project(file["x"], file["weights"])
    close(weights_of(q, k, Span.causal(27, 27, CPU), normaliser="relu"), file["extra"]["P"])
