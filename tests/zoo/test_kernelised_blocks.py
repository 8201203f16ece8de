"""linformer and mhla_linear: sums by hand, identities, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
import attnzoo.testing
from attnzoo import Context
from attnzoo.attention.base import Mixer
from zoo.kernelised import T, heads_of, make, out_of, prefix_rows, same, tokens, turned


@pytest.mark.parametrize("share", [False, True])
def test_linformer_prefix_is_the_published_layer_at_its_last_position(share: bool) -> None:
    options = {"k": 5, "max_seq_len": T + 3, "share_kv_proj": share, "num_kv_heads": 2, "chunk_size": 4}
    mixer, x = make("linformer", **options), tokens()
    E = mixer.scan.slots.E
    F = E if share else mixer.scan.slots.F
    for t in range(1, T + 1):
        q, k, v = heads_of(mixer, x[:t])
        p = (q @ (E[:t].T @ k).mT / 2).softmax(-1)
        same(mixer(x[None])[0, t - 1], out_of(mixer, p @ (F[:t].T @ v))[-1])


def test_linformer_slots_hold_the_past_only() -> None:
    for options in ({"k": 5}, {"mode": "blocks", "block_size": 4, "k": 1024}):
        mixer, x = make("linformer", **options), tokens(1, T, 16)
        later = torch.cat([x[:, :7], tokens(1, T - 7, 16)], dim=1)
        assert torch.equal(mixer(later)[:, :7], mixer(x)[:, :7])


def test_linformer_one_hot_slots_are_zero_padded_mha() -> None:
    """With a slot per position the future's slots are empty: they score 0 and take weight, unlike in mha."""
    mixer, x = make("linformer", k=T, max_seq_len=T), tokens()
    mixer.scan.slots.E.copy_(torch.eye(T))
    mixer.scan.slots.F.copy_(torch.eye(T))
    q, k, v = heads_of(mixer, x)
    p = (q @ k.mT / 2).tril().softmax(-1)
    same(mixer(x[None])[0], out_of(mixer, p.tril() @ v))


BLOCKS = [{"share_kv_proj": True}, {"num_kv_heads": 2, "pos": "none"}, {"qk_norm": False, "head_dim": 6}]


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_linformer_blocks_by_loops(options: dict[str, Any]) -> None:
    size = 4
    mixer, x = make("linformer", mode="blocks", block_size=size, k=1024, **options), tokens()
    q, k, v = heads_of(mixer, x)
    E = mixer.read.slots.E
    F = E if options.get("share_kv_proj") else mixer.read.slots.F
    assert E.shape == (size, 2)
    if options.get("pos") != "none":
        q, k = turned(q), turned(k)
    o = torch.empty_like(q)
    for t in range(T):
        begin = t // size * size
        parts = [slice(b, b + size) for b in range(0, begin, size)]
        keys = torch.cat([*(E.T @ k[:, part] for part in parts), k[:, begin : t + 1]], dim=1)
        values = torch.cat([*(F.T @ v[:, part] for part in parts), v[:, begin : t + 1]], dim=1)
        p = (keys @ q[:, t, :, None] * q.shape[2] ** -0.5).softmax(1)
        o[:, t] = (p * values).sum(1)
    same(mixer(x[None])[0], out_of(mixer, o))


def test_linformer_blocks_of_identity_landmarks_are_mha() -> None:
    mixer, x = make("linformer", mode="blocks", block_size=4, k=2048), tokens(1, T, 16)
    for z in mixer.read.slots.parameters():
        z.copy_(torch.eye(4))
    plain = attnzoo.create("mha", 16, 4).double()
    plain.load_state_dict({n: z for n, z in mixer.state_dict().items() if "slots" not in n})
    same(mixer(x), plain(x))
    cache = mixer.new_cache(1, T)
    same(torch.cat([mixer(part, cache=cache) for part in x.split([3, 1, 1, 8], dim=1)], dim=1), plain(x))
    assert cache.slots["k"].shape[2] == 4 and mixer.impl == "reference"


def test_linformer_layers_may_share_their_slots() -> None:
    sizes = {"vocab_size": 11, "dim": 16, "depth": 3, "num_heads": 4}
    models = [attnzoo.create_model(layout="linformer", share_layers=s, k=4, **sizes) for s in (False, True)]
    apart, shared = (sum(p.numel() for p in model.parameters()) for model in models)
    assert apart - shared == 2 * 2 * 2048 * 4


def mixed(mixer: Mixer, x: Tensor, M: Tensor, size: int) -> Tensor:
    """Quadratic form, heads before norm and gate."""
    q, k, v = (z for z in heads_of(mixer, x))
    q, k = turned(q.relu()), turned(k.relu())
    block = torch.arange(len(x)) // size
    weights = (q @ k.mT) * k.shape[2] ** -0.5 * M[block][:, block]
    return prefix_rows(weights, v)


@pytest.mark.parametrize("size, groups", [(3, 4), (5, 2), (1, 4), (20, 1)])
def test_mhla_linear_is_its_quadratic_form(size: int, groups: int) -> None:
    options = {"block_size": size, "num_blocks": 13, "num_kv_heads": groups, "use_output_gate": False}
    mixer, x = make("mhla_linear", **options), tokens()
    mixer.scan.M.mul_(3)  # some beyond 1, some below 1e-5
    o = mixed(mixer, x, mixer.scan.M.clamp(1e-5, 1), size)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.combine[0].gain
    same(mixer(x[None])[0], out_of(mixer, o))


def test_mhla_linear_of_ones_is_linear_and_of_powers_retains_by_blocks() -> None:
    mixer, x = make("mhla_linear", block_size=4, use_output_gate=False, num_blocks=6), tokens()
    plain = attnzoo.create("linear", 16, 4, feature_map="relu", normalize=False).double()
    mixer.scan.M.fill_(1)
    q, k, v = heads_of(mixer, x)
    same(mixed(mixer, x, mixer.scan.M, 4), prefix_rows(turned(q.relu()) @ turned(k.relu()).mT / 2**0.5, v))
    wide = attnzoo.create("mhla_linear", 16, 4, expand_k=1.0, use_output_gate=False).double()
    wide.scan.M.data.fill_(1)
    plain.load_state_dict({n: z for n, z in wide.state_dict().items() if n != "scan.M"})
    same(wide(x[None]), plain(x[None]))
    steps = torch.arange(6)
    mixer.scan.M.copy_(0.5 ** (steps[:, None] - steps).clamp(min=0))
    o, state = torch.zeros(4, T, 4).double(), torch.zeros(4, 2, 4).double()
    for t in range(T):
        if t % 4 == 0:
            state = 0.5 * state
        state = state + turned(k.relu())[:, t, :, None] * v[:, t, None]
        o[:, t] = (turned(q.relu())[:, t, None] @ state)[:, 0] / 2**0.5
    same(mixed(mixer, x, mixer.scan.M, 4), o)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.combine[0].gain
    same(mixer(x[None])[0], out_of(mixer, o))


def test_mhla_linear_keeps_one_state_per_block_and_refuses_more_than_it_has() -> None:
    mixer = make("mhla_linear", block_size=4, num_blocks=3)
    cost = mixer.cost(12, torch.float64)
    assert cost.cache_bytes_per_token == 8 * 4 * 2 * 4 / 4 and cost.state_bytes == 2 * 8 * 4 * 2 * 4
    with pytest.raises(ValueError, match="num_blocks: a document has 13 tokens, there is room for 12"):
        mixer(tokens(1, 13, 16))
    cache = mixer.new_cache(1, 20)
    mixer(tokens(1, 12, 16), cache=cache)
    with pytest.raises(ValueError, match="num_blocks"):
        mixer(tokens(1, 1, 16), cache=cache)
    ids = torch.tensor([[1] * 12 + [2] * 9])
    assert mixer(tokens(1, 21, 16), Context(segment_ids=ids)).isfinite().all()
    with pytest.raises(ValueError, match="max_seq_len: a document has 9 tokens"):
        make("linformer", k=2, max_seq_len=8)(tokens(1, 9, 16))


REFUSED = [
    ("linformer", {"k": 0}, "k", 0),
    ("linformer", {"mode": "blocks", "block_size": 0}, "block_size", 0),
    ("linformer", {"mode": "blocks", "window": 4}, "window", 4),
    ("linformer", {"mode": "blocks", "impl": "sdpa"}, "impl", "sdpa"),
    ("linformer", {"mode": "bidirectional"}, "mode", "bidirectional"),
    ("mha", {"add": "linformer"}, "mode", "prefix"),
    ("mhla_linear", {"block_size": 0}, "block_size", 0),
    ("mhla_linear", {"num_blocks": 0}, "num_blocks", 0),
    ("mhla_linear", {"expand_k": 0.0}, "expand_k", 0.0),
    ("mhla_linear", {"chunk_size": 8}, "chunk_size", 8),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, 32, 4, **options)
    assert re.match(rf"{field}: .{{15,}}", str(caught.value)) and str(value) in str(caught.value)


CONTRACT = [
    ("mla", {"add": "linformer", "mode": "blocks", "block_size": 4, "k": 1024}),
    ("mla", {"add": "fast_factorizable"}),
    ("linformer", {"mode": "blocks", "block_size": 4, "k": 1024, "num_kv_heads": 2}),
    ("mhla_linear", {"block_size": 5, "num_blocks": 30, "num_kv_heads": 2, "feature_map": "hedgehog"}),
    ("rala", {"mode": "prefix_exact", "num_kv_heads": 2, "pos": "none"}),
    ("rala", {"num_kv_heads": 2, "chunk_size": 5, "qk_norm": True}),
    ("mala", {"num_kv_heads": 2, "output_gate": "headwise", "out_gate": False}),
    ("flatten", {"num_kv_heads": 1, "chunk_size": 5, "norm_scope": "head"}),
    ("pavlovian", {"rule": "trace", "num_kv_heads": 2, "pos": "rope"}),
    ("based", {"feature_dim": 4, "chunk_size": 1, "num_kv_heads": 2, "pos": "rope"}),
    ("fast_factorizable", {"mode": "quadratic", "window": 5, "n_sink": 1, "num_kv_heads": 2}),
]


@pytest.mark.parametrize("name, options", CONTRACT, ids=str)
def test_other_forms_keep_the_contract(name: str, options: dict[str, Any]) -> None:
    assert len(attnzoo.testing.check(name, **options)) == len(attnzoo.testing.PROPERTIES)
