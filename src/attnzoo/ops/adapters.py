"""The other implementations of softmax attention: our kernels, FlexAttention and xformers.

Each adapter maps the operands of `attention` to one call and says what it refuses; none falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from attnzoo.attention.stages.mask import Mask, band
from attnzoo.attention.timeline import EVERY, Axis
from attnzoo_kernels.span import Span


def band_of(mask: Mask) -> tuple[int | None, int] | None:
    """``(window, n_sink)`` of a causal mask with at most a window and sinks; None for other masks."""
    reach = mask.reach()
    if reach is None:
        return (None, 0) if mask == band() else None
    found = reach + 1, mask.sinks()
    return found if reach >= 0 and mask == band(*found) else None


def span_of(mask: Mask, query: Axis, keys: int) -> Span:
    """The kernels' form of a band over keys whose last T columns are the queries' own tokens."""
    window, n_sink = band_of(mask)
    T, device = query.order.shape[1], query.order.device
    own = torch.arange(keys - T, keys, dtype=torch.int32, device=device)[None]
    first = torch.zeros_like(own)
    if query.doc is not None:
        first = (own - query.order).clamp(min=0).to(torch.int32)
        own = own.expand_as(first).contiguous()
    return Span(first, own, window, n_sink)


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, query: Axis, key: Axis, scale: float, once: Callable
) -> Tensor:
    """FlexAttention with the mask as a block mask: any mask and any key axis.

    Raises:
        ValueError: on a CPU with gradients, where FlexAttention has no backward.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if q.is_cpu and torch.is_grad_enabled() and any(z.requires_grad for z in (q, k, v)):
        raise ValueError(
            "impl: 'flex' has no backward on a CPU, got tensors that require gradients; "
            "use impl=sdpa to train here, or torch.no_grad()"
        )
    T, S, batch = q.shape[2], k.shape[2], max(query.order.shape[0], key.order.shape[0])
    rule = flex_rule(mask, query, key, q.shape[0])
    make = lambda: create_block_mask(rule, batch, None, T, S, device=q.device)  # noqa: E731
    seen = make() if key.tag is None else once(("flex", mask, key.tag, T, S), make)
    run = flex_attention if q.is_cpu else _compiled_flex()
    o = run(q, k, v, block_mask=seen, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return o.to(v.dtype)


def flex_rule(mask: Mask, query: Axis, key: Axis, batch: int) -> Callable[..., Tensor]:
    """The mask as FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)`` over documents and caches."""
    query, key = mask.axes(query, key)
    q_order, k_order = (axis.order.expand(batch, -1) for axis in (query, key))
    if key.doc is None:
        return lambda b, h, i, j: mask.rule(q_order[b, i], k_order[b, j])
    doc = torch.zeros_like(query.order) if query.doc is None else query.doc
    q_doc, k_doc = doc.expand(batch, -1), key.doc.expand(batch, -1)
    return lambda b, h, i, j: (
        mask.rule(q_order[b, i], k_order[b, j]) & ((q_doc[b, i] == k_doc[b, j]) | (k_doc[b, j] == EVERY))
    )


@lru_cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Mask, query: Axis, scale: float) -> Tensor:
    """xformers' memory_efficient_attention; key ``S - T + i`` is query ``i``'s own token.

    Packed documents become one row of all the batch's documents, with a block-diagonal bias.
    """
    ops = importlib.import_module("xformers.ops")
    (B, H, T, _), S = q.shape, k.shape[2]
    if k.shape[1] != H:
        k, v = (z.repeat_interleave(H // z.shape[1], dim=1) for z in (k, v))
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    bias = xformers_bias(mask, query, B, T, S)
    if query.doc is None:
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)
    flat = (z.reshape(1, B * T, *z.shape[2:]) for z in (q, k, v))
    o = ops.memory_efficient_attention(*flat, attn_bias=bias, scale=scale)
    return o.reshape(B, T, *o.shape[2:]).transpose(1, 2)


def xformers_bias(mask: Mask, query: Axis, batch: int, T: int, S: int):
    """The attention bias of a band: none for one query that sees all, triangular, local, block-diagonal.

    Raises:
        ValueError: sinks beside a window, a mask that is no band, or documents together with a cache.
    """
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    found = band_of(mask)
    if found is None or found[1]:
        raise ValueError(f"impl: 'xformers' knows causal masks and windows, got {mask}; use sdpa or flex")
    window = found[0]
    if query.doc is not None:
        if T != S:
            raise ValueError(
                f"impl: 'xformers' takes documents without a cache, got {T} queries and {S} keys; "
                "use sdpa or flex"
            )
        begins = query.order.expand(batch, T) == 0
        begins[:, 0] = True
        places = [*begins.flatten().nonzero().flatten().tolist(), batch * T]
        lengths = [b - a for a, b in pairwise(places)]
        blocks = bias.BlockDiagonalCausalMask.from_seqlens(lengths)
        return blocks if window is None else blocks.make_local_attention(window)
    if window is not None:
        return bias.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=window)
    if T == 1:
        return None
    return bias.LowerTriangularMask() if T == S else bias.LowerTriangularFromBottomRightMask()


def has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None
