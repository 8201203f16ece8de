"""mano against its definition with loops over coarse tokens, its identities, and its golden rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from tiny import D, H, T, same, tokens
from zoo.test_hybrid import GOLDEN, affine, build, norm


def window_attention(core: Any, x: Tensor) -> Tensor:
    """One level, one sequence ``(n, D)``: every token reads the earlier ones of its block."""
    z = norm(norm(x, core.ln1_gain, core.ln1_bias), core.ln2_gain, core.ln2_bias)
    q, k, v = affine(z, core.qkv).split([core.dim, core.kv_dim, core.kv_dim], dim=-1)
    q = q.unflatten(-1, (core.heads, -1))
    k, v = (
        p.unflatten(-1, (core.kv_heads, -1)).repeat_interleave(core.heads // core.kv_heads, 1) for p in (k, v)
    )
    if core.norm is not None:
        q, k = (
            p / (p.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain
            for p, gain in ((q, core.norm.q_gain), (k, core.norm.k_gain))
        )
    o = torch.zeros_like(q)
    for i in range(len(x)):
        for h in range(core.heads):
            seen = slice(i // core.window * core.window, i + 1)
            p = (k[seen, h] @ q[i, h] / math.sqrt(q.shape[-1])).softmax(0)
            o[i, h] = p @ v[seen, h]
    return affine(o.flatten(1), core.out)


def multipole(core: Any, x: Tensor) -> Tensor:
    """The pyramid by its definition; only complete coarse tokens exist."""
    r, levels = core.rate, [x]
    for _ in range(core.levels - 1):
        fine, coarse = levels[-1], []
        for c in range(len(fine) // r):
            parts = fine[c * r : c * r + r]
            if core.down is None:
                coarse.append(parts.mean(0))
            else:
                coarse.append(sum(parts[j] @ core.down[j] for j in range(r)))
        levels.append(torch.stack(coarse) if coarse else x[:0])
    res = window_attention(core, levels[-1])
    for n, level in enumerate(range(core.levels - 2, -1, -1)):
        own = window_attention(core, levels[level])
        for i in range(len(own)):
            c = (i + 1) // r - 1
            if c >= 0:
                own[i] += (res[c] if core.up is None else res[c] @ core.up[(i + 1) % r]) / (n + 1)
        res = own
    return res


@pytest.mark.parametrize(
    "options",
    [
        {"levels": 3, "window": 4},
        {"levels": 2, "rate": 3, "window": 3, "down": "avg"},
        {"levels": 4, "window": 2, "up": "avg"},
        {"levels": 3, "window": 1, "down": "avg", "up": "avg"},
        {"levels": 2, "window": 5, "num_kv_heads": 2, "qk_norm": True, "qkv_bias": True},
        {},
    ],
    ids=str,
)
def test_mano_is_the_pyramid_of_its_definition(options: dict[str, Any]) -> None:
    mixer, x = build("mano", **options), tokens(2, 37, D)
    same(mixer(x), torch.stack([multipole(mixer.core, row) for row in x]))


def test_mano_golden_rows() -> None:
    file = torch.load(GOLDEN / "mano.op.pt", weights_only=True)
    options, w = dict(file["spec_options"]), file["weights"]
    mixer = attnzoo.create("mano", 16, options.pop("num_heads"), **options).double().requires_grad_(False)
    core = mixer.core
    for name in ("ln1", "ln2"):
        getattr(core, f"{name}_gain").copy_(w[f"{name}_w"])
        getattr(core, f"{name}_bias").copy_(w[f"{name}_b"])
    core.qkv.weight.copy_(torch.cat([w["W_q"], w["W_k"], w["W_v"]], dim=1).T)
    core.out.weight.copy_(w["W_o"].T)
    core.out.bias.copy_(w["b_o"])
    core.down.copy_(w["down"])
    core.up.copy_(w["up"])
    rows = file["extra"]["rows"]
    torch.testing.assert_close(mixer(file["x"])[:, rows], file["y"], rtol=1e-9, atol=1e-12)
    cache = mixer.new_cache(2, 48)
    y = torch.cat([mixer(z, cache=cache) for z in file["x"].split(1, dim=1)], dim=1)
    torch.testing.assert_close(y[:, rows], file["y"], rtol=1e-9, atol=1e-12)


def test_mano_reads_a_coarse_token_only_when_it_is_complete() -> None:
    mixer = build("mano", levels=3, window=4)
    x = tokens(1, 16, D).requires_grad_()
    y = mixer(x)
    reached = torch.stack(
        [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(-1) for i in range(16)]
    )
    assert (reached.triu(1) == 0).all(), "a later token is read"
    assert (reached.tril() > 0).sum() == 136, "w r^(L-1) = T: everything before is read"


def test_mano_of_one_wide_level_is_mha_and_without_up_windows() -> None:
    mixer, x = build("mano", levels=1, window=T), tokens()
    mha = attnzoo.create("mha", D, H, pos="none", out_bias=True).double().requires_grad_(False)
    mha.project.qkv_proj.weight.copy_(mixer.core.qkv.weight)
    mha.out.out_proj.weight.copy_(mixer.core.out.weight)
    mha.out.out_proj.bias.copy_(mixer.core.out.bias)
    c = mixer.core
    same(mixer(x), mha(norm(norm(x, c.ln1_gain, c.ln1_bias), c.ln2_gain, c.ln2_bias)))
    mixer = build("mano", levels=3, window=3)
    mixer.core.up.zero_()
    same(mixer(x), torch.stack([window_attention(mixer.core, row) for row in x]))


def test_mano_default_levels_are_the_most_that_fit() -> None:
    assert build("mano", max_seq_len=256, window=16).core.levels == 5
    assert build("mano", max_seq_len=255, window=16).core.levels == 4
    assert build("mano", max_seq_len=8, window=16).core.levels == 1
