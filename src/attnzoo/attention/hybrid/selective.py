"""The core of Mamba-1: a state space whose step, input and output maps depend on the token.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752.

    [u | z] = x W_in,  u <- silu(conv(u) + b),  [dt | B | C] = u W_x  (RMSNorm on each, in some models)
    step = softplus(dt W_dt + b_dt)                                          per channel
    h_t = exp(step_t A) * h_(t-1) + step_t u_t B_t,   A = -exp(A_log)        N numbers per channel
    o = (h_t . C_t + D u_t) * silu(z)

Cached: h (D_i N) in fp32 or fp64 and the last conv_kernel - 1 inputs of the convolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Mixer
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.own import Core
from attnzoo.attention.recurrence.mamba2 import mamba2
from attnzoo.attention.site import Site, flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.combine import FullNorm
from attnzoo.attention.stages.gates import step_bias, wide
from attnzoo.attention.stages.refine import causal_conv
from attnzoo.cost import Work
from attnzoo.ops.fused import rms_norm, split_linear
from attnzoo.registry import branch
from attnzoo_kernels.selective_scan import selective_scan

SCORE_ONLY = ("sdpa", "flex", "xformers")


class SelectiveSSM(Core):
    """See the module; the inner width D_i is cut into heads only for those who read them.

    Args:
        dim: D. heads, width: D_i = heads * width. state_size: N. dt_rank: columns of dt, at least 1.
        conv_kernel: taps. norm_eps: of the norms on dt, B and C; None = there are none.
    """

    unsplit = "it has channels, not heads, whose step sizes come from all"

    def __init__(
        self,
        site: Site,
        dim: int,
        heads: int,
        width: int,
        state_size: int,
        dt_rank: int,
        conv_kernel: int,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("state_size", state_size), ("dt_rank", dt_rank), ("conv_kernel", conv_kernel)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        inner = heads * width
        self.dim, self.heads, self.inner, self.states, self.eps = dim, heads, inner, state_size, norm_eps
        self.taps, self.parts = conv_kernel, [dt_rank, state_size, state_size]
        self.in_proj = site.weights.linear("in", dim, 2 * inner, parts=[inner, inner])
        self.x_proj = site.weights.linear("x", inner, sum(self.parts), parts=self.parts)
        self.dt_proj = site.weights.linear("dt", dt_rank, inner, std=dt_rank**-0.5)
        bound = conv_kernel**-0.5  # as Conv1d starts
        taps = nn.Parameter(torch.empty(inner, conv_kernel).uniform_(-bound, bound))
        self.conv = flag(taps, decay=False, reinit=False)
        self.conv_bias = flag(nn.Parameter(torch.empty(inner).uniform_(-bound, bound)), decay=False)
        self.dt_bias = step_bias(inner)
        rates = torch.arange(1, state_size + 1).float().log().expand(inner, -1).clone()
        self.A_log = flag(nn.Parameter(rates), decay=False, reinit=False)
        self.D = flag(nn.Parameter(torch.ones(inner)), decay=False, reinit=False)
        if norm_eps is not None:
            for name, size in zip(("dt_gain", "B_gain", "C_gain"), self.parts, strict=True):
                self.register_parameter(name, flag(nn.Parameter(torch.ones(size)), decay=False))

    def forward(self, call: Call) -> Tensor:
        """``(B, T, heads, width)``."""
        u, z = split_linear(self.in_proj, call.x, [self.inner, self.inner])
        u = causal_conv(u, self.conv, call, "conv_u", F.silu, self.conv_bias)
        dt, B, C = split_linear(self.x_proj, u, self.parts)
        if self.eps is not None:
            gains = (self.dt_gain, self.B_gain, self.C_gain)
            dt, B, C = (rms_norm(part, gain, self.eps) for part, gain in zip((dt, B, C), gains, strict=True))
        step = wide(self.dt_proj(dt))
        step = F.softplus(step + self.dt_bias.to(step.dtype))
        step = call.line.blank(step)  # padding forgets nothing and writes nothing
        y, state = selective_scan(
            u,
            step,
            -wide(self.A_log).exp(),
            B,
            C,
            initial_state=call.mem.state("h"),
            output_final_state=not call.mem.alone,
            segments=call.line.doc,
        )
        call.mem.put("h", state)
        y = torch.addcmul(y, u, self.D.to(u.dtype)) * F.silu(z).to(y.dtype)
        return y.unflatten(-1, (self.heads, -1))

    def memory(self) -> dict[str, Slot]:
        return {
            "h": Slot("state", (self.inner, self.states)),
            "conv_u": Slot("tail", (self.taps - 1, self.inner)),
        }

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "u", 2 * length * self.dim * self.inner)
        yield Work("gates", "z", 2 * length * self.dim * self.inner)
        yield Work("gates", "dt, B, C", 2 * length * self.inner * (sum(self.parts) + self.parts[0]))
        yield Work("mixing", "state read", 2 * length * self.inner * self.states)

    def elementwise(self) -> dict[str, float]:
        return {
            "short convolutions": 2.0 * self.taps * self.inner,
            "selective scan": 7.0 * self.inner * self.states,
        }


def default_rank(dim: int) -> int:
    """dt_rank of the paper: dim / 16, up."""
    return math.ceil(dim / 16)


def state_space(
    draft: Draft,
    core: str,
    heads: int,
    width: int,
    state_size: int,
    dt_rank: int,
    conv_kernel: int,
    eps: float,
    normed: bool,
    beside: bool = True,
) -> Mixer:
    """A branch of ``heads`` state space heads.

    Args:
        core: "mamba1" or "mamba2". normed: norms on dt, B and C and on its output; Mamba-2 has its own norm,
            after the gate, in any case.
        beside: an attention branch runs the implementations that only attention has.
    """
    impl = {"impl": "auto"} if beside and draft.host["impl"] in SCORE_ONLY else {}

    def first(inner: Draft) -> None:
        inner.v_head_dim, inner.o_heads = width, heads
        ssm = SelectiveSSM(
            draft.site, draft.dim, heads, width, state_size, dt_rank, conv_kernel, eps if normed else None
        )
        inner.put("core", ssm)
        if normed:
            inner.put("combine", FullNorm(heads, width, eps))

    def second(inner: Draft) -> None:
        expand = Fraction(heads * width, draft.dim)
        mamba2(inner, expand=expand, state_size=state_size, conv_kernel=conv_kernel)

    if core == "mamba1":
        return branch(draft, "own", first, norm_eps=eps, **impl)
    return branch(draft, "recurrent", second, heads, head_dim=width, norm_eps=eps, **impl)
