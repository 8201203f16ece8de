"""One token of the scan as a custom op of torch, over its Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.scan.driver import empty


@torch.library.custom_op("attnzoo::scan_step", mutates_args=())
def scan_step_kernel(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, e: Tensor | None,
    a: Tensor | None, scale: float, fresh: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B,H,V) in v's dtype and the next state (B,H,K,V) fp32; without gradients.

    Args:
        state: (B,H,K,V) fp32.
        q, k, e, a: (B,H,K). v: (B,H,V). beta: (B,H). g: None, (B,H) or (B,H,K).
        fresh: (B,) bool, rows whose state is dropped first; None = no row.
    """
    from attnzoo_kernels.scan.kernel_step import STEP

    (B, H, K, V), given = state.shape, [state, q, k, v, g, beta, e, a]
    state, q, k, v, g, beta, e, a = (q if x is None else x.contiguous() for x in given)
    o, out = empty(q, (B, H, V), v.dtype), empty(q, (B, H, K, V), torch.float32)
    gate = 0 if given[4] is None else g.dim() - 1

    def run(tile: launch.Tile) -> None:
        STEP.fn[(B * H, -(-V // tile.meta["BV"]))](
            state, q, k, v, g, beta, e, a, q if fresh is None else fresh.to(torch.int8), o, out, scale,
            H, K, V, KP=launch.power_of_2(K, 16), GATE=gate, DELTA=given[5] is not None,
            RANK_ONE=given[7] is not None, FRESH=fresh is not None, **tile.meta, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip

    run(launch.tuner.pick(STEP, (launch.power_of_2(B * H), K, V, str(q.dtype)), q.device, run))
    return o, out


@scan_step_kernel.register_fake
def _(state, q, k, v, g, beta, e, a, scale, fresh) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


@register_flop_formula(torch.ops.attnzoo.scan_step)
def _flops(state, q, k, v, g, beta, e, a, scale, fresh, *_, **__) -> int:
    B, H, K, V = state
    return 2 * B * H * K * V * (2 + (beta is not None) + 2 * (a is not None))
