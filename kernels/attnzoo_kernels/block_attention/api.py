"""The front of attention to listed blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.block_attention.reference import block_attention_reference
from attnzoo_kernels.checks import check_floats, check_same_dtype, check_shape
from attnzoo_kernels.span import Span

LARGEST = 256
MOST_SHARED = 64  # query heads that read one list


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    span: Span,
    *,
    query_block: int,
    key_block: int,
    scale: float | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which a block of queries sees listed blocks of keys alone, and of those what the
    span shows: selected blocks (NSA, arXiv 2502.11089; MoBA, 2502.13189), strided and other fixed patterns.

    Args:
        q: (B,H,T,d). k: (B,G,S,d). v: (B,G,S,d_v), with H a multiple of G. Any strides.
        blocks: (B,L,ceil(T / query_block),n) int32 or int64 indices of key blocks, in any order; -1 = none.
            L lists per batch, G <= L <= H, are shared by H / L query heads each. A block may stand in a list
            once only (checked on a CPU).
        span: visible keys of every row.
        query_block, key_block: tokens in a block; query_block a power of 2, key_block 16, 32, 64 or 128 for
            the kernels. query_block = 1 selects per token.
        scale: d ** -0.5 by default.
        impl: "triton", "reference" or "auto".
        return_lse: also the log-sum-exp of every row.

    Returns:
        o (B,H,T,d_v) in v's dtype, accumulated in fp32 (fp64 for fp64), 0 in rows that see nothing; and lse
        (B,H,T), -inf there. Gradients of q, k and v, through lse too. Work O(T n key_block).

    Raises:
        ValueError: a shape, dtype, device or value is wrong.
    """
    _validate(q, k, v, blocks, span, query_block, key_block)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    why = _refusal(q, v, blocks, query_block, key_block)
    why = why and f"{why}; use impl='reference'"
    if launch.choose("block_attention", impl, q, k, v, refusal=why) == "reference":
        o, lse = block_attention_reference(q, k, v, blocks, span, query_block, key_block, scale)
    else:
        from attnzoo_kernels.block_attention.ops import block_attention_kernels, worst

        launch.self_check("block_attention", q.device, worst)
        o, lse = block_attention_kernels(q, k, v, blocks, span, query_block, key_block, scale)
    return (o, lse) if return_lse else o


def _refusal(q: Tensor, v: Tensor, blocks: Tensor, query_block: int, key_block: int) -> str | None:
    widest, shared = max(q.shape[-1], v.shape[-1]), q.shape[1] // blocks.shape[1]
    if widest > LARGEST:
        return f"widths go up to {LARGEST}, got {widest}"
    if key_block not in (16, 32, 64, 128):
        return f"key blocks have 16, 32, 64 or 128 tokens, got {key_block}"
    if query_block & (query_block - 1):
        return f"query blocks have a power of 2 of tokens, got {query_block}"
    if q.shape[0] * blocks.shape[1] > launch.MOST_PROGRAMS:
        return f"B L goes up to {launch.MOST_PROGRAMS}, got {q.shape[0] * blocks.shape[1]}"
    if shared > MOST_SHARED:
        return f"up to {MOST_SHARED} query heads share a list, got {shared}"
    return None


def _validate(q, k, v, blocks, span, query_block, key_block) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("blocks", blocks)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: needs 4 axes, got {tuple(x.shape)}; see block_attention for their order"
            )
    for name, size in (("query_block", query_block), ("key_block", key_block)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: needs an integer of at least 1, got {size!r}")
    check_floats({"q": q, "k": k, "v": v}, "q")
    check_same_dtype({"q": q, "k": k, "v": v}, "q")
    (B, H, T, d), (_, G, S, _), L = q.shape, k.shape, blocks.shape[1]
    check_shape("q", q, (B, H, T, d))
    check_shape("k", k, (B, G, S, d))
    check_shape("v", v, (B, G, S, v.shape[-1]))
    if H % G:
        raise ValueError(f"k: its heads must divide q's {H}, got {G}")
    check_shape("blocks", blocks, (B, L, -(-T // query_block), blocks.shape[3]))
    if L % G or H % L:
        raise ValueError(f"blocks: needs a number of lists between k's {G} and q's {H} heads, got {L}")
    if blocks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"blocks: needs int32 or int64 indices, got {blocks.dtype}; use .int()")
    if blocks.device != q.device:
        raise ValueError(f"blocks: needs q's device {q.device}, got {blocks.device}; move it there")
    if not (blocks.is_cuda or torch.compiler.is_compiling()):
        _check_lists(blocks, -(-S // key_block))
    span.check(B, T, S, q.device)


def _check_lists(blocks: Tensor, number: int) -> None:
    if blocks.min() < -1 or blocks.max() >= number:
        wrong = blocks[(blocks < -1) | (blocks >= number)][0]
        raise ValueError(f"blocks: indices lie between -1 and {number - 1}, got {int(wrong)}")
    order = blocks.sort(-1).values
    if ((order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)).any():
        raise ValueError("blocks: a list names a block twice, which would count its keys twice; drop one")
