"""Identities of linear and recurrent variants, told by their tables of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.call import Call
from attnzoo.testing import mixing_matrix
from tiny import D, H, T, tokens

d = D // H


def build(name: str, **options: object) -> Mixer:
    mixer = attnzoo.create(name, D, H, **options).double().requires_grad_(False)
    for param in mixer.parameters():
        param.add_(0.3 * torch.randn_like(param))
    return mixer


def heads_of(mixer: Mixer, x: Tensor) -> list[Tensor]:
    y = x @ mixer.project.qkv_proj.weight.T
    return [
        z.unflatten(-1, (n, -1)).transpose(1, 2)
        for z, n in zip(y.split(mixer.project.sizes, -1), mixer.project.heads, strict=True)
    ]


def decayed(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """``sum_d q_t k_j exp(G_t - G_j)`` for j <= t; g ``(B, H, T, d or 1)``."""
    sums = g.cumsum(2)
    carry = (sums[:, :, :, None] - sums[:, :, None]).exp()
    return (q[:, :, :, None] * k[:, :, None] * carry).sum(-1).tril()


def test_rescorla_wagner_is_the_delta_rule() -> None:
    constant = {"eta": 1.0, "lam": 1.0, "learn_eta": False, "learn_lambda": False}
    rule, x = build("pavlovian", rule="rescorla_wagner", **constant), tokens()
    delta = build("deltanet", use_short_conv=False, qk_activation="identity", use_beta=False)
    delta.project.load_state_dict(rule.project.state_dict())
    torch.testing.assert_close(mixing_matrix(rule, x), mixing_matrix(delta, x) * d**0.5)
    rule.gates.eta = (0.5, False)
    assert (mixing_matrix(rule, x) - mixing_matrix(delta, x) * d**0.5).abs().max() > 1e-3


class Louder(Stage):
    """Query features times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return self.factor * q, k, v


def test_louder_queries_scale_what_mala_adds_to_linear_attention() -> None:
    """Plain normalised attention forgets the magnitude; here the covariance term grows with it."""
    mala, linear, x = build("mala", pos="none", qkv_bias=False), build("linear", pos="none"), tokens()
    linear.project.load_state_dict(mala.project.state_dict())
    plain, once = mixing_matrix(linear, x), mixing_matrix(mala, x)
    for mixer in (mala, linear):
        mixer.refine.append(Louder(3.0))
    torch.testing.assert_close(mixing_matrix(linear, x), plain, rtol=1e-5, atol=1e-5)
    assert (once - plain).abs().max() > 1e-2
    torch.testing.assert_close(mixing_matrix(mala, x) - plain, 3 * (once - plain), rtol=1e-4, atol=1e-4)


def test_gla_with_equal_channels_has_a_scalar_gate() -> None:
    mixer, x = build("gla", expand_k=1.0, gate_logit_normalizer=1.0), tokens()
    first = mixer.gates.up.weight.unflatten(0, (H, d))[:, :1]
    mixer.gates.up.weight.copy_(first.expand(-1, d, -1).flatten(0, 1))
    mixer.gates.up.bias.copy_(mixer.gates.up.bias.unflatten(0, (H, d))[:, :1].expand(-1, d).flatten())
    g = nn.functional.logsigmoid(mixer.gates.up(mixer.gates.down(x))).unflatten(-1, (H, d))[..., :1]
    q, k, _ = heads_of(mixer, x)
    want = decayed(q, k, g.transpose(1, 2)) / d**0.5
    torch.testing.assert_close(mixing_matrix(mixer, x), want)


def test_rwkv7_that_removes_nothing_has_a_diagonal_gate() -> None:
    mixer, x = build("rwkv7", chunk_size=4), tokens()
    mixer.gates.a0.fill_(-800.0)
    seen = {}
    mixer.scan.register_forward_pre_hook(lambda stage, args: seen.update(terms=args[0]))
    P, project = mixing_matrix(mixer, x), mixer.project
    last = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    r, k = ((x + project.mu[i] * (last - x)) @ w.weight.T for i, w in ((0, project.r), (2, project.k)))
    k = k * (1 - mixer.gates.k_a)
    r, k = (z.unflatten(-1, (H, d)).transpose(1, 2) for z in (r, k))
    torch.testing.assert_close(P, decayed(r, k, seen["terms"].g.transpose(1, 2)))


def test_hgrn2_with_a_bound_near_one_writes_next_to_nothing() -> None:
    """The room left by the bound is kept to all its digits, not lost in 1 - f."""
    mixer, x = build("hgrn2", layer_idx=2, num_layers=3), tokens()
    stage = next(stage for stage in mixer.refine if hasattr(stage, "bounds"))
    stage.bounds.Gamma.zero_()
    stage.bounds.Gamma[0] = -40.0
    small = mixing_matrix(mixer, x)
    stage.bounds.Gamma[0] = -41.0
    assert 0 < float(small.abs().max()) < 1e-14
    torch.testing.assert_close(mixing_matrix(mixer, x), small / math.e, rtol=1e-9, atol=0)


def test_flare_with_a_latent_per_token_copies() -> None:
    mixer = attnzoo.create("flare", T, 1, num_latents=T, short_conv=False, qkv_bias=False).double()
    mixer.requires_grad_(False)
    mixer.project.k[0].weight.copy_(torch.eye(T))
    mixer.gates.Q.copy_(40 * torch.eye(T)[None])
    P = mixing_matrix(mixer, torch.eye(T).double()[None])
    torch.testing.assert_close(P[0, 0], torch.eye(T).double(), rtol=0, atol=1e-12)
