"""Element-wise steps of a decoder as single autograd nodes: fewer passes over memory than torch's own graph makes.

Each has a plain twin (``plain_*``): the definition, what `torch.compile` is given (it fuses by itself), and what
tests compare with. All are exact in fp64, work under autocast and recompute, and refuse double backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * gain`` over the last axis, in at least fp32 (arXiv 1910.07467).

    Returns:
        The shape of ``x``, in its dtype; under autocast fp32 comes out in autocast's dtype, because the linear maps
        that follow would round it so.
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


def swiglu(z: Tensor) -> Tensor:
    """``silu(a) * b`` of the halves ``[a, b]`` of the last axis (arXiv 2002.05202)."""
    return plain_swiglu(z) if torch.compiler.is_compiling() else _SwiGLU.apply(z)


def plain_swiglu(z: Tensor) -> Tensor:
    """`swiglu` in torch's own operations."""
    a, b = z.chunk(2, dim=-1)
    return F.silu(a) * b


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
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        a, b = z.chunk(2, dim=-1)
        s = F.silu(a)
        ctx.save_for_backward(z, s)
        return s * b

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        z, s = ctx.saved_tensors
        a, b = z.chunk(2, dim=-1)
        out = torch.empty_like(z)
        grad_a, grad_b = out.chunk(2, dim=-1)
        torch.mul(grad, s, out=grad_b)
        torch.mul(grad, b, out=grad_a)
        torch.ops.aten.silu_backward.grad_input(grad_a, a, grad_input=grad_a)
        return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = z.dtype
        return _turn(z.transpose(1, 2), cos, sin).transpose(1, 2)

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
