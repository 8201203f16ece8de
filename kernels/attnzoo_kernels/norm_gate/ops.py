"""The gated norm as custom ops of torch, over the Triton kernels; operands have four axes, (B,H,T,d)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.norm_gate.reference import norm_gate_reference

# Programs of the backward: enough to fill a GPU some times over, few enough to sum at no cost.
PROGRAMS = 2048


def _empty(like: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """In ``like``'s own order of axes, rows contiguous; or of a shape."""
    if shape is not None:
        return like.new_empty(shape, dtype=dtype)
    same = torch.empty_like(_rows(like))
    return same if same.stride(-1) == 1 else same.new_empty(same.shape)


def _rows(x: Tensor) -> Tensor:
    """Channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bucket(o: Tensor, gate: Tensor | None) -> tuple:
    d = o.shape[-1]
    return launch.bucket(o.numel() // d), launch.power_of_2(d, 16), gate is not None, str(o.dtype)


@torch.library.custom_op("attnzoo::norm_gate_forward", mutates_args=())
def norm_gate_forward(o: Tensor, gain: Tensor, gate: Tensor | None, silu: bool, eps: float) -> Tensor:
    from attnzoo_kernels.norm_gate import kernel as k

    B, H, T, d = o.shape
    wide, rows = launch.power_of_2(d, 16), B * H * T
    x, y = _rows(o), _empty(o)
    z = x if gate is None else _rows(gate)
    strides = [size for tensor in (x, z, y) for size in tensor.stride()[:3]]

    def run(tile: launch.Tile) -> None:
        k.FORWARD.fn[(-(-rows // (tile.meta["BLOCK"] // wide)),)](
            x, gain.contiguous(), z, y, rows, H, T, d, eps, *strides,
            HAS_GATE=gate is not None, SILU=silu, BLOCK_D=wide, **tile.meta,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    run(launch.tuner.pick(k.FORWARD, _bucket(o, gate), o.device, run))
    return y


@norm_gate_forward.register_fake
def _(o: Tensor, gain: Tensor, gate: Tensor | None, silu: bool, eps: float) -> Tensor:
    return _empty(o)


@torch.library.custom_op("attnzoo::norm_gate_backward", mutates_args=())
def norm_gate_backward(
    g: Tensor, o: Tensor, gain: Tensor, gate: Tensor | None, silu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By o, gain and gate; without an element where there is no gate."""
    from attnzoo_kernels.norm_gate import kernel as k

    B, H, T, d = o.shape
    wide, rows = launch.power_of_2(d, 16), B * H * T
    g, x, do = _rows(g), _rows(o), _empty(o)
    z, dgate = (x, do) if gate is None else (_rows(gate), _empty(gate))
    strides = [size for tensor in (g, x, z, do, dgate) for size in tensor.stride()[:3]]

    def run(tile: launch.Tile) -> Tensor:
        blocks = -(-rows // (tile.meta["BLOCK"] // wide))
        steps = -(-blocks // PROGRAMS)
        programs = -(-blocks // steps)
        parts = _empty(o, (programs, d), torch.float32)
        k.BACKWARD.fn[(programs,)](
            g, x, gain.contiguous(), z, do, dgate, parts, rows, H, T, d, eps, steps, *strides,
            HAS_GATE=gate is not None, SILU=silu, BLOCK_D=wide, **tile.meta,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return parts

    parts = run(launch.tuner.pick(k.BACKWARD, _bucket(o, gate), o.device, run))
    return do, parts.sum(0).to(gain.dtype), o.new_empty(0) if gate is None else dgate


@norm_gate_backward.register_fake
def _(
    g: Tensor, o: Tensor, gain: Tensor, gate: Tensor | None, silu: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(o), gain.new_empty(gain.shape), o.new_empty(0) if gate is None else _empty(gate)


def _setup(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.silu, ctx.eps = inputs[3:]


def _backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    o, gain, gate = ctx.saved_tensors
    do, dgain, dgate = norm_gate_backward(g, o, gain, gate, ctx.silu, ctx.eps)
    return do, dgain, None if gate is None else dgate, None, None


norm_gate_forward.register_autograd(_backward, setup_context=_setup)


def worst(device: torch.device) -> tuple[float, float]:
    """Largest error of result and gradients on a small case, and what rounding explains."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 37, 70), (70,), (2, 3, 37, 70), (2, 3, 37, 70))
    *operands, by_y = (torch.randn(*shape, generator=draw).to(device) for shape in shapes)
    results = []
    with torch.enable_grad():
        for run, activation in ((norm_gate_forward, True), (norm_gate_reference, "silu")):
            leaves = [z.clone().requires_grad_() for z in operands]
            y = run(*leaves, activation, 1e-6)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, by_y)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True)), 1e-3
