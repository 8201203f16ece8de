"""The plain scan as custom ops of torch, over the Triton kernels; the backward keeps the inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels.scan.driver import Driver, chunk_of
from attnzoo_kernels.scan.flops import scan_flops


class _Scan(Driver):
    def states(self) -> None:
        """The scores of chunks under a diagonal decay, the states and the final one."""
        from attnzoo_kernels.scan import kernel_delta_diagonal as diagonal
        from attnzoo_kernels.scan import kernel_plain_states as kernels

        if self.diagonal:
            self.rows("scores", self.C)
            self.run(diagonal.PAIRS_DIAGONAL, self.count, (self.C // 16) ** 2)
        self.new("states", self.B * self.H, self.N + 1, self.KP, self.VP)
        self.new("final", self.B, self.H, self.K, self.V, dtype=torch.float32)
        self.run(kernels.STATES_FORWARD, self.B * self.H, self.keys_axis, self.values_axis)

    def outputs(self) -> tuple[Tensor, Tensor]:
        from attnzoo_kernels.scan import kernel_plain_states as kernels

        o = self.new("o", self.B, self.T, self.H, self.V, dtype=self.out)
        self.run(kernels.OUTPUTS, self.count, self.values_axis)
        return o, self.x["final"]

    def backward(self, do: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
        """Gradients of q, k, v, g and the state, in the dtypes of the work."""
        from attnzoo_kernels.scan import kernel_delta_diagonal as diagonal
        from attnzoo_kernels.scan import kernel_plain_gradients as kernels

        B, T, H, K, V = self.B, self.T, self.H, self.K, self.V
        self.x |= {"do": do.to(self.dtype).contiguous(), "dfinal": dfinal.float().contiguous()}
        self.new("dstates", self.count, self.KP, self.VP)
        found = {"state": self.new("dinitial", B, H, K, V, dtype=torch.float32)}
        # as many parts as the smallest tile makes
        least = min(self.VP, min(tile.meta["BV"] for tile in kernels.STATES_BACKWARD.tiles))
        dcarry = self.new("dcarry", self.VP // least, self.count, self.KP, dtype=torch.float32)
        used = self.run(kernels.STATES_BACKWARD, B * H, self.keys_axis, self.values_axis)
        self.x["parts"] = self.values_axis(used)
        self.rows("dscores", self.C)
        found["v"] = self.new("dv", B, T, H, V)
        self.run(kernels.VALUE_GRADIENTS, self.count)
        found |= {"q": self.new("dq_out", B, T, H, K), "k": self.new("dk_out", B, T, H, K)}
        if self.diagonal:
            self.new("inner", 3, self.count, self.C, self.KP, dtype=torch.float32)
            self.run(diagonal.PAIRS_DIAGONAL_BACKWARD, self.count, self.C // 16, self.keys_axis)
            found["g"] = self.new("dgates", B, T, H, K, dtype=torch.float32)
        else:
            least = min(self.KP, min(tile.meta["BK"] for tile in kernels.KEY_GRADIENTS.tiles))
            dgates = self.new("dgates", self.KP // least, self.count, self.C, dtype=torch.float32)
        blocks = self.keys_axis(self.run(kernels.KEY_GRADIENTS, self.count, self.keys_axis))
        if not self.diagonal:
            dsums = dgates[:blocks].sum(0).flip(-1).cumsum(-1).flip(-1)
            total = dcarry[: self.x["parts"]].sum((0, 2))
            found["g"] = self.per_token(dsums + total[:, None])
        return found


@torch.library.custom_op("attnzoo::scan_plain_forward", mutates_args=())
def scan_plain_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, state: Tensor, segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = _Scan(q, k, v, g, None, None, None, scale, state, segments, chunk_size)
    work.states()
    return work.outputs()


@scan_plain_forward.register_fake
def _(q, k, v, g, scale, state, segments, chunk_size) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("attnzoo::scan_plain_backward", mutates_args=())
def scan_plain_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float,
    state: Tensor, segments: Tensor | None, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (if given) and the state."""
    work = _Scan(q, k, v, g, None, None, None, scale, state, segments, chunk_size)
    work.states()
    found = work.backward(do, dfinal)
    given = {"q": q, "k": k, "v": v, "g": g, "state": state}
    return [found[name].to(x.dtype).contiguous() for name, x in given.items() if x is not None]


@scan_plain_backward.register_fake
def _(do, dfinal, q, k, v, g, scale, state, segments, chunk_size) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, g, state) if x is not None]


def _setup(ctx, inputs, output) -> None:
    q, k, v, g, ctx.scale, state, segments, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, g, state, segments)


def _backward(ctx, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, state, segments = ctx.saved_tensors
    found = iter(scan_plain_backward(do, dfinal, q, k, v, g, ctx.scale, state, segments, ctx.chunk_size))
    dq, dk, dv, dg, dstate = (None if x is None else next(found) for x in (q, k, v, g, state))
    return dq, dk, dv, dg, None, dstate, None, None


scan_plain_forward.register_autograd(_backward, setup_context=_setup)


def _count(q: Any, v: Any, g: Any, chunk_size: int) -> int:
    (B, T, H, K), V = q, v[-1]
    kind = "diagonal" if g is not None and len(g) == 4 else "scalar"
    return B * scan_flops(kind, T, H, K, V, chunk_of(chunk_size, T)).executed


@register_flop_formula(torch.ops.attnzoo.scan_plain_forward)
def _forward_flops(q, k, v, g, scale, state, segments, chunk_size, *_, **__) -> int:
    return _count(q, v, g, chunk_size)


@register_flop_formula(torch.ops.attnzoo.scan_plain_backward)
def _backward_flops(do, dfinal, q, k, v, g, scale, state, segments, chunk_size, *_, **__) -> int:
    return 3 * _count(q, v, g, chunk_size)


def scan_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The plain classes of `scan`, whose arguments these are, validated: no, a constant, a scalar or a
    diagonal decay.

    Linear attention, arXiv 2006.16236; RetNet, 2307.08621; Mamba-2, 2405.21060; GLA, 2312.06635.

    Args, returns: as `scan_delta`.
    """
    return scan_plain_forward(q, k, v, g, float(scale), state, segments, chunk_size)
