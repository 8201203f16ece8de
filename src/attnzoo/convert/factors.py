"""Conversions into factors: a Tucker form over the heads of a layer, and atoms shared by the layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.convert.layer import Layer, heads_of


class Tucker(NamedTuple):
    """``W[:, :, c, h] ~ U1 (sum_t U3[c, t] core[h, :, :, t]) U2^T`` for c = q, k, v and the transposed o.

    Args:
        U1 ``(D, R1)``, U2 ``(d, R2)``, U3 ``(4, R3)``, core ``(H, R1, R2, R3)``.
    """

    U1: Tensor
    U2: Tensor
    U3: Tensor
    core: Tensor


def stacked(layer: Layer) -> Tensor:
    """``(D, d, 4, H)``: query, key, value and transposed output blocks of every head; key heads repeated."""
    H, repeat = layer.heads, layer.heads // layer.kv_heads
    q, k, v = (heads_of(layer.weights[f"W_{n}"], n_heads) for n, n_heads in _head_counts(layer))
    o = layer.weights["W_o"].unflatten(0, (H, -1)).mT  # (H, D, d)
    blocks = [q, k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0), o]
    return torch.stack(blocks).permute(2, 3, 0, 1)


def _head_counts(layer: Layer) -> tuple[tuple[str, int], ...]:
    return ("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)


def tucker(layer: Layer, ranks: tuple[int, int, int], iterate: bool = False) -> Tucker:
    """TensorLLM (2501.15674): a common subspace for all heads, by HOSVD and, with ``iterate``, HOOI.

    Exact at the full multilinear ranks; the squared error of HOSVD is at most the sum of the squared singular
    values that the three unfoldings lose.
    """
    W = stacked(layer)
    for field, rank, size in zip(("rank_model", "rank_head", "rank_qkvo"), ranks, W.shape, strict=False):
        if not 1 <= rank <= size:
            raise ValueError(f"{field}: must be in 1..{size}, got {rank}")
    U = [_leading(W, mode, rank) for mode, rank in enumerate(ranks)]
    before = torch.inf
    while iterate:
        for mode, rank in enumerate(ranks):
            U[mode] = _leading(_project(W, U, without=mode), mode, rank)
        lost = float(W.square().sum() - _project(W, U).square().sum())
        if before - lost <= 1e-8 * float(W.square().sum()):
            break
        before = lost
    return Tucker(*U, _project(W, U).permute(3, 0, 1, 2))


def reconstruct(parts: Tucker) -> Tensor:
    """``(D, d, 4, H)`` of the factors."""
    return torch.einsum("ar,bs,ct,hrst->abch", *parts)


def _leading(W: Tensor, mode: int, rank: int) -> Tensor:
    """Leading left singular vectors of the unfolding along ``mode``."""
    flat = W.movedim(mode, 0).flatten(1)
    return torch.linalg.svd(flat, full_matrices=False)[0][:, :rank]


def _project(W: Tensor, U: list[Tensor], without: int | None = None) -> Tensor:
    for mode, factor in enumerate(U):
        if mode != without:
            W = torch.tensordot(factor.T, W.movedim(mode, 0), 1).movedim(0, mode)
    return W


class Atoms(NamedTuple):
    """``W[l] ~ sum_s coefficients[l, s] atoms[s]``."""

    atoms: Tensor
    coefficients: Tensor


def atoms(matrices: Tensor, count: int) -> Atoms:
    """MASA (2508.04581): ``(L, n, m)`` matrices of the layers as combinations of ``count`` shared ones.

    The best in the Frobenius norm (matrix PCA without a mean): the squared error is the sum of the squared
    singular values left out. Exact at count = L.
    """
    L = len(matrices)
    if not 1 <= count <= L:
        raise ValueError(f"num_atoms: must be in 1..{L} layers, got {count}")
    U, S, V = torch.linalg.svd(matrices.flatten(1), full_matrices=False)
    return Atoms(V[:count].unflatten(1, matrices.shape[1:]), U[:, :count] * S[:count])
