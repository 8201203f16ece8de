"""Multi-scale retention: linear attention with RoPE in which each head forgets at a pace of its own.

Retentive Network: A Successor to Transformer for Large Language Models, arXiv 2307.08621.

    q, k = rope(x W),   v = x W_v of width expand_v d,   gamma_h = 1 - 2^(-5-h), h = 0 .. H - 1
    S_t = gamma_h S_(t-1) + k_t v_t^T,   o_t = S_t^T q_t / sqrt(d)
    torchscale_norm:   m_t = sum_(j <= t) gamma^(t-j),  n_t = sum_(j <= t) gamma^(t-j) q_t . k_j / sqrt(d m_t)
                       o_t <- o_t / (sqrt(m_t) max(|n_t|, 1)),  no gradient through |n_t|
    y = concat(RMSNorm_head(o) * silu(x W_g)) W_o        the norm without a gain unless norm_affine

Cached: S (H d_k d_v) in fp32, keys turned; with torchscale_norm also the decayed sum of keys (H d_k). More
than some 11 heads make paces that no sequence can tell apart from 1; keep heads wide. Our choice: the
rescalings of the released training code (torchscale_norm) are off, because the head norm cancels them up to
its eps, and matrices start as everywhere here, N(0, 0.02^2); xavier_init starts them as the released code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrent import Terms, scanned
from attnzoo.attention.site import INIT_STD, Plain, flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.gates import FixedDecay, wide
from attnzoo.attention.stages.running import count
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register
from attnzoo_kernels.scan import scan_flops

GATES = {"silu": F.silu, "gelu": F.gelu}


def paces(head: Tensor) -> Tensor:
    """``log(1 - 2^(-5-h))``."""
    return torch.log1p(-torch.exp2(-5 - head))


class Xavier(Plain):
    """Another provider's matrices, started as in the released code: xavier, of gain 2^(-5/2), W_o of 1/2."""

    def __init__(self, base: Plain) -> None:
        self.base = base

    def linear(
        self,
        name: str,
        d_in: int,
        d_out: int,
        bias: bool = False,
        std: float = INIT_STD,
        parts: Sequence[int] | None = None,
    ) -> nn.Module:
        layer = self.base.linear(name, d_in, d_out, bias, std, parts)
        if isinstance(layer, nn.Linear):  # one that is shared or made starts as its provider wants
            for matrix in layer.weight.detach().split(list(parts or [d_out])):
                nn.init.xavier_uniform_(matrix, gain=0.5 if name == "out" else 2**-2.5)
            flag(layer.weight, reinit=False)
        return layer


class Kept(FixedDecay):
    """The decay; leaves what the scan runs on to `RowScale`."""

    split = FixedDecay.split

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        terms = super().forward(q, k, v, call)
        call.notes["retention"] = terms
        return terms


class RowScale(Stage):
    """``o / (sqrt(m) max(|n|, 1))``, see the module; n by a scan over values of 1."""

    rank = 10

    def __init__(self, heads: int, width: int, scale: float, chunk_size: int) -> None:
        super().__init__()
        self.shape, self.scale, self.chunk_size = (heads, width), scale, chunk_size

    def forward(self, o: Tensor, call: Call) -> Tensor:
        with torch.no_grad():
            q, k, _, pace = call.notes["retention"][:4]
            k, pace = wide(call.line.blank(k)), pace.to(wide(k[:0]).dtype)
            g = pace if call.line.valid is None else call.line.blank(pace.expand(*k.shape[:3]))
            ones = torch.ones_like(k[..., :1])
            total = scanned(Terms(wide(q), k, ones, g), "keys", call, self.scale, self.chunk_size)
            seen = count(call, total)[..., None]
            root = (torch.expm1(seen * pace) / torch.expm1(pace)).sqrt()[..., None]  # (B or 1, T, H, 1)
            divisor = root * (total / root).abs().clamp(min=1)
        return (wide(o) / divisor).to(o.dtype)

    def split(self, share: Share) -> None:
        self.shape = (share.count(self.shape[0]), self.shape[1])

    def memory(self) -> dict[str, Slot]:
        return {"keys": Slot("state", (*self.shape, 1))}

    def work(self, length: int) -> Iterable[Work]:
        heads, width = self.shape
        run = scan_flops("scalar", length, heads, width, 1, self.chunk_size).executed
        needed, why = 2 * length * heads * width, "sums of keys by chunks, where q . sum is one product"
        yield Work("mixing", "sums of scores", needed, run, why, per_head=True)


@register(
    Card(
        name="retnet",
        title="Multi-scale retention",
        paper="Retentive Network: A Successor to Transformer for Large Language Models",
        arxiv="2307.08621",
        family="recurrence",
        summary="Linear attention with RoPE in which each head forgets at a pace of its own.",
        cached="the state S (H d_k d_v): constant in the length",
        claims=(
            Claim("ahead of the Transformer", where="from about 2B parameters"),
            Claim("8.4 times faster decoding", "decode_ms", "lower", "mha", "6.7B, 8k tokens"),
            Claim("70 % less memory", "cache_bytes", "lower", "mha", "6.7B, 8k tokens"),
        ),
        small={"chunk_size": 4, "norm_affine": True, "torchscale_norm": True, "xavier_init": True},
    ),
    frames=("recurrent",),
    host={"pos": "rope"},
)
def retnet(
    draft: Draft,
    *,
    expand_v: float = 2.0,
    gate_fn: Literal["silu", "gelu"] = "silu",
    norm_affine: bool = False,
    torchscale_norm: bool = False,
    xavier_init: bool = False,
) -> None:
    """Sets decay, value width and read-out.

    Args:
        expand_v: d_v / d_k, d_v a whole number. gate_fn: activation of the output gate.
        norm_affine: a gain of the head norm. torchscale_norm: the rescalings of the released training code.
        xavier_init: matrices start as in the released code.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: linear (identity map, unnormalised) with gamma = 1 and without rotation.
    """
    width = draft.head_dim * expand_v
    if width < 1 or width != int(width):
        raise ValueError(
            f"expand_v: head_dim={draft.head_dim} times it must be a whole number, got {expand_v} ({width})"
        )
    draft.v_head_dim = int(width)
    if xavier_init:
        draft.site = replace(draft.site, weights=Xavier(draft.site.weights))
    H, host = draft.o_heads, draft.host
    draft.put("gates", (Kept if torchscale_norm else FixedDecay)(H, paces))
    if torchscale_norm:
        draft.put("combine", RowScale(H, draft.head_dim, draft.head_dim**-0.5, host["chunk_size"]))
    draft.put("combine", HeadNorm(draft.v_head_dim, host["norm_eps"], norm_affine))
    draft.put("combine", Gate(draft.site, draft.dim, H, draft.v_head_dim, GATES[gate_fn]))
