"""flare and l2vit against loops over tokens, their identities, what they refuse, and what papers let leak."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from oracles import causal, rms, rotate, softmax_rows
from tiny import D, H, T, d, same, tokens
from zoo.test_hybrid import GOLDEN, affine, build, norm


def conv(z: Tensor, taps: Tensor) -> Tensor:
    """Depthwise over the past of one sequence ``(T, C)``; the last tap is the token's own."""
    out, n = torch.zeros_like(z), taps.shape[1]
    for t in range(len(z)):
        for back in range(min(n, t + 1)):
            out[t] += taps[:, n - 1 - back] * z[t - back]
    return out


# flare


def side(project: Any, name: str, x: Tensor) -> Tensor:
    *hidden, last = getattr(project, name)
    h = x
    for layer in hidden:
        h = h + torch.nn.functional.gelu(affine(h, layer), approximate="tanh")
    h = affine(h, last) + (h if hidden else 0)
    return conv(h, getattr(project, f"conv_{name}")) if project.taps else h


def flare(
    mixer: Mixer, x: Tensor, scale: float = 1.0, theta: float | None = None, normed: bool = False
) -> Tensor:
    """One sequence by two softmaxes per token."""
    G, Q, heads = mixer.project.groups, mixer.gates.Q, []
    k, v = (side(mixer.project, name, x).chunk(G, dim=1) for name in "kv")
    for h in range(H):
        own = k[h * G // H]
        write = rms(own, mixer.refine[0].k_gain, 1e-5) if normed else own
        read = rms(own, mixer.refine[0].q_gain, 1e-5) if normed else own
        write, read = (scale * rotate(z, theta) @ Q[h].T for z in (write, read))
        o = torch.zeros(len(x), v[0].shape[1]).double()
        for t in range(len(x)):
            Z = write[: t + 1].softmax(0).T @ v[h * G // H][: t + 1]  # (M, d)
            o[t] = read[t].softmax(0) @ Z
        heads.append(o)
    return affine(torch.cat(heads, dim=1), mixer.out.out_proj)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_latents": 3, "short_conv": False, "attn_scale": 0.5},
        {"num_latents": 5, "kv_mlp_depth": 0},
        {"num_latents": 5, "kv_mlp_depth": 3, "conv_kernel": 2},
        {"num_kv_heads": 2, "pos": "rope"},
        {"qk_norm": True, "qkv_bias": False, "out_bias": False, "num_latents": 4},
    ],
    ids=str,
)
def test_flare_is_two_softmaxes(options: dict[str, Any]) -> None:
    mixer, x = build("flare", chunk_size=4, **options), tokens()
    theta = 10000.0 if "pos" in options else None
    more = {"scale": options.get("attn_scale", 1.0), "theta": theta, "normed": "qk_norm" in options}
    same(mixer(x), torch.stack([flare(mixer, row, **more) for row in x]))


def test_flare_latents_are_prefix_means_not_sequence_means() -> None:
    mixer, x = build("flare", num_latents=4), tokens()
    y, changed = mixer(x), x.clone()
    changed[:, -1] += 10
    same(mixer(changed)[:, :-1], y[:, :-1])
    same(mixer(x[:, :4]), y[:, :4])


def test_flare_weights_are_a_mean_of_low_rank() -> None:
    mixer = build("flare", dim=8, heads=1, num_latents=3, short_conv=False, qkv_bias=False, out_bias=False)
    for layer in (mixer.project.v[0], mixer.out.out_proj):
        layer.weight.copy_(torch.eye(8))
    weights = mixer(torch.eye(8).double()[None])[0]
    assert (weights >= 0).all() and (weights.triu(1) == 0).all()
    same(weights.sum(-1), torch.ones(8).double())


def test_flare_with_one_latent_forgets_who_reads() -> None:
    mixer, x = build("flare", num_latents=1, short_conv=False), tokens(1, T, D)
    k, v = (affine(x[0], getattr(mixer.project, name)[0]).chunk(H, dim=1) for name in "kv")
    means = [(k[h] @ mixer.gates.Q[h].T).softmax(0).T @ v[h] for h in range(H)]
    same(mixer(x)[0, -1], affine(torch.cat(means, dim=1), mixer.out.out_proj)[0])


def test_flare_scores_once_unless_queries_are_their_own() -> None:
    plain = attnzoo.create("flare", D, H)
    assert plain.gates.once
    for options in ({"pos": "rope"}, {"qk_norm": True}, {"add": ("kha",)}):
        mixer = attnzoo.create("flare", D, H, **options)
        assert not mixer.gates.once
        work = [w.flops for w in mixer.gates.work(T)]
        assert work == [2 * w.flops for w in plain.gates.work(T)]


def test_flare_survives_scores_that_overflow_exp() -> None:
    mixer = build("flare", num_latents=4, short_conv=False)
    mixer.gates.Q.mul_(3000)
    x = tokens().requires_grad_()
    y = mixer(x)
    same(y, torch.stack([flare(mixer, row) for row in x]))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert bool(grad.isfinite().all())


# l2vit


def linear_layer(
    mixer: Mixer, x: Tensor, stream: Tensor, delta: float, G: int = H, theta: float | None = None
) -> Tensor:
    if hasattr(mixer.project, "place"):
        x = x + conv(x, mixer.project.place)
    q, k, v = affine(x, mixer.project.qkv_proj).split([H * d, G * d, G * d], dim=1)
    q, k = q.clamp(min=0).chunk(H, dim=1), k.clamp(min=0).chunk(G, dim=1)
    v, heads = v.chunk(G, dim=1), []
    for h in range(H):
        g, o = h * G // H, torch.zeros(len(x), d).double()
        turned_q, turned_k = rotate(q[h], theta), rotate(k[g], theta)
        for t in range(len(x)):
            total = sum(float(q[h][t] @ k[g][j]) for j in range(t + 1))
            o[t] = sum((turned_q[t] @ turned_k[j]) * v[g][j] for j in range(t + 1)) / max(total, delta)
        heads.append(mixer.combine[0].tau[h] * o)
    y = affine(torch.cat(heads, dim=1), mixer.out.out_proj)
    if not len(mixer.after):
        return y
    lcm = mixer.after[0]
    z = conv(norm(stream + y, lcm.ln_gain, lcm.ln_bias), lcm.first)
    z = rms(z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), lcm.mid_gain, 1e-5)
    return y + conv(z, lcm.second)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"denom_min": 0.05, "lcm_kernel": 3, "cpe_kernel": 2},
        {"lcm_kernel": 0, "cpe_kernel": 0, "num_kv_heads": 2},
        {"pos": "rope", "denom_min": 0.3},
    ],
    ids=str,
)
def test_l2vit_linear_layer(options: dict[str, Any]) -> None:
    mixer = build("l2vit", layer_idx=1, num_layers=2, **options)
    x, stream = tokens(), tokens()
    more = {"G": options.get("num_kv_heads", H), "theta": 10000.0 if "pos" in options else None}
    delta = options.get("denom_min", 1.0)
    want = [linear_layer(mixer, a, b, delta, **more) for a, b in zip(x, stream, strict=True)]
    same(mixer(x, Context(residual=stream)), torch.stack(want))


@pytest.mark.parametrize("mode", ["sliding", "block"])
@pytest.mark.parametrize("cpe", [0, 3])
def test_l2vit_window_layer(mode: str, cpe: int) -> None:
    mixer, x = build("l2vit", window=3, window_mode=mode, cpe_kernel=cpe), tokens()
    block = torch.arange(T) // 3
    seen = causal(T, 3) if mode == "sliding" else causal(T) & (block[:, None] == block)
    want = []
    for row in x:
        z = row + conv(row, mixer.project.place) if cpe else row
        q, k, v = (p.chunk(H, dim=1) for p in affine(z, mixer.project.qkv_proj).chunk(3, dim=1))
        o = [softmax_rows(q[h] @ k[h].T / math.sqrt(d), seen) @ v[h] for h in range(H)]
        want.append(affine(torch.cat(o, dim=1), mixer.out.out_proj))
    same(mixer(x), torch.stack(want))


def test_l2vit_golden_linear_attention() -> None:
    file = torch.load(GOLDEN / "l2vit.op.pt", weights_only=True)
    given, w = file["spec_options"], file["weights"]
    options = {"denom_min": given["denom_min"], "lcm_kernel": 0, "cpe_kernel": 0}
    mixer = (
        attnzoo.create("l2vit", 24, given["num_heads"], layer_idx=1, num_layers=2, **options)
        .double()
        .requires_grad_(False)
    )
    mixer.project.qkv_proj.weight.copy_(torch.cat([w["W_q"], w["W_k"], w["W_v"]], dim=1).T)
    mixer.project.qkv_proj.bias.copy_(torch.cat([w["b_q"], w["b_k"], w["b_v"]]))
    mixer.out.out_proj.weight.copy_(w["W_o"].T)
    mixer.out.out_proj.bias.copy_(w["b_o"])
    mixer.combine[0].tau.copy_(w["tau"])
    torch.testing.assert_close(mixer(file["x"]), file["y"], rtol=1e-9, atol=1e-11)
    cache = mixer.new_cache(2, 25)
    y = torch.cat([mixer(z, cache=cache) for z in file["x"].split([7] + [1] * 18, dim=1)], dim=1)
    torch.testing.assert_close(y, file["y"], rtol=1e-9, atol=1e-11)


def test_l2vit_reduces_to_linear_and_to_mha() -> None:
    bare = {"lcm_kernel": 0, "cpe_kernel": 0, "qkv_bias": False, "out_bias": False}
    mixer, x = build("l2vit", layer_idx=1, num_layers=2, denom_min=1e-9, **bare), tokens()
    mixer.combine[0].tau.fill_(1.0)
    other = build("linear", feature_map="relu", pos="none")
    other.load_state_dict({k: v for k, v in mixer.state_dict().items() if "tau" not in k})
    other.combine[0].eps = 0.0
    alive = mixer(x)
    # a token whose features are all zero has no weights at all
    dead = other(x).isnan()
    same(alive.masked_fill(dead, 0), other(x).masked_fill(dead, 0))
    window, mha = build("l2vit", window=T, **bare), build("mha", pos="none")
    mha.load_state_dict(window.state_dict())
    same(window(x), mha(x))


def test_l2vit_convolutions_do_not_look_ahead() -> None:
    """Centred convolutions and batch statistics, as published, would."""
    for layer in (0, 1):
        mixer, x = build("l2vit", layer_idx=layer, num_layers=2, window=4), tokens()
        changed = x.clone()
        changed[:, 5:] = tokens()[:, 5:]
        same(mixer(changed)[:, :5], mixer(x)[:, :5])
        same(mixer.train()(x[:1]), mixer(x)[:1])


def test_l2vit_layers_follow_the_pattern() -> None:
    pattern = ("linear", "window", "window")
    frames = [
        type(attnzoo.create("l2vit", D, H, layer_idx=i, num_layers=6, layer_pattern=pattern)).__name__
        for i in range(6)
    ]
    assert frames == ["RecurrentAttention", "ScoreAttention", "ScoreAttention"] * 2


REFUSED = [
    ("flare", {"num_latents": 0}, "num_latents", 0),
    ("flare", {"kv_mlp_depth": -2}, "kv_mlp_depth", -2),
    ("flare", {"kv_mlp_depth": 1, "num_kv_heads": 2}, "kv_mlp_depth", 2),
    ("flare", {"attn_scale": 0.0}, "attn_scale", 0.0),
    ("flare", {"conv_kernel": 0}, "conv_kernel", 0),
    ("flare", {"chunk_size": 0}, "chunk_size", 0),
    ("flare", {"window": 4}, "window", 4),
    ("l2vit", {"layer_pattern": ()}, "layer_pattern", "()"),
    ("l2vit", {"layer_pattern": ("window", "global")}, "layer_pattern[1]", "global"),
    ("l2vit", {"denom_min": 0.0}, "denom_min", 0.0),
    ("l2vit", {"lcm_kernel": -1}, "lcm_kernel", -1),
    ("l2vit", {"cpe_kernel": -1}, "cpe_kernel", -1),
    ("l2vit", {"window": 0}, "window", 0),
    ("l2vit", {"window": None, "window_mode": "block"}, "window", None),
    ("l2vit", {"n_sink": 2, "window_mode": "block"}, "window", 2),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, D, H, **options)
    assert str(caught.value).startswith(f"{field}: ") and str(value) in str(caught.value)


def test_l2vit_branches_start_small() -> None:
    """The local branch is added to the stream beside the attention's output, and starts no louder than it."""
    torch.manual_seed(0)
    mixer = attnzoo.create("l2vit", 64, 4, layer_idx=1, num_layers=4)
    x = torch.randn(2, 32, 64)
    assert mixer(x).square().mean().sqrt() < 0.1
