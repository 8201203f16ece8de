"""Temporal latent attention: the paper's decoding loop, its mask, its two-part read, what it reduces to."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention import timeline
from attnzoo.attention.base import Mixer
from attnzoo.attention.call import Call
from attnzoo.attention.latent.chunk_read import ChunkEnds, ChunkRead
from attnzoo.attention.score import Single
from attnzoo.attention.site import Site
from attnzoo.attention.stages.mask import Causal, band
from attnzoo.context import Context
from attnzoo.ops.attention import Keys, attention
from attnzoo.testing import PROPERTIES, Subject
from oracles import rms, rotate, split
from tiny import D, H, T, build, same, tokens, with_weights_of

SIZES = {"qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5, "kv_lora_rank": 8}
IDS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 4, 4, 4]])

REFUSED: list[tuple[dict[str, Any], str, object]] = [
    ({"down_rate": 0}, "down_rate", 0),
    ({"kv_lora_rank": 7, "hyper_reduction": 1}, "kv_lora_rank", 7),
    ({"kv_lora_rank": 10}, "kv_lora_rank", 10),
    ({"kv_lora_rank": 32}, "kv_lora_rank", 32),
    ({"hyper_reduction": 0}, "hyper_reduction", 0),
    ({"latent_norm": "none"}, "latent_norm", "none"),
    ({"num_kv_heads": 2}, "num_kv_heads", 2),
    ({"n_sink": 2}, "n_sink", 2),
    ({"add": "dcmha"}, "add", "Compose"),
    ({"impl": "xformers"}, "impl", "xformers"),
]


@pytest.mark.parametrize("options, field, value", REFUSED, ids=str)
def test_refused(options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}") as error:
        attnzoo.create("mtla", D, H, **options)
    assert str(value) in str(error.value)


def scattered(**options: Any) -> Mixer:
    mixer = build("mtla", **SIZES | options)
    for param in mixer.project.parameters():
        if param.dim() == 1:
            param.add_(torch.randn_like(param) / 2)
    return mixer


def decoded(x: Tensor, mixer: Mixer, s: int, layernorm: bool, window: int | None, sinks: int) -> Tensor:
    """The paper's decoding: one list of rows, of which the last grows while its chunk does."""
    p, rows, outs = mixer.project, [], []
    d_n, d_r, d_v = (SIZES[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

    def norm(z: Tensor, side: str) -> Tensor:
        if layernorm:
            z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()
            return z * getattr(p, f"{side}_gain") + getattr(p, f"{side}_shift")
        return rms(z, getattr(p, f"{side}_gain"), 1e-5)

    down = x @ p.kv_down.weight.T
    k_r = rotate(down[:, 8:], 10000.0)
    c_q = torch.stack([norm(z, "q") for z in x @ p.q_down.weight.T]) if p.q_rank else x
    queries = [split(z[None], H) for z in c_q @ p.q_up.weight.T]
    rotary = [rotate(torch.stack([q[h][0, d_n:] for q in queries]), 10000.0) for h in range(H)]
    for t in range(len(x)):
        c, n = norm(down[t, :8], "kv"), t // s
        code = [f(n / 10000 ** (2 * m / 8)) for m in range(4) for f in (math.sin, math.cos)]
        a = p.chunk_map.weight @ torch.tensor(code, dtype=x.dtype) + p.chunk_map.bias
        w = torch.sigmoid(a @ (p.token_map.weight @ c + p.token_map.bias))
        if t % s == 0:
            rows.append((w * c, k_r[t], t))
        else:
            rows[-1] = (rows[-1][0] + w * c, k_r[t], t)
        near = [row for row in rows if window is None or t - row[2] < window or row[2] < sinks]
        heads = []
        for h in range(H):
            up = p.kv_up.weight.split(d_n + d_v)[h]
            q = queries[t][h][0, :d_n]
            score = [(q @ up[:d_n] @ c + rotary[h][t] @ k) / (d_n + d_r) ** 0.5 for c, k, _ in near]
            weights = torch.stack(score).exp() / torch.stack(score).exp().sum()
            heads.append(sum(p * (up[d_n:] @ c) for p, (c, _, _) in zip(weights, near, strict=True)))
        outs.append(mixer.out.out_proj.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("window, sinks", [(None, 0), (3, 0), (2, 3)])
@pytest.mark.parametrize("layernorm, q_rank", [(True, 6), (False, 6), (True, 0)])
@pytest.mark.parametrize("s", [1, 2, 3, 4, 20])
def test_one_forward_is_the_decoding_loop(s: int, layernorm: bool, q_rank: int, window, sinks: int) -> None:
    norm = "layernorm" if layernorm else "rmsnorm"
    mixer = scattered(down_rate=s, latent_norm=norm, q_lora_rank=q_rank, window=window, n_sink=sinks)
    x = tokens()
    expected = torch.stack([decoded(row, mixer, s, layernorm, window, sinks) for row in x])
    same(mixer(x), expected)
    cache = mixer.new_cache(2, T)
    same(torch.cat([mixer(part, cache=cache) for part in x.split([1, 4, 1, 3], dim=1)], dim=1), expected)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 2, "n_sink": 2}, {"pos": "none"}], ids=str)
def test_two_parts_are_one_softmax_under_the_mask(options: dict[str, Any]) -> None:
    if options.get("pos") == "none":
        options = options | {"qk_rope_head_dim": 0}
    mixer, x, outputs = scattered(down_rate=3, **options), tokens(), []
    for read in (mixer.read, Single()):
        mixer.read = read
        cache = mixer.new_cache(2, T)
        parts = [slice(0, 4), slice(4, 9)]
        packed = [mixer(x[:, part], Context(segment_ids=IDS[:, part]), cache) for part in parts]
        outputs.append((mixer(x), mixer(x, Context(segment_ids=IDS)), torch.cat(packed, dim=1)))
    for two, one in zip(*outputs, strict=True):
        same(two, one)
    same(outputs[0][2], outputs[0][1])


def test_the_mask_shows_finished_chunks_and_ones_own_place() -> None:
    table = ChunkEnds(3, Causal()).dense(10)
    for i in range(10):
        assert table[i].nonzero()[:, 0].tolist() == [j for j in range(i) if j % 3 == 2] + [i]
    near = ChunkEnds(3, band(4, 1)).dense(10)
    assert near[9].nonzero()[:, 0].tolist() == [8, 9] and near[7].nonzero()[:, 0].tolist() == [5, 7]


@pytest.mark.parametrize("options", [{"down_rate": 7}, {"down_rate": 40}, {"down_rate": 1}], ids=str)
def test_chunks_of_any_length_keep_the_contract(options: dict[str, Any]) -> None:
    subject = Subject.of("mtla", **options)
    for prop in ("decode", "documents", "document_gradients", "document_decode", "unequal_prompts", "flops"):
        PROPERTIES[prop](subject)


def test_mtla_chunks_begin_at_documents_and_know_no_later_token() -> None:
    mixer, x = scattered(down_rate=4), tokens(1, 8, D)
    cache = mixer.new_cache(1, 8)
    mixer(x, cache=cache)
    latent = cache.slots["latent"].reshape(2, 8)
    shorter = mixer.new_cache(1, 8)
    mixer(x[:, :4], cache=shorter)
    same(latent[0], shorter.slots["latent"].reshape(2, 8)[0])
    packed = mixer(x, Context(segment_ids=torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])))
    same(packed[:, 3:], mixer(x[:, 3:]))


def test_mtla_does_not_see_the_partial_sums_of_its_own_chunk() -> None:
    mixer, x = scattered(down_rate=4), tokens(1, 4, D)
    # one chunk: every token sees one key, so its output is its own chunk so far through W_ukv and W_o
    p, values = mixer.project, []
    up = p.kv_up.weight.unflatten(0, (H, 8))[:, 3:].flatten(0, 1)
    for t in range(4):
        cache = mixer.new_cache(1, 4)
        mixer(x[:, : t + 1], cache=cache)
        values.append(mixer.out.out_proj.weight @ up @ cache.slots["chunk"][0])
    same(mixer(x)[0], torch.stack(values))


def test_every_token_its_own_chunk_with_weights_of_one_is_mla() -> None:
    host = build("mla", q_lora_rank=6, norm_eps=1e-5, **SIZES)
    mixer = build("mtla", down_rate=1, latent_norm="rmsnorm", q_lora_rank=6, **SIZES)
    for part in (mixer.project.chunk_map, mixer.project.token_map):
        part.weight.zero_()
        part.bias.fill_(10)
    x = tokens()
    same(with_weights_of(host, mixer)(x), host(x))


def test_the_read_costs_a_fraction() -> None:
    costs = {s: attnzoo.create("mtla", 64, 4, down_rate=s).cost(1024) for s in (1, 4)}
    assert costs[4].split["mixing"] < 0.26 * costs[1].split["mixing"]
    plain = attnzoo.create("mla", 64, 4).cost(1024).split["mixing"]
    assert costs[1].split["mixing"] == plain
    mixing = [c.executed_flops - sum(c.split[k] for k in ("projections", "gates")) for c in costs.values()]
    assert mixing[1] < 0.26 * mixing[0]


def test_own_scores_survive_low_precision() -> None:
    """259 is no number of bf16: rounded, the own key would weigh 2.7 times what an equal chunk end does."""
    q, x = torch.ones(1, 1, 4, 4).bfloat16(), torch.zeros(1, 4, 4)
    k = torch.tensor([65.0, 65.0, 65.0, 64.0]).expand(1, 1, 4, 4).bfloat16()
    v = torch.arange(8.0).reshape(1, 1, 4, 2).bfloat16()
    line = timeline.read(Context(), 1, 4, x.device)
    call = Call(Site(), x, Context(), line, None)
    keys = Keys(k, v, call.mem.block_axis(2))
    for impl in ("sdpa", "reference"):
        attend = partial(attention, query=call.query, scale=1.0, impl=impl)
        o = ChunkRead(2, Causal(), (1, 4, 2, 0))(q, keys, attend, call)[0, 0].float()
        same(o, torch.tensor([[0.0, 1.0], [2.0, 3.0], [3.0, 4.0], [4.0, 5.0]]))
