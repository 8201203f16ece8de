"""Recency ratios against loops over attention weights, and the heads that they choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.convert import recency_heads
from oracles import rotate, softmax_rows, split

TEXT = torch.randint(0, 19, (3, 17), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 19, "dim": 16, "depth": 2, "num_heads": 4}


def drawn(**options: Any) -> attnzoo.model.LanguageModel:
    model = attnzoo.create_model("gqa", **SIZES, **options).double().requires_grad_(False)
    for p in model.parameters():
        p.mul_(9) if p.dim() > 1 else p.add_(torch.randn_like(p))
    return model


def ratios(model: attnzoo.model.LanguageModel, layer: int, w: int) -> list[float]:
    """RR of each head, query by query."""
    mixer, inputs = model.mixers[layer], []
    hook = mixer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(TEXT)
    hook.remove()
    (H, G, _), sizes = mixer.project.heads, mixer.project.sizes
    theta = 1e4 if mixer.options["pos"] == "rope" else None
    window, sinks = mixer.options["window"] or 99, mixer.options["n_sink"]
    found = []
    for h in range(H):
        total = 0.0
        for x in inputs[0]:
            flat = mixer.project.qkv_proj(x).split(sizes, dim=1)
            q, k = split(flat[0], H)[h], split(flat[1], G)[h * G // H]
            s = rotate(q, theta) @ rotate(k, theta).T / 2
            gap = torch.arange(17)[:, None] - torch.arange(17)
            p = softmax_rows(s, (gap >= 0) & ((gap < window) | (torch.arange(17) < sinks)))
            total += sum(float(p[i, j]) for i in range(17) for j in range(17) if j > i - w) / 17
        found.append(total / 3)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"pos": "none", "qkv_bias": True}, {"window": 9, "n_sink": 2}],
    ids=str,
)
@pytest.mark.parametrize("groups", [4, 2])
def test_heads_with_the_largest_ratio_in_whole_groups(groups: int, options: dict[str, Any]) -> None:
    model, size = drawn(num_kv_heads=groups, **options), 4 // groups
    by_threshold = recency_heads(model, TEXT, rr_window=3, rr_threshold=0.45)
    for layer, chosen in enumerate(recency_heads(model, TEXT, rr_window=3)):
        found = ratios(model, layer, 3)
        means = [sum(found[g * size : (g + 1) * size]) / size for g in range(groups)]
        assert max(means) - min(means) > 1e-3
        best = sorted(range(groups), key=lambda g: -means[g])[: groups // 2]
        assert chosen == tuple(h for h in range(4) if h // size in best)
        assert by_threshold[layer] == tuple(h for h in range(4) if means[h // size] > 0.45)
    places = recency_heads(model, TEXT, rr_window=3)
    layout = [{"name": "recurformer", "recurrent_heads": heads, "num_kv_heads": groups} for heads in places]
    assert attnzoo.create_model(layout, **SIZES)(TEXT).isfinite().all()


def test_a_head_that_looks_back_a_step_is_recent_and_one_that_looks_everywhere_is_not() -> None:
    model = attnzoo.create_model("mha", **SIZES).double().requires_grad_(False)
    for mixer in model.mixers:
        mixer.project.qkv_proj.weight.zero_()  # every head a plain mean
    assert recency_heads(model, TEXT, rr_window=3, rr_threshold=0.5) == [(), ()]
    q, k, _ = mixer.project.qkv_proj.weight.view(3, 4, 4, 16)
    q[2], k[2] = 1.0, 1.0
    shift = torch.ones(16).double()
    model.embed.weight.copy_(shift + 0.01 * torch.randn(19, 16))  # one content: RoPE's distance decides
    q.mul_(8)
    (_, last) = recency_heads(model, TEXT, rr_window=3, rr_threshold=0.5)
    assert last == (2,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rr_window": 0}, r"rr_window: must be in 1\.\.16.*got 0"),
        ({"rr_window": 17}, r"rr_window: must be in 1\.\.16.*got 17"),
        ({"rr_window": 3, "recurrent_fraction": 1.5}, r"recurrent_fraction: must be in \[0, 1\], got 1\.5"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        recency_heads(drawn(), TEXT, **options)
    with pytest.raises(ValueError, match=r"^model: recency_heads converts layers of .* layer 0 is 'linear'"):
        recency_heads(attnzoo.create_model("linear", **SIZES), TEXT, rr_window=3)


def test_learned_tokens_before_the_text_are_read_too() -> None:
    model = drawn(num_kv_heads=4, prefix_tokens=3)
    (first, _) = recency_heads(model, TEXT, rr_window=3)
    assert len(first) == 2


@pytest.mark.parametrize("groups, count", [(4, 3), (2, 2), (1, 0)])
def test_a_fraction_is_rounded_down_to_whole_groups(groups: int, count: int) -> None:
    chosen = recency_heads(drawn(num_kv_heads=groups), TEXT, rr_window=3, recurrent_fraction=0.75)
    assert [len(heads) for heads in chosen] == [count, count]
