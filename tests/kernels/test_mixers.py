"""Mixers on kernels: what they compute is what they compute without."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import attnzoo
from attnzoo import Context
from attnzoo_kernels.launch import interpreting

op = import_module("attnzoo.ops.attention")  # the package names the function so


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 4, "n_sink": 2}, {"pos": "none"}], ids=str)
@torch.no_grad()
def test_mla_decodes_in_the_kernel(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    calls = []
    kernel = op.latent_decode
    monkeypatch.setattr(op, "choose", lambda *_: "triton")
    monkeypatch.setattr(op, "latent_decode", lambda *x, **more: calls.append(1) or kernel(*x, **more))
    torch.manual_seed(0)
    mixer = attnzoo.create("mla", dim=64, num_heads=4, **options)
    x = torch.randn(2, 9, 64)
    cache = mixer.new_cache(2, 9)
    parts = [mixer(part, cache=cache) for part in x.split([5, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == (0 if "window" in options else 4)  # a window's keys stand in a ring


# The mixer, its options, and the custom ops that must have run.
TRAINED = {
    "mha": ({}, {"attention_forward"}),
    "sliding_window": ({"window": 5, "n_sink": 2}, {"attention_forward"}),
    "mla": ({}, {"attention_forward"}),
    "dcmha": ({}, {"compose_forward"}),
    "linear": ({}, {"scan_plain_forward"}),
    "gated_deltanet": ({}, {"scan_delta_forward", "short_conv_forward", "norm_gate_forward"}),
}


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the package's custom ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attnzoo":
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not (interpreting() or torch.cuda.is_available()), reason="kernels cannot run here")
@pytest.mark.parametrize("name", TRAINED)
def test_kernels_train_what_the_reference_trains(name: str) -> None:
    """Outputs and every parameter's gradient, with documents and padding."""
    options, ops = TRAINED[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, names = [], set()
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        mixer = attnzoo.create(name, dim=64, num_heads=2, impl=impl, **options).to(device)
        x = torch.randn(2, 19, 64, device=device, requires_grad=True)
        segments = torch.tensor([[1] * 7 + [2] * 12, [1] * 15 + [0] * 4], device=device)
        with Ops() as seen:
            y = mixer(x, Context(segment_ids=segments))
        names = names or seen.names
        leaves = [x, *mixer.parameters()]
        grads = torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)
        found.append([y, *grads])
    assert ops <= names
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=2e-5 * max(1.0, expected.abs().max().item())
        )


@pytest.mark.skipif(not (interpreting() or torch.cuda.is_available()), reason="kernels cannot run here")
@pytest.mark.parametrize("name", ["mha", "sliding_window", "dcmha", "linear", "gated_deltanet"])
@torch.no_grad()
def test_kernels_decode_what_they_compute_at_once(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    mixer = attnzoo.create(name, dim=64, num_heads=2, impl="triton", **TRAINED[name][0]).to(device)
    x = torch.randn(2, 9, 64, device=device)
    cache = mixer.new_cache(2, 9)
    with Ops() as seen:
        parts = [mixer(part, cache=cache) for part in x.split([5, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x), rtol=1e-3, atol=1e-5)
    if name in ("linear", "gated_deltanet"):
        assert "scan_step" in seen.names
