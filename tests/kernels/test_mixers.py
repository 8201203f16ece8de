"""Mixers on kernels: what they compute is what they compute without."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import attnzoo

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
