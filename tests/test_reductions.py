"""What variants with shared keys, latents and windows reduce to, by hand or by each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from attnzoo.ops.attention import Keys, attention
from tiny import D, H, T, build, d, projections, same, tokens, with_weights_of


def test_permuting_heads_changes_nothing() -> None:
    mixer, x, order = build("mha"), tokens(), torch.tensor([2, 0, 3, 1])
    before = mixer(x)
    weight, out = mixer.project.qkv_proj.weight, mixer.out.out_proj.weight
    weight.copy_(torch.cat([z[order].flatten(0, 1) for z in projections(mixer, H, H, H)]))
    out.copy_(out.reshape(D, H, d)[:, order].flatten(1))
    same(mixer(x), before)


@pytest.mark.parametrize("name", ["mha", "mqa", "gqa", "mla", "moh", "kha", "dcmha", "sliding_window"])
def test_shifting_all_positions_changes_nothing(name: str) -> None:
    mixer, x = build(name), tokens()
    shifted = Context(positions=torch.arange(T)[None] + 77)
    same(mixer(x, shifted), mixer(x))
    scaled = Context(positions=torch.arange(T)[None] * 2)
    assert not torch.allclose(mixer(x, scaled), mixer(x)), "positions should matter otherwise"


def test_rotation_of_linear_features_is_relative_too() -> None:
    mixer, x = build("linear"), tokens()
    same(mixer(x, Context(positions=torch.arange(T)[None] + 77)), mixer(x))


def test_gqa_with_all_heads_is_mha_and_with_one_is_mqa() -> None:
    x = tokens()
    for name, groups in (("mha", H), ("mqa", 1)):
        host = build(name)
        same(with_weights_of(host, build("gqa", num_kv_heads=groups))(x), host(x))


@pytest.mark.parametrize("name, groups", [("gqa", 2), ("mqa", 1)])
def test_shared_heads_are_mha_with_copies(name: str, groups: int) -> None:
    few, many, x = build(name, **({"num_kv_heads": groups} if name == "gqa" else {})), build("mha"), tokens()
    q, k, v = projections(few, H, groups, groups)
    k, v = (z.repeat_interleave(H // groups, dim=0) for z in (k, v))
    many.project.qkv_proj.weight.copy_(torch.cat([z.flatten(0, 1) for z in (q, k, v)]))
    many.out.load_state_dict(few.out.state_dict())
    same(few(x), many(x))


def latent(**options: Any) -> Mixer:
    sizes = {"qk_nope_head_dim": 3, "qk_rope_head_dim": 4, "v_head_dim": 5, "kv_lora_rank": 8} | options
    return build("mla", **sizes)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("q_rank", [0, 6])
def test_absorbed_is_materialised(q_rank: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = latent(q_lora_rank=q_rank, window=window), tokens()
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
    outputs = {}
    for absorbs in (False, True):
        monkeypatch.setattr(mixer.project, "absorbs", lambda new, keys, absorbs=absorbs: absorbs)
        outputs[absorbs] = mixer(x), mixer(x, Context(segment_ids=ids))
    for materialised, absorbed in zip(*outputs.values(), strict=True):
        same(absorbed, materialised)


def test_mla_absorbs_where_it_is_cheaper() -> None:
    project = attnzoo.create("mla", 512, 8).project
    assert project.absorbs(1, 1000) and not project.absorbs(1000, 1000)


def test_gqa_without_positions_is_an_mla() -> None:
    groups, x = 2, tokens()
    gqa = build("gqa", num_kv_heads=groups, pos="none")
    mla = build("mla", kv_lora_rank=2 * groups * d, latent_norm=False, pos="none")
    q, k, v = projections(gqa, H, groups, groups)
    mla.project.q_up.weight.copy_(q.flatten(0, 1))
    mla.project.kv_down.weight.copy_(torch.cat([k, v]).flatten(0, 1))
    blocks = mla.project.kv_up.weight.zero_().reshape(H, 2, d, 2, groups, d)
    for h in range(H):
        for part in range(2):
            blocks[h, part, :, part, h * groups // H] = torch.eye(d)
    mla.out.load_state_dict(gqa.out.state_dict())
    same(mla(x), gqa(x))


def test_queries_without_latent_are_an_identity_latent() -> None:
    plain, ranked, x = latent(latent_norm=False), latent(latent_norm=False, q_lora_rank=D), tokens()
    with_weights_of(plain, ranked).project.q_down.weight.copy_(torch.eye(D))
    same(ranked(x), plain(x))


def test_latent_channels_have_no_order() -> None:
    mixer, x, order = latent(), tokens(), torch.randperm(8)
    mixer.project.kv_gain.copy_(torch.rand(8) + 0.5)
    before = mixer(x)
    project = mixer.project
    project.kv_down.weight[:8] = project.kv_down.weight[:8][order].clone()
    project.kv_gain.copy_(project.kv_gain[order].clone())
    project.kv_up.weight.copy_(project.kv_up.weight[:, order].clone())
    same(mixer(x), before)


@pytest.mark.parametrize("n_sink", [0, 3])
def test_a_window_of_the_whole_sequence_is_mha(n_sink: int) -> None:
    x, host = tokens(), build("mha")
    wide, narrow = (
        with_weights_of(host, build("sliding_window", window=window, n_sink=n_sink))(x)
        for window in (T, T - n_sink - 1)
    )
    same(wide, host(x))
    assert not torch.allclose(narrow, host(x))


def test_a_window_of_one_is_the_own_value() -> None:
    mixer, x = build("sliding_window", window=1, n_sink=0), tokens()
    values = x @ mixer.project.qkv_proj.weight[2 * D :].T
    same(mixer(x), values @ mixer.out.out_proj.weight.T)


@pytest.mark.parametrize("window, n_sink", [(1, 0), (1, 1), (3, 0), (3, 2), (2, 5)])
def test_rows_of_a_window_have_the_stated_size_and_keys_leave_for_good(window: int, n_sink: int) -> None:
    seen = build("sliding_window", window=window, n_sink=n_sink).mask.mask.dense(12)
    for i, row in enumerate(seen.tolist()):
        assert sum(row) == min(i + 1, window + min(n_sink, max(0, i + 1 - window)))
    for j in range(12):
        column = seen[j:, j].int()
        assert (column[1:] <= column[:-1]).all()


def test_softmax_identities() -> None:
    q, k, v = (tokens(1, H, T, d) for _ in range(3))
    o, more = attention(q, Keys(k, v), also=("p", "lse"))
    p = more["p"]
    same(p.sum(-1), torch.ones(1, H, T).double())
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1)
    assert (entropy <= torch.arange(1, T + 1).double().log() + 1e-12).all()
    # the entropy without the weights: read the keys as values
    mean_key = attention(q, Keys(k, torch.cat([v, k], dim=-1)))[..., d:]
    same(entropy, more["lse"] - d**-0.5 * (q * mean_key).sum(-1))
    # a key that is the same for all queries and keys adds a constant to each row
    one = torch.ones(1, H, T, 1).double()
    same(attention(torch.cat([q, one], -1), Keys(torch.cat([k, 5 * one], -1), v), scale=d**-0.5), o)
    order = torch.cat([torch.randperm(T - 1), torch.tensor([T - 1])])
    same(attention(q[:, :, -1:], Keys(k[:, :, order], v[:, :, order])), o[:, :, -1:])
