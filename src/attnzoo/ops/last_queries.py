"""Causal softmax attention of the last T of S tokens on a GPU, without a table of T x S: prefill in chunks,
and ranks that share sequences.

torch offers it as `torch.nn.attention.bias.causal_lower_right`, a subclass of tensors that cannot be made on
fake tensors, while operations are counted, or in compiled code; so the kernels that it would choose are
called here. One of them is wrapped, for torch 2.13 can neither trace its gradients nor count its FLOPs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention.bias import CausalVariant
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
WIDTHS = 8  # both kernels want heads of a multiple of it
KIND, SUMS = int(CausalVariant.LOWER_RIGHT), 32  # the other one's: of mask; rows of sums are a multiple of it


def last_queries(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """Query i reads keys 0 to S - T + i.

    Args:
        q: ``(B, H, T, d)``; k, v: ``(B, G, S, d)``, consecutive query heads sharing; read in v's dtype, or in
            that of autocast, which does not reach these kernels by itself.

    Returns:
        ``(B, H, T, d)`` or some zeros wider, or None where no kernel takes them.
    """
    dtype, at = v.dtype, q.device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(at):
        dtype = torch.get_autocast_dtype(at)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if missing := -q.shape[-1] % WIDTHS:
        q, k, v = (F.pad(z, (0, missing)) for z in (q, k, v))
    kernel = kernel_for(q, k, v)
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]
    if kernel == "efficient":
        return efficient(q, *(_per_head(z, q.shape[1]) for z in (k, v)), scale)[0]
    return None


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Which kernel: "flash", "efficient" or None; a torch function mode may answer for tensors like it."""
    if has_torch_function((q, k, v)):
        return handle_torch_function(kernel_for, (q, k, v), q, k, v)
    if torch.version.hip is not None:  # the diagonal of AMD's kernels may begin at the first key
        return None
    if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, k.shape[1] != q.shape[1])):
        return "flash"
    k, v = (z[:, :1].expand(-1, q.shape[1], -1, -1) for z in (k, v))  # of the shape that it will get
    return "efficient" if can_use_efficient_attention(SDPAParams(q, k, v, None, 0.0, False, False)) else None


def _per_head(z: Tensor, heads: int) -> Tensor:
    """One head for each query head; no copy of a single one."""
    B, G, S, d = z.shape
    return z if heads == G else z[:, :, None].expand(B, G, heads // G, S, d).reshape(B, heads, S, d)


@torch.library.custom_op("attnzoo::efficient_attention", mutates_args=())
def efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `last_queries`, with as many heads of each, by the kernel that also takes fp32 and wide heads.

    Returns:
        the output, and the logarithms of the rows' sums as the kernel keeps them.
    """
    rows, unused = (z.transpose(1, 2) for z in (q, k, v)), (None,) * 5
    o, sums, *_ = aten._efficient_attention_forward(*rows, *unused, 0.0, KIND, True, scale=scale)
    return o.transpose(1, 2), sums


@torch.library.custom_op("attnzoo::efficient_attention_backward", mutates_args=())
def efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    T, S, seed = q.shape[2], k.shape[2], torch.zeros((), dtype=torch.int64)
    do, q, k, v, o = (z.transpose(1, 2) for z in (do, q, k, v, o))
    options = (None, None, T, S, sums, 0.0, seed, seed, KIND, False)
    found = aten._efficient_attention_backward(do.contiguous(), q, k, v, None, o, *options, scale=scale)
    return tuple(z.transpose(1, 2) for z in found[:3])


def _like(z: Tensor) -> Tensor:
    """The kernel's layout, ``(B, T, H, d)``."""
    B, H, T, d = z.shape
    return z.new_empty(B, T, H, d).transpose(1, 2)


@efficient.register_fake
def _(q, k, v, scale):
    B, H, T, _ = q.shape
    return _like(q), q.new_empty(B, H, -(-T // SUMS) * SUMS, dtype=torch.float32)


@efficient_backward.register_fake
def _(do, q, k, v, o, sums, scale):
    return _like(q), _like(k), _like(v)


def _keep(ctx, inputs, output) -> None:
    *rows, ctx.scale = inputs
    ctx.save_for_backward(*rows, *output)


def _backward(ctx, do: Tensor, dsums: Tensor | None) -> tuple[Tensor | None, ...]:
    return *efficient_backward(do, *ctx.saved_tensors, ctx.scale), None


efficient.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.attnzoo.efficient_attention)
def _forward_flops(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


@register_flop_formula(torch.ops.attnzoo.efficient_attention_backward)
def _backward_flops(do, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(do, q, k, v)
