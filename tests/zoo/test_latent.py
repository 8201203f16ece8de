"""Latent attentions on mla's projection: what they reduce to, loops over their equations, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.attention.latent.elitekv import choose_pairs
from attnzoo.context import Context
from attnzoo.testing import PROPERTIES, Subject
from oracles import causal, rms, rotate, softmax_rows, split
from tiny import D, H, T, build, same, tokens, with_weights_of

SIZES = {"qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5}
IDS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])

REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    ("gla_latent", {"num_latent_heads": 3}, "num_latent_heads", 3),
    ("gla_latent", {"num_latent_heads": 0}, "num_latent_heads", 0),
    ("gla_latent", {"latent_dim": 0}, "latent_dim", 0),
    ("gla_latent", {"latent_dim": 16}, "latent_dim", 16),
    ("gla_latent", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("gla_latent", {"qk_rope_head_dim": 3}, "qk_rope_head_dim", 3),
    ("tpla", {"latent_shards": 0}, "latent_shards", 0),
    ("tpla", {"latent_shards": 3, "kv_lora_rank": 8}, "latent_shards", 3),
    ("tpla", {"shard_gain": [1.0]}, "shard_gain", [1.0]),
    ("tpla", {"shard_norm": "sharded", "shard_share": [0.5, 0.0]}, "shard_share", 0.0),
    ("tpla", {"shard_norm": "sharded", "shard_share": [1.0]}, "shard_share", [1.0]),
    ("tpla", {"shard_share": [0.5, 0.5]}, "shard_share", [0.5, 0.5]),
    ("tpla", {"shard_norm": "sharded", "latent_norm": False}, "shard_norm", "sharded"),
    ("tpla", {"shard_norm": "local"}, "shard_norm", "local"),
    ("tpla", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("tpla", {"kv_lora_rank": 32}, "kv_lora_rank", 32),
    ("elitekv", {"num_rope_pairs": -1}, "num_rope_pairs", -1),
    ("elitekv", {"num_rope_pairs": 3}, "num_rope_pairs", 3),
    ("elitekv", {"num_rope_pairs": 1, "pos": "none"}, "num_rope_pairs", 1),
    ("elitekv", {"head_dim": 5}, "head_dim", 5),
    ("elitekv", {"kv_rank": 0}, "kv_rank", 0),
    ("elitekv", {"kv_rank": 17}, "kv_rank", 17),
    ("elitekv", {"num_kv_heads": 1, "kv_rank": 7}, "kv_rank", 7),
    ("elitekv", {"rope_pairs": "file"}, "rope_pairs_file", None),
    ("elitekv", {"rope_pairs_file": "pairs.json"}, "rope_pairs_file", "pairs.json"),
    ("elitekv", {"rope_pairs": "file", "rope_pairs_file": "no-such.json"}, "rope_pairs_file", "no-such.json"),
    ("elitekv", {"rope_pairs": "low", "num_rope_pairs": 0}, "rope_pairs", "low"),
    ("elitekv", {"rope_pairs": [[0, 1]], "num_rope_pairs": 2}, "rope_pairs", "([0, 1],)"),
    ("elitekv", {"rope_pairs": [[2]] * 4, "num_rope_pairs": 1}, "rope_pairs", [2]),
    ("elitekv", {"rope_pairs": "middle"}, "rope_pairs", "middle"),
    ("elitekv", {"rope_theta": 0.0}, "rope_theta", 0.0),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}") as error:
        attnzoo.create(name, D, H, **options)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("name, add", [("gla_latent", "mqa"), ("tpla", "gqa"), ("mtla", "gqa")])
def test_sharing_heads_on_top_is_refused(name: str, add: str) -> None:
    with pytest.raises(ValueError, match=r"^num_kv_heads: .*latent"):
        attnzoo.create(name, 32, 8, add=add)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    "name, options",
    [
        ("gla_latent", SIZES | {"latent_dim": 6}),
        ("gla_latent", SIZES | {"num_latent_heads": 4, "latent_dim": 3, "q_lora_rank": 6}),
        ("gla_latent", {"pos": "none"}),
        ("tpla", SIZES | {"kv_lora_rank": 8, "latent_shards": 4, "shard_gain": (1.0, 2.0, 0.5, 1.5)}),
        ("tpla", SIZES | {"kv_lora_rank": 8, "shard_norm": "sharded"}),
        ("tpla", {"pos": "none", "shard_gain": (1.5, 0.5)}),
        ("mtla", SIZES | {"kv_lora_rank": 8, "down_rate": 3}),
        ("mtla", {"pos": "none", "q_lora_rank": 6}),
        ("elitekv", {"num_rope_pairs": 1, "kv_rank": 7}),
        ("elitekv", {"num_rope_pairs": 1, "num_kv_heads": 2, "kv_rank": 5}),
        ("elitekv", {"num_rope_pairs": 2}),
        ("elitekv", {"num_rope_pairs": 0, "num_kv_heads": 1}),
        ("mfa_kr", {"head_dim": 6}),
        ("mfa_kr", {"head_dim": 5, "pos": "none"}),
    ],
    ids=str,
)
def test_absorbed_is_materialised(name: str, options: dict, window, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x, outputs = build(name, window=window, **options), tokens(), {}
    for param in mixer.parameters():
        if param.dim() == 1:
            param.add_(torch.randn_like(param) / 3)
    for absorbs in (False, True):
        monkeypatch.setattr(mixer.project, "absorbs", lambda new, keys, absorbs=absorbs: absorbs)
        cache = mixer.new_cache(2, T)
        steps = [mixer(part, cache=cache) for part in x.split([4, 3, 1, 1], dim=1)]
        outputs[absorbs] = mixer(x), mixer(x, Context(segment_ids=IDS)), torch.cat(steps, dim=1)
    for materialised, absorbed in zip(*outputs.values(), strict=True):
        same(absorbed, materialised)
    same(outputs[True][2], outputs[True][0])


@pytest.mark.parametrize("name", ["gla_latent", "tpla", "mtla", "elitekv", "mfa_kr"])
def test_absorbs_where_it_is_cheaper(name: str) -> None:
    project = attnzoo.create(name, 512, 8).project
    assert project.absorbs(1, 1000) and not project.absorbs(1000, 1000)


CACHED = [
    ("gla_latent", SIZES | {"num_latent_heads": 4, "latent_dim": 3}, 4 * 3 + 4, 0),
    ("tpla", SIZES | {"kv_lora_rank": 8, "latent_shards": 4}, 8 + 4, 0),
    ("mtla", SIZES | {"kv_lora_rank": 8, "down_rate": 4}, (8 + 4) / 4, 8),
    ("elitekv", {"num_kv_heads": 2, "num_rope_pairs": 1, "kv_rank": 7}, 2 * 2 + 7, 0),
    ("mfa", {"head_dim": 6}, 2 * 6, 0),
    ("mfa_kr", {"head_dim": 6}, 6, 0),
]


@pytest.mark.parametrize("name, options, numbers, state", CACHED, ids=str)
def test_what_is_cached(name: str, options: dict[str, Any], numbers: float, state: int) -> None:
    cost = attnzoo.create(name, D, H, **options).cost(100, torch.bfloat16)
    assert (cost.cache_bytes_per_token, cost.state_bytes) == (2 * numbers, 4 * state)


@pytest.mark.parametrize(
    "name, one", [("gla_latent", {"num_latent_heads": 1, "latent_dim": 8}), ("tpla", {"latent_shards": 1})]
)
def test_one_part_is_mla(name: str, one: dict[str, Any]) -> None:
    both = SIZES | {"q_lora_rank": 6}
    host = build("mla", kv_lora_rank=8, **both)
    rank = {} if name == "gla_latent" else {"kv_lora_rank": 8}
    x = tokens()
    same(with_weights_of(host, build(name, **both, **one, **rank))(x), host(x))


def test_gla_is_an_mla_with_a_block_diagonal_up_map() -> None:
    grouped = build("gla_latent", latent_dim=6, latent_norm=False, **SIZES)
    whole = build("mla", kv_lora_rank=12, latent_norm=False, **SIZES)
    up = grouped.project.kv_up.weight  # (H * 8, 6), the first half of the rows from the first latent
    blocks = torch.block_diag(*up.chunk(2))
    weights = grouped.state_dict() | {"project.kv_up.weight": blocks}
    whole.load_state_dict(weights)
    x = tokens()
    same(grouped(x), whole(x))


def gla(x: Tensor, w: dict[str, Tensor], g: int, norm: bool) -> Tensor:
    d_n, d_r, d_v = SIZES.values()
    queries, (d_l, n) = split(x @ w["W_q"], H), w["W_ukv"].shape[1:]
    down = x @ w["W_dkv"]
    k_r, outs = rotate(down[:, g * d_l :], 10000.0), []
    for h in range(H):
        r = h // (H // g)
        c = down[:, r * d_l : (r + 1) * d_l]
        c = rms(c, w["gamma_kv"][r]) if norm else c
        both = (c @ w["W_ukv"][r]).split(d_n + d_v, dim=1)[h % (H // g)]
        q, q_r = queries[h][:, :d_n], rotate(queries[h][:, d_n:], 10000.0)
        s = (q @ both[:, :d_n].T + q_r @ k_r.T) / (d_n + d_r) ** 0.5
        outs.append(softmax_rows(s, causal(len(x))) @ both[:, d_n:])
    assert n == H // g * (d_n + d_v)
    return torch.cat(outs, dim=1) @ w["W_o"]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("g", [1, 2, 4])
def test_gla_is_its_equations(g: int, norm: bool) -> None:
    mixer = build("gla_latent", num_latent_heads=g, latent_dim=5, latent_norm=norm, **SIZES)
    p = mixer.project
    w = {"W_q": p.q_up.weight.T, "W_dkv": p.kv_down.weight.T, "W_o": mixer.out.out_proj.weight.T}
    w["W_ukv"] = p.kv_up.weight.T.unflatten(1, (g, -1)).transpose(0, 1)
    if norm:
        p.kv_gain.copy_(torch.rand(g * 5) + 0.5)
        w["gamma_kv"] = p.kv_gain.unflatten(0, (g, 5))
    x = tokens()
    same(mixer(x), torch.stack([gla(row, w, g, norm) for row in x]))


def test_tpla_is_mla_where_the_slices_agree_on_the_weights() -> None:
    host, sliced, x = build("mla", **SIZES), build("tpla", latent_shards=2, **SIZES), tokens()
    # without content keys every slice sees the rotary scores alone
    host.project.kv_up.weight.unflatten(0, (H, 8))[:, :3] = 0
    same(with_weights_of(host, sliced)(x), host(x))


def test_tpla_depends_on_the_basis_of_the_latent_and_mla_does_not() -> None:
    x, turn = tokens(), torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    for name, matters in (("mla", False), ("tpla", True)):
        mixer = build(name, kv_lora_rank=8, **SIZES)
        before, p = mixer(x), mixer.project
        p.kv_down.weight[:8] = turn.T @ p.kv_down.weight[:8]
        p.kv_up.weight.copy_(p.kv_up.weight @ turn)
        assert torch.allclose(mixer(x), before) != matters


def test_tpla_composes_with_mixtures_over_heads() -> None:
    subject = Subject.of("tpla", add=("dcmha",))
    for prop in ("decode", "documents", "flops"):
        PROPERTIES[prop](subject)


def elite(x: Tensor, mixer: Mixer, pairs: list[list[int]], d: int, G: int) -> Tensor:
    """In the original order of channels: whole heads, of which only the pairs of F are turned."""
    p, r, outs = mixer.project, len(pairs[0]), []
    down = x @ p.kv_down.weight.T
    c, k_e = down[:, : p.rank], split(down[:, p.rank :], G) if r else []
    for h, query in enumerate(split(x @ p.q_up.weight.T, H)):
        g = h * G // H
        both = split(c @ p.kv_up.weight.T, G)[g]
        chosen = [f + half for half in (0, d // 2) for f in pairs[g]]
        rest = [i for i in range(d) if i not in chosen]
        heads, n = [], d - 2 * r
        for content, turned in ((query[:, :n], query[:, n:]), (both[:, :n], k_e[g] if r else c[:, :0])):
            whole = torch.zeros(len(x), d, dtype=x.dtype)
            whole[:, rest], whole[:, chosen] = content, turned
            spun = rotate(whole, 10000.0)
            whole[:, chosen] = spun[:, chosen]
            heads.append(whole)
        p_ij = softmax_rows(heads[0] @ heads[1].T / d**0.5, causal(len(x)))
        outs.append(p_ij @ both[:, n:])
    return torch.cat(outs, dim=1) @ mixer.out.out_proj.weight.T


FILES: dict[str, Callable[[int, int, int], list]] = {
    "uniform": lambda G, r, n: [[(2 * m + 1) * n // (2 * r) for m in range(r)]] * G,
    "high": lambda G, r, n: [list(range(r))] * G,
    "low": lambda G, r, n: [list(range(n - r, n))] * G,
    "file": lambda G, r, n: [[(g + 2 * m) % n for m in range(r)] for g in range(G)],
    "table": lambda G, r, n: [[(g + 3 * m) % n for m in range(r)] for g in range(G)],
}


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("r", [0, 1, 2, 4])
@pytest.mark.parametrize("source", FILES)
def test_elitekv_turns_the_pairs_of_each_head_only(source: str, r: int, G: int, tmp_path: Path) -> None:
    if r == 0 and source != "uniform":
        return
    d, pairs = 8, FILES[source](G, r, 4) if r else [[]] * G
    pairs = [sorted(set(row)) for row in pairs]
    if any(len(row) < r for row in pairs):
        pairs = [list(range(r))] * G
    options = {"head_dim": d, "num_kv_heads": G, "num_rope_pairs": r}
    table = [[row[::-1] for row in pairs]] * 2
    if source == "table":
        options |= {"layer_idx": 1, "num_layers": 2} if G == 2 else {}
        source = table if G == 2 else table[0]
    if source == "file":
        path = tmp_path / "pairs.json"
        path.write_text(json.dumps(table))
        options |= {"rope_pairs_file": str(path), "layer_idx": 1, "num_layers": 2}
    mixer, x = build("elitekv", rope_pairs=source, **options), tokens()
    same(mixer(x), torch.stack([elite(row, mixer, pairs, d, G) for row in x]))


def test_elitekv_with_all_pairs_and_a_full_latent_is_gqa() -> None:
    host, mixer = build("gqa", num_kv_heads=2), build("elitekv", num_kv_heads=2, num_rope_pairs=2, kv_rank=8)
    q, k, v = host.project.qkv_proj.weight.split([16, 8, 8])
    mixer.project.q_up.weight.copy_(q)
    mixer.project.kv_down.weight.copy_(torch.cat([v, k]))
    mixer.project.kv_up.weight.copy_(torch.eye(8))
    mixer.out.load_state_dict(host.out.state_dict())
    x = tokens()
    same(mixer(x), host(x))


def test_elitekv_refuses_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    rows = ([0, 0], [0, 4], [-1, 0], [0.5, 1], [0, 1, 2])
    for table in ({"pairs": 1}, [[0, 1], [0]], [[0, 1]], [[[0, 1]] * 2], *([row, row[::-1]] for row in rows)):
        path.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=r"^rope_pairs_file"):
            choose_pairs("file", str(path), 2, 2, 4, layer=1)
        if isinstance(table, list):
            with pytest.raises(ValueError, match=r"^rope_pairs: "):
                choose_pairs(tuple(table), None, 2, 2, 4, layer=1)
