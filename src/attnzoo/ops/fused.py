"""Steps of a decoder as single autograd nodes: fewer passes over memory than torch's own graph makes.

Each has a plain twin (``plain_*``): the definition, what `torch.compile` is given (it fuses by itself), and
what tests compare with. All are exact in fp64, work under autocast and recompute, and refuse double backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, in training on a CPU by the faster of torch's libraries."""
    if _splits(layer, x) and _onednn(x) and not torch.is_autocast_enabled("cpu"):
        return _SplitLinear.apply(x, layer.weight, [layer.out_features])[0]
    return layer(x)


def split_linear(layer: nn.Linear, x: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """``layer(x)`` split along its last axis into ``sizes``.

    In training on a CPU each part is a product of its own: it then lies contiguous, and element-wise work on
        it takes a
    half to a third of the time that slices of a common tensor take. Elsewhere, one product and views.
    """
    if not _splits(layer, x):
        return layer(x).split(sizes, dim=-1)
    weight = layer.weight
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    return _SplitLinear.apply(x, weight, sizes)


def _splits(layer: nn.Module, x: Tensor) -> bool:
    # whoever hooks or replaces a layer's forward must be called
    hooked = (
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in vars(layer)
    )
    plain = type(layer) is nn.Linear and layer.bias is None and not hooked
    return plain and x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * gain`` over the last axis, in at least fp32 (arXiv 1910.07467).

    Returns:
        The shape of ``x``, in its dtype; under autocast fp32 comes out in autocast's dtype, because the
        linear maps that follow would round it so.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return plain_rms_norm(x, gain, eps)
    dtype = x.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return _RMSNorm.apply(x, gain, eps, dtype)


def plain_rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch's own operations."""
    wide = _wide(x)
    return F.rms_norm(wide, x.shape[-1:], gain.to(wide.dtype), eps).to(x.dtype)


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """``silu(gate) * value`` (arXiv 2002.05202)."""
    return plain_swiglu(gate, value) if torch.compiler.is_compiling() else _SwiGLU.apply(gate, value)


def plain_swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """`swiglu` in torch's own operations."""
    return F.silu(gate) * value


def rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs of channels f and f + r/2 of the last axis; the result has the dtype of the tables.

    Args:
        z: ``(B, heads, T, r)``.
        cos, sin: ``(B or 1, T, 1, r)``, both halves filled, sin negative in the first.
    """
    return plain_rotate(z, cos, sin) if torch.compiler.is_compiling() else _Rotate.apply(z, cos, sin)


def plain_rotate(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in torch's own operations."""
    return z * cos.transpose(1, 2) + z.roll(z.shape[-1] // 2, -1) * sin.transpose(1, 2)


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies fp32 matrices: where torch has its entry, a tenth faster than MKL on AMD Zen
    4.

    Not under a dispatch mode (a FLOP counter), which knows torch's own operations only.
    """
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and x.dtype == torch.float32 and x.is_cpu and not torch._C._len_torch_dispatch_stack()


def _times(x: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """``x @ weight (+ onto)``; ``onto`` is overwritten or given up."""
    if not _onednn(x):
        return x @ weight if onto is None else onto.addmm_(x, weight)
    if onto is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight.t(), None, "add")


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, weight)
        ctx.sizes, ctx.shape = sizes, x.shape[:-1]
        return tuple(_times(rows, part.t()).unflatten(0, ctx.shape) for part in weight.split(sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grads = [grad.flatten(0, -2) for grad in grads]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            for grad, part in zip(grads, weight.split(ctx.sizes), strict=True):
                grad_x = _times(grad, part, onto=grad_x)
            grad_x = grad_x.unflatten(0, ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            for grad, part in zip(grads, grad_weight.split(ctx.sizes), strict=True):
                torch.mm(grad.t(), rows, out=part)
        return grad_x, grad_weight, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, inverse)
        return (wide * inverse).mul_(gain).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        wide, grad, scale = _wide(x), _wide(grad), _wide(gain)
        product = grad * wide
        rows = product.flatten(0, -2)
        grad_gain = None
        if ctx.needs_input_grad[1]:
            # a product of matrices sums over rows faster than sum() does
            grad_gain = (inverse.reshape(1, -1) @ rows)[0].to(gain.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_gain, None, None
        pull = (rows @ scale).reshape(inverse.shape) * inverse.square() / -x.shape[-1]
        grad_x = torch.mul(grad, scale, out=product).addcmul_(wide, pull).mul_(inverse)
        return grad_x.to(x.dtype), grad_gain, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, value: Tensor) -> Tensor:
        s = F.silu(gate)
        ctx.save_for_backward(gate, value, s)
        return s * value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value, s = ctx.saved_tensors
        grad_gate = grad * value
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, grad * s


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = z.dtype
        return _turn(z.transpose(1, 2).to(cos.dtype), cos, sin).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad.transpose(1, 2), cos, -sin).transpose(1, 2).to(ctx.dtype), None, None


def _turn(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(B, T, heads, r)``: one pass over whole heads, then one over each half."""
    half = z.shape[-1] // 2
    out = z * cos
    out[..., :half].addcmul_(z[..., half:], sin[..., :half])
    out[..., half:].addcmul_(z[..., :half], sin[..., half:])
    return out
