"""Conversions into and between latent layers: X-EcoMLA's start from singular vectors, and MLA to TPLA.

All matrices act as ``x @ W``; factorisations run in fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.convert.layer import Layer, heads_of, side_by_side
from attnzoo.convert.rope import Latent, principal

MULTIPLE = 8  # ranks found from energy are rounded up to it


def energy_rank(W: Tensor, energy: float) -> int:
    """Leading singular values whose squares sum to at most ``energy`` of the total, at least one, rounded up
    to a multiple of 8 (but not beyond what there are).
    """
    squares = torch.linalg.svdvals(W).square()
    count = max(1, int((squares.cumsum(0) / squares.sum() <= energy).sum()))
    return min(-(-count // MULTIPLE) * MULTIPLE, -(-len(squares) // MULTIPLE) * MULTIPLE)


def x_eco_mla(
    layer: Layer, rank: int, q_rank: int, d_n: int, d_r: int, energy: float | None = None
) -> Latent:
    """X-EcoMLA (2503.11132): latent weights from the singular vectors of the queries and of keys and values.

    A start for further training, not the same function even at full rank unless there are no positions: the
    rotary channels are the last of each head, paired anew. They are ordered so that rotating halves here
    pairs the channels that the released code pairs as neighbours.

    Args:
        rank, q_rank: of keys and values, of queries; with ``energy`` found from it instead.
        d_n, d_r: content and rotary width per head; overlapping where they exceed the head.
    """
    H, G, d = layer.heads, layer.kv_heads, layer.head_dim
    if (d_r > 0) != (layer.theta is not None):
        raise ValueError(
            f"qk_rope_head_dim: must be {'0' if layer.theta is None else 'positive'} as the source has "
            f"{'no' if layer.theta is None else 'rotary'} positions, got {d_r}"
        )
    for name, value, least in (("qk_nope_head_dim", d_n, 1), ("qk_rope_head_dim", d_r, 0)):
        if not least <= value <= d:
            raise ValueError(f"{name}: must be in {least}..head_dim={d}, got {value}")
    W_q, W_k, W_v = (layer.weights[f"W_{n}"] for n in "qkv")
    K, V = (heads_of(W, G).repeat_interleave(H // G, 0) for W in (W_k, W_v))
    joint = torch.cat([side_by_side(K), side_by_side(V)], dim=1)
    if energy is not None:
        rank, q_rank = energy_rank(joint, energy), energy_rank(W_q, energy)
    last = torch.arange(d - d_r, d)
    order = torch.cat([last[::2], last[1::2]])
    down_q, up_q = _factors(W_q, q_rank, "q_lora_rank")
    up_q = heads_of(up_q, H)
    W_uq = side_by_side(torch.cat([up_q[..., :d_n], up_q[..., order]], dim=-1))
    down, up = _factors(joint, rank, "kv_lora_rank")
    up_k, up_v = (heads_of(z, H) for z in up.split(H * d, dim=1))
    W_ukv = side_by_side(torch.cat([up_k[..., :d_n], up_v], dim=-1))
    W_kr = heads_of(W_k, G)[..., order].mean(0)
    return Latent(down_q, W_uq, torch.cat([down, W_kr], dim=1), W_ukv, layer.weights["W_o"])


def _factors(W: Tensor, rank: int, field: str) -> tuple[Tensor, Tensor]:
    """``W ~ down @ up``, with the singular values in ``down``."""
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"{field}: must be in 1..{min(W.shape)}, got {rank}")
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]


class Sharded(NamedTuple):
    """Weights of `tpla`, with the share of energy and the logit gain of each slice of the latent."""

    weights: dict[str, Tensor]
    energy: list[float]
    gain: list[float]


def tensor_parallel(layer: Layer, shards: int, basis: str = "pca", seed: int = 0) -> Sharded:
    """MLA to TPLA (2508.15881): the latent in a basis whose slices can be read apart.

    Folding the norm's gain and changing the basis are exact for mla; a norm and a softmax per slice are the
    approximation. A slice's scores stand for those of the whole latent, so they are divided by its share of
    the energy; our choice is to do so in both bases (the paper says it of pca): on trained models it takes
    most of the change of the logits away.

    Args:
        layer: of an mla, with symbols ``W_dkv``, ``gamma_kv``, ``W_ukv`` and the query's.
        basis: "pca" of the latents before their norm on calibration text, or "hadamard" with random signs,
            for a rank that is a power of two.
    """
    weights = dict(layer.weights)
    rank = weights["W_ukv"].shape[0]
    if shards < 1 or rank % shards:
        raise ValueError(f"latent_shards: must divide the latent's {rank} channels, got {shards}")
    up = weights["W_ukv"]
    if "gamma_kv" in weights:
        up = weights["gamma_kv"][:, None] * up
        weights["gamma_kv"] = torch.ones_like(weights["gamma_kv"])
    down, rope = weights["W_dkv"][:, :rank], weights["W_dkv"][:, rank:]
    bias = weights.get("b_dkv", torch.zeros(1).to(down).expand(weights["W_dkv"].shape[1]))
    if basis == "pca":
        c = (layer.inputs() @ down + bias[:rank]).flatten(0, 1)
        U = principal(c)
        spectrum = (c @ U).square().sum(0)
        energy = (spectrum.unflatten(0, (shards, -1)).sum(1) / spectrum.sum()).tolist()
    elif basis == "hadamard":
        U, energy = hadamard(rank, seed), [1 / shards] * shards
    else:
        raise ValueError(f"basis: must be 'pca' or 'hadamard', got {basis!r}")
    weights |= {"W_dkv": torch.cat([down @ U, rope], dim=1), "W_ukv": U.T @ up}
    if "b_dkv" in weights:
        weights["b_dkv"] = torch.cat([bias[:rank] @ U, bias[rank:]])
    return Sharded(weights, energy, [1 / share for share in energy])


def hadamard(n: int, seed: int) -> Tensor:
    """Orthogonal ``(n, n)``: random signs times Sylvester's matrix.

    Raises:
        ValueError: n is no power of two.
    """
    if n & (n - 1):
        raise ValueError(f"basis: hadamard needs a latent rank that is a power of two, got {n}; use pca")
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    signs = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs[:, None] * H / n**0.5
