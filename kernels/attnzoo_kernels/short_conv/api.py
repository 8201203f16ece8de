"""The front of the short convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.checks import check_choice, check_floats, check_same_dtype, check_shape
from attnzoo_kernels.short_conv.reference import short_conv_reference, with_tail

MAX_TAPS = 8


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    tail: Tensor | None = None,
    order: Tensor | None = None,
    return_tail: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution: y_t = act(b + sum_m w_m x_(t - n + 1 + m)) per channel.

    The short convolution before linear attention (Mamba, arXiv 2312.00752; DeltaNet, arXiv 2406.06484).

    Args:
        x: (B,T,C), read where it lies if its last axis is contiguous, whatever its other strides.
        weight: (C,n), 1 to 8 taps; the last meets the token itself. Its dtype may differ from x's.
        bias: (C,), in any dtype.
        activation: None or "silu".
        tail: (B,n-1,C) in x's dtype, the rows before x; None = zeros.
        order: (B,T) or (1,T) int32 or int64, how many tokens of its own document precede the token: a tap
            that reaches back further sees zero. None = no cuts.
        return_tail: also return the last n-1 rows of [tail, x], the tail of the next call.
        impl: "triton", "reference" or "auto".

    Returns:
        y (B,T,C) in x's dtype, accumulated in fp32 (fp64 if an operand is), or (y, new tail (B,n-1,C)).
        First derivatives by x, weight, bias and tail.

    Raises:
        ValueError: a shape, dtype, device or value is wrong.
    """
    _validate(x, weight, bias, activation, tail, order)
    silu, rows = activation == "silu", weight.shape[1] - 1
    # Without taps that reach back there is nothing before x and nothing to cut.
    before, cuts = (tail, order) if rows else (None, None)
    if launch.choose("short_conv", impl, x, weight, bias, tail) == "reference":
        y = short_conv_reference(x, weight, bias, before, cuts, silu)
    else:
        from attnzoo_kernels.short_conv.ops import short_conv_forward, worst

        launch.self_check("short_conv", x.device, worst)
        y = short_conv_forward(x, weight, bias, before, cuts, silu)
    return (y, _next_tail(x, tail, rows)) if return_tail else y


def _next_tail(x: Tensor, tail: Tensor | None, rows: int) -> Tensor:
    """A copy, so that a state does not keep a whole sequence in memory."""
    both = x if x.shape[1] >= rows else with_tail(x, tail, rows)
    return both[:, both.shape[1] - rows :].clone()


def _validate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    tail: Tensor | None,
    order: Tensor | None,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"x: needs shape (B, T, C), got {tuple(x.shape)}; flatten the heads into C")
    check_shape("x", x, tuple(x.shape))
    check_floats({"x": x, "weight": weight, "bias": bias, "tail": tail}, "x")
    B, T, C = x.shape
    check_shape("weight", weight, *((C, n) for n in range(1, MAX_TAPS + 1)))
    check_shape("bias", bias, (C,))
    check_choice("activation", activation, (None, "silu"))
    if tail is not None:
        _validate_tail(x, tail, (B, weight.shape[1] - 1, C))
    if order is not None:
        if order.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"order: needs dtype int32 or int64, got {order.dtype}; convert it")
        if order.device != x.device:
            raise ValueError(f"order: needs x's device {x.device}, got {order.device}; move it there")
        check_shape("order", order, (B, T), (1, T))


def _validate_tail(x: Tensor, tail: Tensor, shape: tuple[int, int, int]) -> None:
    check_same_dtype({"x": x, "tail": tail}, "x")
    if tuple(tail.shape) != shape:
        raise ValueError(f"tail: needs shape {shape}, got {tuple(tail.shape)}; keep the last n - 1 rows")
