"""Chunks only decide how a recurrence is computed: all variants with them, at sizes that fit T or do not."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from attnzoo.context import Context

D, H, T = 32, 4, 37
NAMES = [
    name
    for name in attnzoo.list_variants()
    if "chunk_size" in (own := attnzoo.card(name).defaults) and own["chunk_size"] is not None
]
POWERS = ("log_linear",)  # sizes of two to a power only
IDS = torch.tensor([[1] * 5 + [2] * 20 + [3] * 12, [4] * 30 + [0] * 7])


def test_the_recurrent_variants_are_among_them() -> None:
    assert {"linear", "rala", "flare", "based", "retnet", "gla", "kda", "rwkv7", "log_linear"} <= set(NAMES)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_any_size_agree(name: str, small: bool) -> None:
    card, sizes = attnzoo.card(name), (1, 4, 16, 64) if name in POWERS else (1, 5, 16, 37, 64)
    options = {k: v for k, v in card.small.items() if k != "chunk_size"} if small else {}
    if card.layers > 1 and "layer_idx" not in options and name == "l2vit":
        options |= {"layer_idx": 1, "num_layers": 2}  # the layers with a state
    mixers = [attnzoo.create(name, D, H, chunk_size=size, **options).double() for size in sizes]
    torch.manual_seed(0)
    with torch.no_grad():
        for param in mixers[0].parameters():
            param.add_(0.3 * torch.randn_like(param))
        x, outs = torch.randn(2, T, D).double(), []
        for mixer in mixers:
            mixer.load_state_dict(mixers[0].state_dict())
            outs.append([mixer(x), mixer(x, Context(segment_ids=IDS))])
    for found in outs[1:]:
        for ours, first in zip(found, outs[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_gates_that_are_shut_or_open_stay_finite(name: str, scale: float) -> None:
    """Inputs that saturate every gate, in fp32, forward and backward."""
    mixer = attnzoo.create(name, D, H, chunk_size=16)
    torch.manual_seed(0)
    x = (scale * torch.randn(2, T, D)).requires_grad_()
    y = mixer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in mixer.parameters())
