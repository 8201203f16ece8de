"""Conversions that take the rotation from most key channels: partial RoPE with a joint factor, and TransMLA.

All matrices act as ``x @ W`` and heads lie side by side. A pair of RoPE is channels ``f`` and ``f + d/2`` of
a head. Factorisations run in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.convert.layer import Layer, by_head


class Partial(NamedTuple):
    """Weights of `elitekv`: queries and keys with rotation on chosen pairs, the rest of the keys and the
    values in one latent.

    Args:
        F: ``(G, r)`` pairs that stay rotated, ascending.
        W_qe, W_ke: ``(D, 2 r H)``, ``(D, 2 r G)``; W_qn: ``(D, (d - 2 r) H)``; W_dkv: ``(D, d_c)``.
        W_ukv: ``(d_c, G (d - 2 r + d))``, the rest of a key head, then its value.
    """

    F: Tensor
    W_qe: Tensor
    W_qn: Tensor
    W_ke: Tensor
    W_dkv: Tensor
    W_ukv: Tensor
    W_o: Tensor


def choose_pairs(layer: Layer, count: int, strategy: str) -> Tensor:
    """``(G, count)`` pairs that keep their rotation, ascending.

    Args:
        strategy: "high" or "low" frequencies, "uniform" spacing, "norm" (the product of mean query and key
            norms, MHA2MLA), or "greedy" (the smallest change of the scores, EliteKV). The last two read
            ``layer.x``.
    """
    G, pairs = layer.kv_heads, layer.head_dim // 2
    if not 0 <= count <= pairs:
        raise ValueError(f"num_rope_pairs: must be in 0..{pairs}, got {count}")
    if count and layer.theta is None:
        raise ValueError(f"num_rope_pairs: must be 0 with a source without positions, got {count}")
    if not count:
        return torch.zeros(G, 0, dtype=torch.long)
    if strategy == "greedy":
        return greedy_pairs(layer, count)[0][:, :count].sort(dim=1).values
    if strategy == "norm":
        q, k = (by_head(layer.inputs() @ W, n) for W, n in layer.q_and_k())
        norms = [z.unflatten(-1, (2, pairs)).norm(dim=-2).mean((0, 2)) for z in (q, k)]
        score = norms[0].reshape(G, -1, pairs).sum(1) * norms[1]
        return score.topk(count, dim=1).indices.sort(dim=1).values
    every = {
        "high": torch.arange(count),
        "low": torch.arange(pairs - count, pairs),
        "uniform": torch.arange(count) * pairs // count,
    }
    return every[strategy].expand(G, -1).clone()


def greedy_pairs(layer: Layer, rounds: int) -> tuple[Tensor, Tensor]:
    """Pairs of each key head in the order in which they are fixed, and the distance of scores at each choice.

    In a round every pair left is tried beside those already fixed, all others unrotated; the one whose scores
    lie nearest to the fully rotated ones (mean absolute difference over visible pairs of tokens) is fixed.
    Query heads of a group share the choice.
    """
    x, (G, d) = layer.inputs(), (layer.kv_heads, layer.head_dim)
    q, k = (by_head(x @ W, n).unflatten(-1, (2, d // 2)) for W, n in layer.q_and_k())
    plain, turned = (q, k), [turn_pairs(z, layer.theta) for z in (q, k)]
    seen = layer.mask.dense(x.shape[1])

    def scores(pair: Sequence[Tensor], g: int, f: int) -> Tensor:
        """What pair f adds to the scores ``(B, H / G, visible)`` of the query heads of key head g."""
        q, k = pair[0].unflatten(1, (G, -1))[:, g, ..., f], pair[1][:, g, None, ..., f]
        return (q @ k.mT)[..., seen] / d**0.5

    order, distances = torch.zeros(G, rounds, dtype=torch.long), torch.zeros(G, rounds, dtype=x.dtype)
    for g in range(G):
        # the change that leaving a pair unrotated makes; changes of several pairs add up
        change = torch.stack([scores(plain, g, f) - scores(turned, g, f) for f in range(d // 2)])
        left = change.sum(0)
        for m in range(rounds):
            tried = torch.stack([(left - own).abs().mean() for own in change])
            tried[order[g, :m]] = torch.inf
            distances[g, m], order[g, m] = tried.min(0)
            left = left - change[order[g, m]]
    return order, distances


def turn_pairs(z: Tensor, theta: float) -> Tensor:
    """RoPE on ``(B, heads, T, 2, pairs)`` at positions 0..T-1."""
    T, pairs = z.shape[2], z.shape[-1]
    angle = torch.arange(T)[:, None] * theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([z[..., 0, :] * cos - z[..., 1, :] * sin, z[..., 1, :] * cos + z[..., 0, :] * sin], -2)


def partial_rope(layer: Layer, F: Tensor, rank: int) -> Partial:
    """Keeps rotation on the pairs ``F`` ``(G, r)`` and factors the other key channels and the values jointly.

    Exact at r = d/2 and full rank; removing rotation and cutting the rank are the approximations.
    """
    G, d = layer.kv_heads, layer.head_dim
    rest = torch.tensor([[f for f in range(d // 2) if f not in row] for row in F.tolist()]).long()
    kept, left = (torch.cat([pairs, pairs + d // 2], dim=1) for pairs in (F, rest))  # channels per key head
    W_k, W_v = (W.unflatten(1, (G, d)) for W in (layer.weights["W_k"], layer.weights["W_v"]))
    W_q = layer.weights["W_q"].unflatten(1, (layer.heads, d))
    share = layer.heads // G
    pick = lambda W, index: torch.cat([W[:, h, c] for h, c in enumerate(index)], dim=1)  # noqa: E731
    joint = torch.cat([torch.cat([W_k[:, g, c], W_v[:, g]], dim=1) for g, c in enumerate(left)], dim=1)
    if not 1 <= rank <= min(joint.shape):
        raise ValueError(f"kv_rank: must be in 1..{min(joint.shape)}, got {rank}")
    U, S, V = torch.linalg.svd(joint, full_matrices=False)
    return Partial(
        F,
        pick(W_q, kept.repeat_interleave(share, 0)),
        pick(W_q, left.repeat_interleave(share, 0)),
        pick(W_k, kept),
        U[:, :rank],
        S[:rank, None] * V[:rank],
        layer.weights["W_o"],
    )


class Latent(NamedTuple):
    """Weights of `mla` without latent norms; without W_dq, W_uq makes queries straight from x."""

    W_dq: Tensor | None
    W_uq: Tensor
    W_dkv: Tensor
    W_ukv: Tensor
    W_o: Tensor


class Folded(NamedTuple):
    """Keys of all heads as one vector, turned so that each fold's energy comes first.

    Args:
        U: ``(folds, G M, G M)``, eigenvectors of each fold of M pairs, the largest first.
        keep: components of a fold that stay rotated.
    """

    U: Tensor
    keep: int


def fold(layer: Layer, freqfold: int, collapse: int) -> Folded:
    """RoRoPE: the rotation across key heads that gathers their energy, per fold of ``freqfold`` pairs."""
    pairs = layer.head_dim // 2
    if freqfold < 1 or pairs % freqfold:
        raise ValueError(f"freqfold: must divide the {pairs} pairs of a head, got {freqfold}")
    if collapse < 1 or freqfold % collapse:
        raise ValueError(f"collapse: must divide freqfold={freqfold}, got {collapse}")
    k = by_head(layer.inputs() @ layer.weights["W_k"], layer.kv_heads).unflatten(-1, (2, pairs))
    # (folds, samples, G M)
    z = k.unflatten(-1, (-1, freqfold)).permute(4, 0, 2, 3, 1, 5).flatten(-2).flatten(1, 3)
    return Folded(torch.linalg.eigh(z.mT @ z).eigenvectors.flip(-1), freqfold // collapse)


def trans_mla(
    layer: Layer, rank: int, q_rank: int = 0, freqfold: int = 1, collapse: int = 1, balance: float = 1.0
) -> Latent:
    """TransMLA (2502.07864): a shared rotary key of width d / collapse, everything else in one latent.

    Merging and turning the keys is exact at freqfold 1, balancing always; dropping the rotation of the other
    channels, folding, collapsing and cutting the rank are approximations.
    """
    if layer.theta is None:
        raise ValueError("pos: TransMLA keeps a rotary key, got a source with pos=none; use mha2mla")
    H, G, d = layer.heads, layer.kv_heads, layer.head_dim
    x, W_q, W_v = layer.inputs(), layer.weights["W_q"], layer.weights["W_v"]
    U, keep = fold(layer, freqfold, collapse)
    folds, n = U.shape[0], U.shape[1]
    # channels of W_k as (G, c, fold, m) -> (fold, c, G m), turned: (D, fold, c, e)
    W_k = layer.weights["W_k"].unflatten(1, (G, 2, folds, freqfold)).permute(0, 3, 2, 1, 4).flatten(3)
    W_k = torch.einsum("dfcn,fne->dfce", W_k, U)
    own = U.unflatten(1, (G, freqfold))[:, torch.arange(H) * G // H]  # (folds, H, m, e)
    d_r = d // collapse

    def queries(W: Tensor) -> Tensor:
        """Per head the query, then its rotary part; the mixer divides by sqrt(d + d_r), not sqrt(d)."""
        turned = torch.einsum("dhcfm,fhme->dhcfe", W.unflatten(1, (H, 2, folds, freqfold)), own[..., :keep])
        both = torch.cat([W.unflatten(1, (H, d)), turned.flatten(3).flatten(2)], dim=-1)
        return both.flatten(1) * ((d + d_r) / d) ** 0.5

    W_kr = W_k[..., :keep].permute(0, 2, 1, 3).flatten(1)
    W_kn = W_k[..., keep:].flatten(1)
    # back from the turned channels to head h: (fold, c, e) -> (c, fold, m)
    eye = torch.eye(2, dtype=U.dtype)
    Y = torch.einsum("fhme,ck,fj->hfcekjm", own[..., keep:], eye, torch.eye(folds, dtype=U.dtype))
    Y = Y.reshape(H, folds * 2 * (n - keep), d)
    sizes = [(x @ W).flatten(0, 1).norm(dim=0).mean() for W in (W_kn, W_v)]
    ratio = sizes[0] / (balance * sizes[1])
    joint = torch.cat([W_kn / ratio, W_v], dim=1)
    if not 1 <= rank <= joint.shape[1]:
        raise ValueError(f"kv_rank: must be in 1..{joint.shape[1]}, got {rank}")
    R = principal(x @ joint)[:, :rank]
    down = joint @ R
    up_k, up_v = R.split([W_kn.shape[1], G * d])
    up_k = torch.einsum("nr,hnd->rhd", up_k, Y * ratio)
    up_v = up_v.unflatten(0, (G, d))[torch.arange(H) * G // H].permute(2, 0, 1)
    W_ukv = torch.cat([up_k, up_v], dim=-1).flatten(1)
    W_dq, W_uq = None, queries(W_q)
    if q_rank:
        R_q = principal(x @ W_q)[:, :q_rank]
        W_dq, W_uq = W_q @ R_q, R_q.T @ queries(torch.eye(H * d, dtype=W_q.dtype))
    return Latent(W_dq, W_uq, torch.cat([down, W_kr], dim=1), W_ukv, layer.weights["W_o"])


def principal(z: Tensor) -> Tensor:
    """Eigenvectors of the uncentred second moment of ``(..., n)``, the largest first."""
    z = z.flatten(0, -2)
    return torch.linalg.eigh(z.T @ z).eigenvectors.flip(-1)
