"""Layers that read the keys and values of earlier ones: golden files, loops, identities, refusals."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo import Context
from attnzoo.attention.base import Mixer
from attnzoo.attention.crosslayer.mixattention import default_plan, expand, producers
from attnzoo.testing.stack import Stack
from golden import load_spec_weights, spec_options
from layered import build_layers, check_layers, close, run, scattered
from oracles import project, split
from tiny import D, H, T, same, tokens

FILES = Path(__file__).parents[1] / "golden"
TINY = {"vocab_size": 20, "dim": 16, "num_heads": 4}


@torch.no_grad()
def test_golden_cla() -> None:
    file = torch.load(FILES / "cla.pt", weights_only=True)
    extra = file["extra"]
    consumer, normed = extra.pop("consumer"), extra.pop("with_qk_norm")
    options = spec_options("cla", file["spec_options"])
    dim, heads = file["x"].shape[-1], options.pop("num_heads")
    pair = build_layers("cla", 2, dim, heads, **options)
    for mixer, weights in zip(pair, (file["weights"], consumer["weights"]), strict=True):
        load_spec_weights(mixer, weights)
    check_layers(pair, [file["x"], consumer["x"]], [file["y"], consumer["y"]])
    ctx = Context()
    pair[0](file["x"], ctx)
    close(ctx.shared["kv.0"].k, extra.pop("k"))
    close(ctx.shared["kv.0"].v, extra.pop("v"))
    assert not extra
    pair = build_layers("cla", 2, dim, heads, qk_norm=True, **options)
    for mixer, side in zip(pair, ("producer", "consumer"), strict=True):
        load_spec_weights(mixer, normed[f"{side}_weights"])
    xs, ys = ([normed[f"{z}_{side}"] for side in ("producer", "consumer")] for z in "xy")
    check_layers(pair, xs, ys)
    pair[0](xs[0], ctx)
    close(ctx.shared["kv.0"].k, normed["k"])
    close(ctx.shared["kv.0"].v, normed["v"])


@torch.no_grad()
def test_golden_mixattention() -> None:
    file = torch.load(FILES / "mixattention.pt", weights_only=True)
    given = file["extra"]["layers"]
    options = spec_options("mixattention", file["spec_options"])
    mixers = build_layers(
        "mixattention", len(given), file["x"].shape[-1], options.pop("num_heads"), **options
    )
    for mixer, layer in zip(mixers, given, strict=True):
        load_spec_weights(mixer, layer["weights"])
    check_layers(mixers, [layer["x"] for layer in given], [layer["y"] for layer in given])
    close(run(mixers[:1], [file["x"]])[0], file["y"])
    assert mixers[1].new_cache(2, 29).slots["k"].shape[2] == 6  # a ring
    assert [m.new_cache(2, 29).nbytes > 0 for m in mixers] == [True, True, False, False]


def test_golden_plans() -> None:
    file = torch.load(FILES / "mixattention.pt", weights_only=True)
    reference, other = file["extra"].pop("plans")
    assert producers(expand(reference["names"])) == reference["producers"]
    assert default_plan(13) == reference["names"]
    pattern = [{"name": "slide_reuse", "repeat": 2}, "slide"]
    plan = expand(["full", "slide", {"order": pattern, "repeat": 3}])
    assert [layer.kind for layer in plan] == other["names"]
    assert producers(plan) == other["producers"]
    # the reference's distances, spelled out
    items = ["slide", {"name": "slide_reuse", "reuse": -1}]
    inner = [{"order": items, "repeat": 2}, "slide_reuse", {"name": "full_reuse", "reuse": -6}]
    plan = expand(["full", {"order": inner, "repeat": 2}])
    assert producers(plan) == reference["producers"]


def plain_stack(x: Tensor, weights: list[dict[str, Tensor]], kv_heads: int, borrow: dict[int, int]) -> Tensor:
    """``(T, D)`` through pre-norm layers, pair by pair of tokens, without positions."""
    made = {}
    for i, w in enumerate(weights):
        z = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        q = split(project(z, w, "q"), H)
        if i not in borrow:
            made[i] = [split(project(z, w, n), kv_heads) for n in "kv"]
        k, v = made[borrow.get(i, i)]
        o = torch.zeros(len(x), D).double()
        for h in range(H):
            g, d = h * kv_heads // H, D // H
            for t in range(len(x)):
                p = torch.stack([q[h][t] @ k[g][s] / d**0.5 for s in range(t + 1)]).softmax(0)
                o[t, h * d : (h + 1) * d] = sum(p[s] * v[g][s] for s in range(t + 1))
        x = x + o @ w["W_o"]
    return x


def weights_of(mixer: Mixer, kv_heads: int) -> dict[str, Tensor]:
    found = {"W_o": mixer.out.out_proj.weight.T}
    if hasattr(mixer.project, "q_proj"):
        return found | {"W_q": mixer.project.q_proj.weight.T}
    sizes = [D, kv_heads * D // H, kv_heads * D // H]
    return found | dict(
        zip(("W_q", "W_k", "W_v"), mixer.project.qkv_proj.weight.T.split(sizes, 1), strict=True)
    )


def test_cla_with_offset_equals_loops() -> None:
    """Gradients too: those of borrowed keys and values go back to the layer that made them."""
    stack = scattered(Stack("cla", 6, D, H, cla_factor=2, offset=1, num_kv_heads=2, pos="none").double())
    x = tokens()
    weights = [weights_of(mixer, 2) for mixer in stack.mixers]
    want = torch.stack([plain_stack(row, weights, 2, {2: 1, 4: 3}) for row in x])
    same(stack(x), want)
    made = [stack.mixers[i].project.qkv_proj.weight for i in (0, 1, 3, 5)]
    pull = torch.randn_like(x)
    grads = (torch.autograd.grad((y * pull).sum(), made) for y in (stack(x), want))
    for ours, theirs in zip(*grads, strict=True):
        same(ours, theirs)


@torch.no_grad()
def test_cla_reduces_to_gqa() -> None:
    ours = scattered(Stack("cla", 3, D, H, cla_factor=1, num_kv_heads=2).double())
    theirs = Stack("gqa", 3, D, H, num_kv_heads=2).double()
    theirs.load_state_dict(ours.state_dict())
    x = tokens()
    same(ours(x), theirs(x))


@torch.no_grad()
def test_mixattention_reductions() -> None:
    x = tokens()

    def pair(ours: Stack, name: str, **options: Any) -> None:
        scattered(ours)
        theirs = Stack(name, len(ours.mixers), D, H, **options).double()
        theirs.load_state_dict(ours.state_dict())
        same(ours(x), theirs(x))

    pair(Stack("mixattention", 3, D, H, plan=["full"] * 3).double(), "mha")
    pair(Stack("mixattention", 4, D, H, plan=["full", "full_reuse"] * 2).double(), "cla")
    wide = Stack("mixattention", 4, D, H, plan=["slide", "slide_reuse"] * 2, window=T).double()
    pair(wide, "cla")
    pair(
        Stack("mixattention", 2, D, H, plan=["slide"] * 2, window=3).double(),
        "sliding_window",
        window=3,
        n_sink=0,
    )


def test_a_windowed_layer_may_read_a_full_one() -> None:
    stack = scattered(Stack("mixattention", 2, D, H, plan=["full", "slide_reuse"], window=3).double())
    x = tokens(1, T, D)
    y = stack(x)
    cache = stack.new_cache(1, T)
    same(torch.cat([stack(x[:, t : t + 1], cache=cache) for t in range(T)], dim=1), y)


@pytest.mark.parametrize("name, options", [("cla", {"cla_factor": 3}), ("mixattention", {"window": 4})])
def test_gradients_under_checkpointing_are_plain_ones(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = scattered(attnzoo.create_model(name, depth=4, **TINY, **options).double())
    x = torch.randint(0, 20, (2, 9))
    ids = torch.tensor([[1] * 4 + [2] * 5, [3] * 9])

    def gradients() -> list[Tensor]:
        loss = model(x, Context(segment_ids=ids)).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    want = gradients()
    model.run_block = partial(checkpoint, use_reentrant=False)
    for ours, theirs in zip(gradients(), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_consumers_own_no_keys_and_no_cache() -> None:
    model = attnzoo.create_model("cla", depth=4, **TINY, qk_norm=True, num_kv_heads=1)
    first, second = model.mixers[:2]
    assert sum(p.numel() for p in first.parameters()) - sum(p.numel() for p in second.parameters()) == (
        16 * 2 * 4 + 4  # W_k, W_v and the gains on k
    )
    assert second.memory() == {} and second.cost(8).cache_bytes_per_token == 0
    assert model.cost(8, torch.float32).cache_bytes_per_token == 2 * 2 * 4 * 4  # two layers of k, v


def test_consumers_need_their_producer() -> None:
    consumer = attnzoo.create("cla", D, H, layer_idx=1, num_layers=2).double()
    with pytest.raises(ValueError, match=r"shared: layer 1 reads 'kv.0'.*one model"):
        consumer(tokens())
    for layout, message in (
        ("gqa,cla", r"layer 1 \(cla\) reads 'kv.0', which no earlier layer gives"),
        (
            ["cla", {"name": "cla", "num_kv_heads": 2}],
            r"layer 1 \(cla\) needs 'kv.0' with KVSpec\(k=\(2, 4\)",
        ),
        (["cla", {"name": "cla", "rope_theta": 5.0}], r"theta=5.0"),
        (["cla", {"name": "cla", "pos": "none"}], r"pos='none'"),
        ([{"name": "cla", "window": 3}, "cla"], r"keeps=\(0, 3\)"),
        ([{"name": "cla", "window": 3}, {"name": "cla", "window": 4}], r"keeps=\(0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attnzoo.create_model(layout, depth=2, **TINY)
    attnzoo.create_model([{"name": "cla", "window": 4}, {"name": "cla", "window": 3}], depth=2, **TINY)
    attnzoo.create_model(["cla", {"name": "cla", "window": 3}], depth=2, **TINY)


@torch.no_grad()
@pytest.mark.parametrize(
    "base, options", [("gqa", {}), ("mqa", {}), ("kha", {"kind": "linear"}), ("kv_shift", {}), ("wgqa", {})]
)
def test_cla_over_other_variants(base: str, options: dict[str, Any]) -> None:
    stack = scattered(Stack(base, 2, D, H, add="cla", **options).double())
    x = tokens()
    cache = stack.new_cache(2, T)
    parts = [stack(z, cache=cache) for z in x.split([4, 1, 4], dim=1)]
    same(torch.cat(parts, dim=1), stack(x))
    assert stack.mixers[1].memory() == {}


def test_cla_refuses_latents() -> None:
    with pytest.raises(ValueError, match=r"add: mla makes keys at read from a latent"):
        attnzoo.create("mla", D, H, add="cla")
    with pytest.raises(ValueError, match=r"add: mla makes keys at read from a latent"):
        attnzoo.create("mla", D, H, add="cla", layer_idx=1, num_layers=2)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("cla", {"cla_factor": 0}, r"cla_factor: must be at least 1 .*got 0"),
        ("cla", {"offset": -1}, r"offset: must be at least 0, got -1"),
        ("mixattention", {"plan": ["full"]}, r"plan: needs one layer per layer.*depth is 3, got 1"),
        ("mixattention", {"plan": ["full", "wide", "full"]}, r"plan: must name one of .*got 'wide'"),
        ("mixattention", {"plan": ["full", "slide", {"name": "slide_reuse", "reuse": 0}]}, r"below 0, got 0"),
        ("mixattention", {"plan": ["slide_reuse", "full", "full"]}, r"layer 0 \(slide_reuse\) has no layer"),
        ("mixattention", {"plan": ["slide", "full_reuse", "full"]}, r"layer 1 \(full_reuse\) has no layer"),
        (
            "mixattention",
            {"plan": ["full", "slide", {"name": "full_reuse", "reuse": -1}]},
            r"layer 2 \(full_reuse\) reads all keys of layer 1, which keeps a window",
        ),
        ("mixattention", {"plan": ["full", "full", {"name": "full", "reuse": -1}]}, r"makes its own keys"),
        (
            "mixattention",
            {"plan": ["full", {"order": ["full"], "repeat": 0}]},
            r"repeat must be at least 1, got 0",
        ),
        ("mixattention", {"plan": ["full", {"nme": "full"}]}, r"plan: an item is a kind"),
        ("mixattention", {"window": None}, r"window: slide layers need one, got None"),
        ("mixattention", {"add": "cla"}, r"add: cla says whose keys a layer reads, another variant"),
        ("kdgqa", {"add": "cla"}, r"add: kdgqa and cla both set 'project'"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layers(name, 3, **options)
