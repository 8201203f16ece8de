"""The front of decoding over latents."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.checks import check_floats, check_same_dtype, check_shape
from attnzoo_kernels.latent_decode.reference import latent_decode_reference
from attnzoo_kernels.span import Span

LARGEST = 512


def latent_decode(
    q: Tensor, c: Tensor, k_rope: Tensor | None, span: Span, *, scale: float, impl: str = "auto"
) -> Tensor:
    """Attention of one token in the absorbed form of multi-head latent attention, arXiv 2405.04434.

        s_j = scale (q_c . c_j + q_r . k_rope_j),  o = sum_j softmax_j(s) c_j  over the keys of the span

    Args:
        q: (B,H,1,d_c + d_r) queries in latent space, their rotary part appended.
        c: (B,S,d_c) cached latents, keys and values at once; may be a slice of a larger cache.
        k_rope: (B,S,d_r) rotary keys that all heads share, or None (d_r = 0); may be a slice too.
        span: visible keys of the one query of every row; first and own (B or 1, 1), window and sinks too.
        scale: factor of the scores.
        impl: "triton" (d_c and d_r up to 512), "reference" or "auto": kernels on a GPU, the reference
            elsewhere and wherever a gradient is wanted.

    Returns:
        o (B,H,1,d_c) in q's dtype, accumulated in fp32 (fp64 for fp64); 0 in rows that see nothing. The
        reference alone has gradients.

    Raises:
        ValueError: a shape, dtype or device is wrong, or impl="triton" cannot run these operands.
    """
    _validate(q, c, k_rope, span)
    given = [x for x in (q, c, k_rope) if x is not None]
    if launch.choose("latent_decode", impl, *given, refusal=_refusal(given)) == "reference":
        return latent_decode_reference(q, c, k_rope, span, scale)
    from attnzoo_kernels.latent_decode.ops import latent_decode_kernels, worst

    launch.self_check("latent_decode", q.device, worst)
    return latent_decode_kernels(q, c, k_rope, span, scale)


def _refusal(given: list[Tensor]) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "the kernels have no gradient; use impl='reference', or torch.no_grad() for inference"
    widest = max(x.shape[-1] for x in given[1:])
    if widest > LARGEST:
        return f"the kernels take widths up to {LARGEST}, got {widest}; use impl='reference'"
    return None


def _validate(q: Tensor, c: Tensor, k_rope: Tensor | None, span: Span) -> None:
    if q.dim() != 4 or q.shape[2] != 1:
        raise ValueError(
            f"q: needs shape (B, H, 1, d_c + d_r), got {tuple(q.shape)}; one token is decoded at a time"
        )
    if c.dim() != 3:
        raise ValueError(
            f"c: needs shape (B, S, d_c), got {tuple(c.shape)}; drop the axis of the one key head"
        )
    if k_rope is not None and k_rope.dim() != 3:
        raise ValueError(
            f"k_rope: needs shape (B, S, d_r), got {tuple(k_rope.shape)}; drop the axis of the one key head"
        )
    tensors = {"q": q, "c": c, "k_rope": k_rope}
    check_floats(tensors, "q")
    check_same_dtype(tensors, "q")
    (B, H, _, _), (_, S, d_c) = q.shape, c.shape
    d_r = 0 if k_rope is None else k_rope.shape[-1]
    check_shape("c", c, (B, S, d_c))
    check_shape("k_rope", k_rope, (B, S, d_r))
    check_shape("q", q, (B, H, 1, d_c + d_r))
    span.check(B, 1, S, q.device)
