"""How far the heads' matrices of a converted layer are from those of its source, whatever their form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.attention.base import Mixer
from attnzoo.attention.factorised.tensorllm import Tucker
from attnzoo.attention.latent.latent import Latent
from attnzoo.attention.sharing.sqa import TiledQueries


class Heads(NamedTuple):
    """Matrices of every query head, ``(H, D, n)`` of q and k, ``(H, D, d_v)`` of v, ``(H, d_v, D)`` of o."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@torch.no_grad()
def weight_error(before: Sequence[Mixer], after: Sequence[Mixer]) -> float:
    """Relative change, in the Frobenius norm over all heads and layers, of what weights say without biases
    and rotations: ``W_q W_k^T`` at the scale of the scores, and ``W_v W_o``.

    Both products are the same in every basis inside a head, so factors and latents compare with plain
    projections.
    """
    change = norm = 0.0
    for source, target in zip(before, after, strict=True):
        ours, theirs = heads_of_mixer(target), heads_of_mixer(source)
        for h in range(len(theirs.q)):
            for side in (_scores, _values):
                new, old = (side(heads, h, m) for heads, m in ((ours, target), (theirs, source)))
                change += float((new - old).square().sum())
                norm += float(old.square().sum())
    return (change / norm) ** 0.5 if norm else 0.0


def _scores(heads: Heads, h: int, mixer: Mixer) -> Tensor:
    return heads.q[h] @ heads.k[h].T * mixer.scale


def _values(heads: Heads, h: int, mixer: Mixer) -> Tensor:
    return heads.v[h] @ heads.o[h]


def heads_of_mixer(mixer: Mixer) -> Heads:
    """The matrices of the heads of a source or target of conversions, in fp64."""
    project = mixer.project
    if isinstance(project, Tucker):
        q, k, v, o = (
            project.slices(c, c + 1)[0].double().unflatten(1, (project.heads, -1)) for c in range(4)
        )
        U1, U2 = project.U1.double(), project.U2.double()
        q, k, v, o = ((U1 @ M.transpose(0, 1)) @ U2.T for M in (q, k, v, o))
        return Heads(q, k, v, o.mT)
    q, k, v = _latent(project) if isinstance(project, Latent) else _plain(project)
    o = mixer.out.out_proj.weight.double().T.unflatten(0, (len(q), -1))
    return Heads(q, k, v, o)


def _plain(project: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    parts = project.qkv_proj.weight.double().split(project.sizes)
    q, k, v = (part.unflatten(0, (n, -1)).mT for part, n in zip(parts, project.heads, strict=True))
    if isinstance(project, TiledQueries):
        q = q.repeat(project.tiles, 1, 1)
    maps = [
        m if m is not None else torch.arange(len(q)) * len(z) // len(q)
        for m, z in zip(project.maps(), (k, v), strict=True)
    ]
    return q, k[maps[0]], v[maps[1]]


def _latent(project: Latent) -> tuple[Tensor, Tensor, Tensor]:
    (d_n, d_r, d_v), H = project.widths, project.heads
    q = project.q_up.weight.double().T
    if project.q_rank:
        gain = 1.0 if project.q_gain is None else project.q_gain.double()[:, None]
        q = project.q_down.weight.double().T @ (gain * q)
    c, k_r = project.kv_down.weight.double().T.split([project.rank, project.rope_heads * d_r], dim=1)
    c = c if project.kv_gain is None else c * project.kv_gain.double()
    up = project.kv_up.weight.double().unflatten(0, (-1, d_n + d_v))  # (G, d_n + d_v, d_c)
    k, v = (c @ up.mT).repeat_interleave(H // len(up), 0).split([d_n, d_v], dim=2)
    k_r = k_r.unflatten(1, (project.rope_heads, d_r)).transpose(0, 1)
    k = torch.cat([k, k_r.repeat_interleave(H // project.rope_heads, 0)], dim=2)
    return q.unflatten(1, (H, -1)).transpose(0, 1), k, v
