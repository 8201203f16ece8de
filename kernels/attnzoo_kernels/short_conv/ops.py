"""The short convolution as custom ops of torch, over the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.short_conv.reference import short_conv_reference


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _rows(x: Tensor) -> Tensor:
    """Channels side by side, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, order: Tensor | None
) -> tuple[list[Tensor], list[int], dict[str, bool]]:
    """What both kernels take: pointers, strides and flags; x stands in for what is not given."""
    given = {"HAS_BIAS": bias is not None, "HAS_TAIL": tail is not None, "HAS_ORDER": order is not None}
    x, tail = _rows(x), x if tail is None else _rows(tail)
    order = x if order is None else order.expand(x.shape[:2])
    pointers = [x, weight.contiguous(), x if bias is None else bias.contiguous(), tail, order]
    strides = [*x.stride()[:2], *tail.stride()[:2], *order.stride()[:2]]
    return pointers, strides, given


def _bucket(x: Tensor, weight: Tensor) -> tuple:
    B, T, C = x.shape
    return launch.bucket(B * T), launch.power_of_2(C, 64), weight.shape[1], str(x.dtype)


@torch.library.custom_op("attnzoo::short_conv_forward", mutates_args=())
def short_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, order: Tensor | None, silu: bool
) -> Tensor:
    from attnzoo_kernels.short_conv import kernel as k

    B, T, C = x.shape
    y = _empty(x, (B, T, C), x.dtype)
    pointers, strides, given = _operands(x, weight, bias, tail, order)

    def run(tile: launch.Tile) -> None:
        blocks = -(-T // tile.meta["ROWS"])
        k.FORWARD.fn[(B * blocks, -(-C // tile.meta["BLOCK_C"]))](
            *pointers, y, T, C, blocks, *strides, N=weight.shape[1], SILU=silu,
            **given, **tile.meta, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    run(launch.tuner.pick(k.FORWARD, _bucket(x, weight), x.device, run))
    return y


@short_conv_forward.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, order: Tensor | None, silu: bool
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("attnzoo::short_conv_backward", mutates_args=())
def short_conv_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    order: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By x, weight, bias and tail; without an element where there is no bias or no tail."""
    from attnzoo_kernels.short_conv import kernel as k

    (B, T, C), n = x.shape, weight.shape[1]
    g, dx = _rows(g), _empty(x, (B, T, C), x.dtype)
    dtail = x.new_empty(0) if tail is None else _empty(x, (B, n - 1, C), x.dtype)
    pointers, strides, given = _operands(x, weight, bias, tail, order)

    def run(tile: launch.Tile) -> Tensor:
        blocks = -(-T // (tile.meta["GROUPS"] * tile.meta["LENGTH"]))
        # Summed over the programs by torch: the bias first, then the taps from the last to the first.
        parts = _empty(x, (B * blocks, n + 1, C), torch.float32)
        k.BACKWARD.fn[(B * blocks, -(-C // tile.meta["BLOCK_C"]))](
            g, *pointers, dx, dtail, parts, T, C, blocks, *g.stride()[:2], *strides, N=n, SILU=silu,
            **given, **tile.meta, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return parts

    sums = run(launch.tuner.pick(k.BACKWARD, _bucket(x, weight), x.device, run)).sum(0)
    dweight = sums[1:].flip(0).t().to(weight.dtype).contiguous()
    dbias = x.new_empty(0) if bias is None else sums[0].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dtail


@short_conv_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tail: Tensor | None,
    order: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shaped = [x.new_empty(0) if z is None else z.new_empty(z.shape) for z in (weight, bias, tail)]
    return x.new_empty(x.shape), *shaped


def _setup(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.silu = inputs[5]


def _backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, tail, order = ctx.saved_tensors
    dx, dweight, dbias, dtail = short_conv_backward(g, x, weight, bias, tail, order, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if tail is None else dtail, None, None


short_conv_forward.register_autograd(_backward, setup_context=_setup)


def worst(device: torch.device) -> tuple[float, float]:
    """Largest error of result and gradients on a small case, and what rounding explains."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 37, 70), (70, 4), (70,), (2, 3, 70), (2, 37, 70))
    *operands, by_y = (torch.randn(*shape, generator=draw).to(device) for shape in shapes)
    order = (torch.arange(37, device=device) % 11).expand(2, 37)
    results = []
    with torch.enable_grad():
        for run in (short_conv_forward, short_conv_reference):
            leaves = [z.clone().requires_grad_() for z in operands]
            y = run(*leaves, order, True)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, by_y)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True)), 1e-3
