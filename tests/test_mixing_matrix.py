"""`attnzoo.testing.mixing_matrix` against weights made by hand, and what the table says of a variant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from attnzoo.testing import mixing_matrix
from tiny import D, H, T, tokens

d = D // H


def build(name: str, **options: object) -> Mixer:
    mixer = attnzoo.create(name, D, H, **options).double().requires_grad_(False)
    for param in mixer.parameters():
        param.add_(0.3 * torch.randn_like(param))
    return mixer


def heads_of(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """q, k, v ``(B, H, T, d)`` of a plain projection."""
    y = x @ mixer.project.qkv_proj.weight.T
    return [z.unflatten(-1, (-1, d)).transpose(1, 2) for z in y.split(mixer.project.sizes, -1)]


def test_of_softmax_attention() -> None:
    mixer, x = build("mha", pos="none"), tokens()
    q, k, v = heads_of(mixer, x)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    want = (q @ k.mT / d**0.5).masked_fill(later, -torch.inf).softmax(-1)
    P = mixing_matrix(mixer, x)
    torch.testing.assert_close(P, want)
    torch.testing.assert_close((P @ v).transpose(1, 2).flatten(2) @ mixer.out.out_proj.weight.T, mixer(x))


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_of_retention(chunk_size: int) -> None:
    mixer, x = build("retnet", pos="none", expand_v=1, chunk_size=chunk_size), tokens()
    q, k, _ = heads_of(mixer, x)
    step = torch.arange(T)
    pace = (1 - 2.0 ** (-5 - torch.arange(H).double()))[:, None, None]
    want = (q @ k.mT / d**0.5 * pace ** (step[:, None] - step).clamp(min=0)).tril()
    torch.testing.assert_close(mixing_matrix(mixer, x), want)


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_of_the_delta_rule_is_its_quadratic_form(chunk_size: int) -> None:
    mixer, x = build("deltanet", use_short_conv=False, chunk_size=chunk_size), tokens()
    q, k = (torch.nn.functional.silu(z) for z in heads_of(mixer, x)[:2])
    q, k = (z / (z.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    beta = torch.sigmoid(x @ mixer.gates.beta.weight.T).transpose(1, 2)[..., None]
    system = torch.eye(T).double() + (beta * (k @ k.mT)).tril(-1)
    want = (q @ k.mT).tril() @ torch.linalg.inv(system) @ torch.diag_embed(beta[..., 0]) / d**0.5
    torch.testing.assert_close(mixing_matrix(mixer, x), want, rtol=1e-8, atol=1e-10)


# row sums are 1 up to the eps of the denominator
NORMALISED = [
    ("linear", {"pos": "none"}),
    ("linear", {"feature_map": "hedgehog", "pos": "none"}),
    ("mala", {"pos": "none"}),
    ("rala", {"pos": "none"}),
    ("rala", {"pos": "none", "mode": "prefix_exact"}),
    ("based", {"feature_dim": 4}),
    ("fast_factorizable", {}),
    ("fast_factorizable", {"order": 1, "norm": "unit"}),
    ("flare", {"num_latents": 5}),
    ("linformer", {"mode": "blocks", "block_size": 4, "share_kv_proj": True}),
]
SIGNED = ("mala",)


@pytest.mark.parametrize("name, options", NORMALISED, ids=[f"{n}-{o}" for n, o in NORMALISED])
def test_rows_of_normalised_variants(name: str, options: dict) -> None:
    P = mixing_matrix(build(name, **options), tokens())
    if name == "linformer":  # its landmarks are sums with weights of their own
        P = P[:, :, :4]
    torch.testing.assert_close(P.sum(-1), torch.ones(2, H, P.shape[2]).double(), rtol=1e-4, atol=1e-4)
    assert (P.triu(1) == 0).all()
    assert name in SIGNED or (P >= 0).all()


@pytest.mark.parametrize("name", ["gla", "hgrn2", "mamba2", "gated_deltanet", "kda", "rwkv7", "log_linear"])
def test_causality_is_a_lower_triangle_within_documents(name: str) -> None:
    mixer, x = build(name, chunk_size=4), tokens()
    ids = torch.tensor([[1] * 4 + [2] * (T - 4), [3] * T])
    P, whole = mixing_matrix(mixer, x, Context(segment_ids=ids)), mixing_matrix(mixer, x)
    assert (P.triu(1) == 0).all() and (P[0, :, 4:, :4] == 0).all()
    assert (whole[:, :, 4:, :4] != 0).any()
    torch.testing.assert_close(P[:1, :, :4, :4], mixing_matrix(mixer, x[:1, :4]))
    torch.testing.assert_close(P[1], whole[1])


def test_a_mask_that_looks_ahead_shows() -> None:
    P = mixing_matrix(build("efficient_dlm", block_size=4), tokens())
    blocks = torch.arange(T) // 4
    assert ((P > 0) == (blocks[:, None] >= blocks)).all()


def test_refusals_and_what_is_left_behind() -> None:
    x = tokens()
    for name in ("grassmann", "mla", "recurrent_memory_chunked"):
        mixer = build(name)
        before = [n for n, _ in mixer.named_modules()]
        with pytest.raises(ValueError, match=rf"mixer: .*got '{name}'"):
            mixing_matrix(mixer, x)
        assert before == [n for n, _ in mixer.named_modules()]
    mixer = build("linear")
    y = mixer(x)
    mixing_matrix(mixer, x)
    assert torch.equal(mixer(x), y)
    with pytest.raises(ValueError, match=r"segment_ids: .*0"):
        mixing_matrix(mixer, x, Context(segment_ids=torch.tensor([[1] * (T - 1) + [0]] * 2)))
    mixer.refine[0].rank, mixer.combine[0].rank = 0, 0
    bend = attnzoo.create("gla", D, H, expand_k=1.0).double().combine[0]
    bend.rank = 5
    mixer.combine.append(bend)
    with pytest.raises(ValueError, match="linear"):
        mixing_matrix(mixer, x)
