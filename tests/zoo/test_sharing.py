"""wgqa, sqa, fixed_head_size, diffqkv, kv_shift and kvt: identities, loops over their equations, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.attention.base import Mixer
from attnzoo.attention.sharing.wgqa import merge
from oracles import causal, rotate, softmax_rows
from tiny import D, H, T, d, same, tokens, with_weights_of

IDS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 3], [0, 4, 4, 4, 4, 4, 4, 5, 5]])


def build(name: str, dim: int = D, heads: int = H, **options: Any) -> Mixer:
    """A mixer with scattered weights: no start hides a mistake."""
    mixer = attnzoo.create(name, dim, heads, **options).double().requires_grad_(False)
    for param in mixer.parameters():
        param.copy_(torch.randn_like(param) * 0.5)
    return mixer


def heads_of(weight: Tensor, heads: int) -> Tensor:
    """``(heads * d, D)`` as ``(heads, D, d)`` for ``x @ W``."""
    return weight.unflatten(0, (heads, -1)).mT


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], theta: float | None = 1e4) -> Tensor:
    """``(T, H d_v)`` of one sequence: one key and one value head for each query head."""
    outs = []
    for one_q, one_k, one_v in zip(q, k, v, strict=True):
        s = rotate(one_q, theta) @ rotate(one_k, theta).T / one_q.shape[1] ** 0.5
        outs.append(softmax_rows(s, causal(len(s))) @ one_v)
    return torch.cat(outs, dim=1)


def out(mixer: Mixer, o: Tensor) -> Tensor:
    return o @ mixer.out.out_proj.weight.T


def each_row(mixer: Mixer, one: Any) -> None:
    """The mixer against ``one(x (T, D)) -> (T, H d_v)``, as a whole, decoded and in documents."""
    x = tokens()
    y = torch.stack([out(mixer, one(row)) for row in x])
    same(mixer(x), y)
    cache = mixer.new_cache(2, T)
    same(torch.cat([mixer(part, cache=cache) for part in x.split([2, 1, 3, 1, 2], 1)], 1), y)
    packed = mixer(x, Context(segment_ids=IDS))
    for b, row in enumerate(IDS):
        for ident in set(row.tolist()) - {0}:
            where = row == ident
            same(packed[b, where], out(mixer, one(x[b, where])))


def refuses(name: str, options: dict[str, Any], field: str, value: object) -> None:
    """The error begins with the field, says a rule, and shows the value."""
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, D, **{"num_heads": H, **options})
    message = str(caught.value)
    assert re.fullmatch(rf"{field}: .{{15,}}", message), message
    assert str(value) in message


def accepts(name: str, options: dict[str, Any]) -> None:
    """The composition exists, and decodes as it runs at once."""
    options = {"num_heads": H, **options}
    mixer, x = build(name, heads=options.pop("num_heads"), **options), tokens()
    y = mixer(x)
    assert y.shape == x.shape and y.isfinite().all()
    for sizes in ([T - 1, 1], [1] * T, [3, 1, 4, 1]):
        cache = mixer.new_cache(2, T)
        same(torch.cat([mixer(part, cache=cache) for part in x.split(sizes, 1)], 1), y)


# wgqa


@pytest.mark.parametrize("kind", ["scalar", "row", "col"])
def test_wgqa_sums_heads_in_the_weights(kind: str) -> None:
    mixer = build("wgqa", num_kv_heads=2, weight_kind=kind, qkv_bias=True)
    blocks, bias = heads_of(mixer.project.qkv_proj.weight, 3 * H), mixer.project.qkv_proj.bias.view(3 * H, d)

    def merged(side: int, g: int) -> tuple[Tensor, Tensor]:
        total, b = 0.0, 0.0
        for h in (2 * g, 2 * g + 1):
            w = (mixer.project.k_weights, mixer.project.v_weights)[side][h]
            total = total + (w[:, None] if kind == "row" else w) * blocks[H + side * H + h]
            b = b + (w.mean() if kind == "row" else w) * bias[H + side * H + h]
        return total, b

    def one(x: Tensor) -> Tensor:
        q = [x @ blocks[h] + bias[h] for h in range(H)]
        k, v = ([x @ W + b for W, b in (merged(side, g) for g in (0, 0, 1, 1))] for side in (0, 1))
        return attend(q, k, v)

    each_row(mixer, one)


@pytest.mark.parametrize("kind", ["scalar", "row", "col"])
def test_wgqa_starts_as_the_mean_and_merges(kind: str) -> None:
    mixer = build("wgqa", num_kv_heads=2, weight_kind=kind)
    gqa, x = build("gqa", num_kv_heads=2), tokens()
    gqa.load_state_dict(merge(mixer))
    same(gqa(x), mixer(x))
    for side in "kv":
        getattr(mixer.project, f"{side}_weights").fill_(0.5)
    pooled = mixer.project.qkv_proj.weight.unflatten(0, (3, H // 2, 2, d)).mean(2)[1:]
    queries = mixer.project.qkv_proj.weight[: H * d]
    gqa.project.qkv_proj.weight.copy_(torch.cat([queries, pooled.flatten(0, 2)]))
    same(gqa(x), mixer(x))
    fresh = attnzoo.create("wgqa", D, H, num_kv_heads=2, weight_kind=kind)
    assert (fresh.project.k_weights == 0.5).all() and (fresh.project.v_weights == 0.5).all()
    one = attnzoo.create("wgqa", D, H, num_kv_heads=1, weight_kind=kind)
    assert (one.project.k_weights == 0.25).all(), "the mean of four"
    drawn = attnzoo.create("wgqa", D, H, num_kv_heads=2, weight_kind=kind, weight_init="random")
    assert drawn.project.k_weights.std() > 0.1


def test_wgqa_picks_a_head_and_is_mha_with_weights_one() -> None:
    mixer, x = build("wgqa", num_kv_heads=2), tokens()
    for side in "kv":
        getattr(mixer.project, f"{side}_weights").copy_(torch.tensor([0.0, 1, 1, 0]))
    q, k, v = mixer.project.qkv_proj.weight.unflatten(0, (3, H, d))
    gqa = build("gqa", num_kv_heads=2)
    gqa.out.load_state_dict(mixer.out.state_dict())
    picked = [q, k[[1, 2]], v[[1, 2]]]
    gqa.project.qkv_proj.weight.copy_(torch.cat([z.flatten(0, 1) for z in picked]))
    same(gqa(x), mixer(x))
    whole = build("wgqa", num_kv_heads=H, weight_kind="col")
    for side in "kv":
        getattr(whole.project, f"{side}_weights").fill_(1.0)
    same(with_weights_of(whole, build("mha"))(x), whole(x))


def test_wgqa_costs_gqa_and_its_sums() -> None:
    cost, gqa = (attnzoo.create(n, D, H, num_kv_heads=2).cost(64) for n in ("wgqa", "gqa"))
    assert cost.forward_flops == gqa.forward_flops and cost.cache_bytes_per_token == gqa.cache_bytes_per_token
    assert cost.weight_flops == 2 * 2 * H * D * d and cost.params == 4 * D * H * d + 2 * H


def test_wgqa_merges_under_a_scan() -> None:
    mixer, x = build("linear", add=("wgqa",), num_kv_heads=2, weight_kind="row"), tokens()
    plain = build("linear", num_kv_heads=2)
    plain.load_state_dict(merge(mixer))
    same(plain(x), mixer(x))


# sqa


def test_sqa_reduces_to_gqa_and_narrow_mha() -> None:
    x, options = tokens(), {"num_query_heads": 2, "num_kv_heads": 1}
    mixer = build("sqa", **options)
    same(with_weights_of(mixer, build("gqa", heads=2, head_dim=d, num_kv_heads=1))(x), mixer(x))
    whole = build("sqa", num_query_heads=H, num_kv_heads=2)
    same(with_weights_of(whole, build("gqa", num_kv_heads=2))(x), whole(x))
    narrow = build("sqa", setting="ssqa")
    same(with_weights_of(narrow, build("mha", heads=2, head_dim=d))(x), narrow(x))


@pytest.mark.parametrize("query, key", [(2, 4), (1, 3), (6, 3), (3, 6)])
def test_sqa_shares_either_way(query: int, key: int) -> None:
    mixer = build("sqa", 2 * 8, 8, head_dim=d, num_query_heads=query, num_kv_heads=key)
    blocks = heads_of(mixer.project.qkv_proj.weight, query + 2 * key)

    def one(x: Tensor) -> Tensor:
        q, k, v = ([x @ W for W in part] for part in blocks.split([query, key, key]))
        if key > query:
            return attend([q[j % query] for j in range(key)], k, v)
        return attend(q, *([z[h * key // query] for h in range(query)] for z in (k, v)))

    each_row(mixer, one)


@pytest.mark.parametrize(
    "setting, heads",
    [("sqa", (4, 2)), ("ssqa", (4, 4)), ("xsqa", (2, 2)), ("xsmqa", (2, 1)), ("rsqa", (2, 4))],
)
def test_sqa_settings(setting: str, heads: tuple[int, int]) -> None:
    mixer, full = attnzoo.create("sqa", 32, 8, setting=setting), attnzoo.create("mha", 32, 8)
    assert mixer.project.heads == (*heads, heads[1])
    scores = mixer.cost(512).split["mixing"] / full.cost(512).split["mixing"]
    assert scores == max(heads) / 8  # fewer scores is the point
    assert mixer.out.out_proj.weight.shape == (32, max(heads) * 4)
    assert attnzoo.create("sqa", 32, 8, setting=setting, num_kv_heads=1).project.heads[1] == 1


# fixed_head_size


def test_fixed_head_size_keeps_its_width_and_rank() -> None:
    x = tokens()
    same(with_weights_of(mixer := build("fixed_head_size", head_dim=d), build("mha"))(x), mixer(x))
    for heads in (1, 2, 8):
        mixer = attnzoo.create("fixed_head_size", D, heads, head_dim=6)
        assert mixer.cost(8).params == 4 * D * heads * 6 and mixer.scale == 6**-0.5
    mixer = build("fixed_head_size", heads=1, head_dim=3, pos="none")
    q, k, _ = mixer.project.qkv(tokens(1, 12, D), None)
    assert torch.linalg.matrix_rank((q @ k.mT)[0, 0]) == 3


# diffqkv


@pytest.mark.parametrize("key_dim", [None, 3])
@pytest.mark.parametrize("aug_dim", [0, 10])
@pytest.mark.parametrize("G_k, G_v", [(1, 2), (2, 1), (2, 4)])
def test_diffqkv_equation(key_dim: int | None, aug_dim: int, G_k: int, G_v: int) -> None:
    counts = {"num_key_heads": G_k, "num_value_heads": G_v}
    mixer = build("diffqkv", aug_dim=aug_dim, key_dim=key_dim, **counts)
    project, width = mixer.project, key_dim or d

    def one(x: Tensor) -> Tensor:
        z = x @ project.qkv_proj.weight.T
        q, k, v = z.split([H * d, G_k * width, G_v * d], dim=1)
        if aug_dim:
            gate, up = (q @ project.augment.up.weight.T).chunk(2, dim=1)
            q = (gate / (1 + (-gate).exp()) * up) @ project.augment.down.weight.T
        k, v = k.split(width, dim=1), v.split(d, dim=1)
        if key_dim:
            k = [z @ project.k_up.weight.T for z in k]
        return attend(list(q.split(d, 1)), *([z[h * len(z) // H] for h in range(H)] for z in (k, v)))

    each_row(mixer, one)
    assert mixer.new_cache(1, 7).nbytes == 7 * 8 * (G_k * width + G_v * d)


def test_diffqkv_reduces() -> None:
    x = tokens()
    mixer = build("diffqkv", aug_dim=0, num_key_heads=2, num_value_heads=2)
    same(with_weights_of(mixer, build("gqa", num_kv_heads=2))(x), mixer(x))
    mixer = build("diffqkv", aug_dim=0, num_key_heads=2, num_value_heads=H)
    repeated = build("diffqkv", aug_dim=0, num_key_heads=H, num_value_heads=H)
    q, k, v = mixer.project.qkv_proj.weight.split([H * d, 2 * d, H * d])
    keys = k.unflatten(0, (2, d)).repeat_interleave(2, 0).flatten(0, 1)
    repeated.project.qkv_proj.weight.copy_(torch.cat([q, keys, v]))
    repeated.out.load_state_dict(mixer.out.state_dict())
    same(repeated(x), mixer(x))
    same(with_weights_of(repeated, build("mha"))(x), mixer(x))
