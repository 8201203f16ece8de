"""Mamba-2: linear attention whose step size, made from the token, decides what is kept and what is written.

Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality,
arXiv 2405.21060.

    [z | x | B | C | dt] = x W_in,   x, B, C <- silu(conv(x, B, C) + b)     H heads of x, G groups of B and C
    step_t = clamp(softplus(dt + dt_bias), dt_limit),   g_t = -exp(A_log) step_t             per head
    S_t = exp(g_t) S_(t-1) + B_t (step_t x_t)^T,   o_t = S_t^T C_t + D x_t        S of N x P numbers per head
    y = RMSNorm(o * silu(z)) W_out        gate first; the norm over each of G equal parts of the inner width

Head h reads group h // (H / G). Cached: S (H N P) in fp32 and the last conv_kernel - 1 inputs of the
convolutions. Our choice: num_heads heads as wide as the inner width allows, unless ``head_dim`` says how wide
they are; chunks of 64 tokens (they change nothing but speed).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Early
from attnzoo.attention.site import flag
from attnzoo.attention.stages.combine import FullNorm
from attnzoo.attention.stages.gates import StepDecay
from attnzoo.attention.stages.refine import ShortConv
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.fused import split_linear
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class SSMProject(Early, Stage):
    """One matrix ``[z | x | B | C | dt]``: q = C, k = B, v = x; leaves z ``(B, T, H, P)`` and dt
    ``(B, T, H)`` in ``call.notes`` for the gate of the output and the step size.
    """

    def __init__(self, draft: Draft, bias: bool = False) -> None:
        super().__init__()
        self.dim, self.heads, self.groups = draft.dim, draft.o_heads, draft.num_heads
        self.width, self.states = draft.v_head_dim, draft.head_dim
        inner, keys = self.heads * self.width, self.groups * self.states
        self.sizes = [inner, inner, keys, keys, self.heads]
        weights = draft.site.weights
        self.in_proj = weights.linear("in", draft.dim, sum(self.sizes), bias, parts=self.sizes)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(B, T, D)`` -> q, k ``(B, G, T, N)``, v ``(B, H, T, P)``."""
        z, v, k, q, dt = split_linear(self.in_proj, x, self.sizes)
        call.notes["z"], call.notes["dt"] = z.unflatten(-1, (self.heads, self.width)), dt
        q, k = (part.unflatten(-1, (self.groups, self.states)).transpose(1, 2) for part in (q, k))
        return q, k, v.unflatten(-1, (self.heads, self.width)).transpose(1, 2)

    def split(self, share: Share) -> None:
        value, key = (self.heads, self.width), (self.groups, self.states)
        share.rows(self.in_proj, value, value, key, key, (self.heads, 1))
        self.heads, self.groups = share.count(self.heads), share.count(self.groups)
        inner, keys = self.heads * self.width, self.groups * self.states
        self.sizes = [inner, inner, keys, keys, self.heads]

    def work(self, length: int) -> Iterable[Work]:
        inner, _, keys, _, heads = (2 * length * self.dim * size for size in self.sizes)
        yield Work("projections", "x", inner, per_head=True)
        yield Work("projections", "B, C", 2 * keys)
        yield Work("gates", "z, dt", inner + heads, per_head=True)


class Skip(Stage):
    """``o + D x``: each head's values beside what the state gives, by a factor per head."""

    rank = 20

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.D = flag(nn.Parameter(torch.ones(heads)), decay=False, reinit=False)

    def split(self, share: Share) -> None:
        share.cut(self, "D", (len(self.D), 1))

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return torch.addcmul(o, call.raw.v.transpose(1, 2).to(o.dtype), self.D[:, None].to(o.dtype))


class GateFirst(Stage):
    """``o * silu(z)`` with z from ``call.notes``, before the norm."""

    rank = 25
    alike = True

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return o * F.silu(call.notes["z"]).to(o.dtype)


def set_shapes(draft: Draft, expand: float, state_size: int, n_groups: int) -> None:
    """Heads and widths of the inner stream: G query and key heads of N, H value heads of P."""
    inner = expand * draft.dim
    if inner < 1 or inner != int(inner):
        raise ValueError(f"expand: times dim={draft.dim} must be a whole number, got {expand}")
    for name, value in (("state_size", state_size), ("n_groups", n_groups)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    width, inner = draft.host["head_dim"], int(inner)
    if width is not None and inner % width:
        raise ValueError(f"head_dim: must divide the inner width expand * dim = {inner}, got {width}")
    if width is None and inner % draft.num_heads:
        raise ValueError(
            f"num_heads: must divide the inner width expand * dim = {inner}, got {draft.num_heads}"
        )
    heads = draft.num_heads if width is None else inner // width
    if heads % n_groups:
        raise ValueError(f"n_groups: must divide the {heads} heads, got {n_groups}")
    draft.num_heads = draft.num_kv_heads = n_groups
    draft.num_v_heads = draft.o_heads = heads
    draft.head_dim, draft.v_head_dim, draft.scale = state_size, inner // heads, 1.0


@register(
    Card(
        name="mamba2",
        title="Mamba-2",
        paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State "
        "Space Duality",
        arxiv="2405.21060",
        family="recurrence",
        summary="Linear attention whose step size, made from the token, decides what is kept and written.",
        cached="the state S (H N P) and convolution tails: constant in the length",
        claims=(
            Claim("ahead of Pythia", "val_bpb", "lower", "mha", "2.7B / 300B tokens"),
            Claim("ahead of Mamba", where="2.7B / 300B tokens"),
            "the dual form 2 to 8 times faster than Mamba's scan",
        ),
        small={"chunk_size": 4, "state_size": 8, "n_groups": 2},
    ),
    frames=("recurrent",),
    fixed={"num_kv_heads": "B and C have n_groups heads, x has the others"},
)
def mamba2(
    draft: Draft,
    *,
    expand: float = 2.0,
    state_size: int = 128,
    n_groups: int = 1,
    conv_kernel: int = 4,
    dt_limit: tuple[float, ...] = (0.0, math.inf),
) -> None:
    """Sets projection, convolution, step size and read-out.

    Args:
        expand: inner width D_i over dim, D_i a whole number. state_size: N, width of B and C.
        n_groups: G, heads of B and C; divides the heads. conv_kernel: taps.
        dt_limit: least and largest step.
        head_dim (of the frame): P; where given, D_i / P is the number of heads, whatever num_heads says.
        qkv_bias (of the frame): a bias of the whole input projection.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: linear attention (identity map, no normaliser) without skip, gate, convolution and decay.
    """
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit: must be 0 <= least <= largest, got {list(dt_limit)}")
    set_shapes(draft, expand, state_size, n_groups)
    draft.put("project", SSMProject(draft, draft.host["qkv_bias"]))
    draft.put("refine", ShortConv(list(draft.shapes().values()), conv_kernel, [F.silu] * 3, bias=True))
    draft.put("gates", StepDecay(draft.o_heads, (dt_limit[0], dt_limit[1])))
    draft.put("combine", Skip(draft.o_heads))
    draft.put("combine", GateFirst())
    draft.put("combine", FullNorm(draft.o_heads, draft.v_head_dim, draft.host["norm_eps"], n_groups))
