"""The delta and rank-1 scans as custom ops of torch, over the Triton kernels.

Only the inputs are kept for the backward pass, which makes the matrices of the chunks and the states again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.scan.driver import Driver, chunk_of
from attnzoo_kernels.scan.flops import scan_flops

INPUTS = ("q", "k", "v", "g", "beta", "e", "a", "state")


class _Scan(Driver):
    def forward(self) -> None:
        """The chunks' matrices and operands, then the states, y and the final state."""
        from attnzoo_kernels.scan import kernel_delta_diagonal as diagonal
        from attnzoo_kernels.scan import kernel_delta_pairs as pairs
        from attnzoo_kernels.scan import kernel_delta_states as states

        lower = self.new("lower", self.count, self.C, self.C, dtype=torch.float32)
        self.rows("inverse scores", self.C)
        if self.rank_one:
            self.rows("lower_k scores_k", self.C)
        if self.diagonal:
            self.run(diagonal.PAIRS_DIAGONAL, self.count, (self.C // 16) ** 2)
        else:
            self.run(pairs.PAIRS, self.count)
        self.run(pairs.INVERSE, self.count, lower=lower, out=self.x["inverse"])
        del self.x["lower"], lower
        self.rows("w reads writes" + " writes_k" * self.rank_one, self.KP)
        self.rows("u y", self.VP)
        self.new("carry", self.count, self.KP, dtype=torch.float32)
        self.run(states.OPERANDS, self.count, lambda meta: self.keys_axis(meta) + self.values_axis(meta))
        self.new("states", self.B * self.H, self.N + 1, self.KP, self.VP)
        self.new("final", self.B, self.H, self.K, self.V, dtype=torch.float32)
        self.run(states.STATES_FORWARD, self.B * self.H, self.values_axis)
        del self.x["u"]

    def outputs(self) -> tuple[Tensor, Tensor]:
        from attnzoo_kernels.scan import kernel_delta_states as states

        o = self.new("o", self.B, self.T, self.H, self.V, dtype=self.out)
        self.run(states.OUTPUTS, self.count, self.values_axis)
        return o, self.x["final"]

    def backward(self, do: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
        """Gradients of what INPUTS names, in the dtypes of the work."""
        from attnzoo_kernels.scan import kernel_delta_gradients as gradients
        from attnzoo_kernels.scan import kernel_delta_states as states

        self.x |= {"do": do.to(self.dtype).contiguous(), "dfinal": dfinal.float().contiguous()}
        self.new("dstates", self.count, self.KP, self.VP)
        self.rows("dy", self.VP)
        dinitial = self.new("dinitial", self.B, self.H, self.K, self.V, dtype=torch.float32)
        sums = self._states_backward(states.STATES_BACKWARD)
        del self.x["w"], self.x["reads"], self.x["writes"], self.x["carry"]
        self.rows("dz", self.VP)
        self.rows("dlower dscores" + " dlower_k dscores_k" * self.rank_one, self.C)
        dv = self.new("dv", self.B, self.T, self.H, self.V)
        dbeta = self.new("dbeta", self.count, self.C, dtype=torch.float32)
        self.run(gradients.VALUE_GRADIENTS, self.count)
        del self.x["dy"], self.x["inverse"]
        return {"v": dv, "state": dinitial, **self._key_gradients(dbeta, sums)}

    def _states_backward(self, kernel: launch.Kernel) -> Tensor:
        """Returns dcarry; its first axis is as long as the tile makes it, so room is left for the most."""
        least = min(self.VP, min(tile.meta["BV"] for tile in kernel.tiles))
        dcarry = self.new("dcarry", self.VP // least, self.count, self.KP, dtype=torch.float32)
        self.x["parts"] = self.values_axis(self.run(kernel, self.B * self.H, self.values_axis))
        return dcarry[: self.x["parts"]]

    def _key_gradients(self, dbeta: Tensor, dcarry: Tensor) -> dict[str, Tensor]:
        from attnzoo_kernels.scan import kernel_delta_diagonal as diagonal
        from attnzoo_kernels.scan import kernel_delta_gradients as gradients

        kernel, B, T, H, K = gradients.KEY_GRADIENTS, self.B, self.T, self.H, self.K
        found = {"q": self.new("dq_out", B, T, H, K), "k": self.new("dk_out", B, T, H, K)}
        if self.rank_one:
            found |= {"e": self.new("de_out", B, T, H, K), "a": self.new("da_out", B, T, H, K)}
        if self.diagonal:
            self.new("inner", 3 + self.rank_one, self.count, self.C, self.KP, dtype=torch.float32)
            self.run(diagonal.PAIRS_DIAGONAL_BACKWARD, self.count, self.C // 16, self.keys_axis)
            dgates = found["g"] = self.new("dgates", B, T, H, K, dtype=torch.float32)
        most = self.KP // min(self.KP, min(tile.meta["BK"] for tile in kernel.tiles))
        if not self.diagonal:
            dgates = self.new("dgates", most, 2, self.count, self.C, dtype=torch.float32)
        parts = self.new("dbeta", most, self.count, self.C, dtype=torch.float32)
        used = self.keys_axis(self.run(kernel, self.count, self.keys_axis))
        if not self.rank_one:
            found["beta"] = self.per_token(dbeta + parts[:used].sum(0))
        if not self.diagonal:
            found["g"] = self.per_token(self._gate_gradient(dgates[:used].sum(0), dcarry.sum((0, 2))))
        return found

    def _gate_gradient(self, dsums: Tensor, dcarry: Tensor) -> Tensor:
        """From those of the operands' G and the probe's, (2, B*H*N, C), and of a whole chunk's, (B*H*N)."""
        dg = dsums.sum(0).flip(-1).cumsum(-1).flip(-1) + dcarry[:, None]
        return dg - dsums[1] if self.rank_one else dg


@torch.library.custom_op("attnzoo::scan_delta_forward", mutates_args=())
def scan_delta_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, e: Tensor | None,
    a: Tensor | None, scale: float, state: Tensor, segments: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = _Scan(q, k, v, g, beta, e, a, scale, state, segments, chunk_size)
    work.forward()
    return work.outputs()


@scan_delta_forward.register_fake
def _(q, k, v, g, beta, e, a, scale, state, segments, chunk_size) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("attnzoo::scan_delta_backward", mutates_args=())
def scan_delta_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    e: Tensor | None, a: Tensor | None, scale: float, state: Tensor, segments: Tensor | None, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the inputs that are given, in the order of INPUTS."""
    work = _Scan(q, k, v, g, beta, e, a, scale, state, segments, chunk_size)
    work.forward()
    found = work.backward(do, dfinal)
    given = zip(INPUTS, (q, k, v, g, beta, e, a, state), strict=True)
    return [found[name].to(x.dtype).contiguous() for name, x in given if x is not None]


@scan_delta_backward.register_fake
def _(do, dfinal, q, k, v, g, beta, e, a, scale, state, segments, chunk_size) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, g, beta, e, a, state) if x is not None]


def _setup(ctx, inputs, output) -> None:
    q, k, v, g, beta, e, a, ctx.scale, state, segments, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, g, beta, e, a, state, segments)


def _backward(ctx, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, state, segments = ctx.saved_tensors
    found = iter(scan_delta_backward(do, dfinal, *inputs, ctx.scale, state, segments, ctx.chunk_size))
    grads = [None if x is None else next(found) for x in (*inputs, state)]
    return (*grads[:7], None, grads[7], None, None)


scan_delta_forward.register_autograd(_backward, setup_context=_setup)


def _count(q: Any, v: Any, g: Any, a: Any, chunk_size: int) -> int:
    (B, T, H, K), V = q, v[-1]
    diagonal = g is not None and len(g) == 4
    kind = "rank_one" if a is not None else "delta_diagonal" if diagonal else "delta"
    return B * scan_flops(kind, T, H, K, V, chunk_of(chunk_size, T)).executed


@register_flop_formula(torch.ops.attnzoo.scan_delta_forward)
def _forward_flops(q, k, v, g, beta, e, a, scale, state, segments, chunk_size, *_, **__) -> int:
    return _count(q, v, g, a, chunk_size)


@register_flop_formula(torch.ops.attnzoo.scan_delta_backward)
def _backward_flops(do, dfinal, q, k, v, g, beta, e, a, scale, state, segments, chunk_size, *_, **__) -> int:
    return 3 * _count(q, v, g, a, chunk_size)


def scan_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    e: Tensor | None,
    a: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The delta rule (beta) or the rank-1 transition (e, a) of `scan`, whose arguments these are, validated.

    Gated DeltaNet (arXiv 2412.06464), Kimi Delta Attention (arXiv 2510.26692), RWKV-7 (arXiv 2503.14456).

    Args:
        g: None, (B,T,H) or (B,T,H,K).
        state: (B,H,K,V) fp32.
        chunk_size: rounded down to 64, 32 or 16.

    Returns:
        o (B,T,H,V) in v's dtype, and the final state (B,H,K,V) fp32.
    """
    return scan_delta_forward(q, k, v, g, beta, e, a, float(scale), state, segments, chunk_size)
