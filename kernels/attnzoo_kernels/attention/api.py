"""The front of attention with a choice of normaliser."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.attention.reference import attention_reference
from attnzoo_kernels.checks import check_choice, check_floats, check_same_dtype, check_shape
from attnzoo_kernels.span import Span

NORMALISERS = ("softmax", "signed", "clipped_softmax", "sigmoid", "relu", "softplus_l1")
LARGEST = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    *,
    normaliser: str = "softmax",
    scale: float | None = None,
    bias: Tensor | float | None = None,
    sink: str | Tensor | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
    cap: float | None = None,
    slopes: Tensor | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j w_ij v_j over the keys of the span, with s_ij = scale q_i . k_j and

        softmax          w = e^s / (sum e^s + e^sink)
        signed           w = sign(s) e^|s| / sum e^|s|                      Cog attention, arXiv 2411.07176
        clipped_softmax  w = clip((zeta - gamma) softmax(s) + gamma, 0, 1)  arXiv 2306.12929
        sigmoid          w = 1 / (1 + e^-(s + bias))                        arXiv 2409.04431
        relu             w = max(s + bias, 0)                               ReLA, arXiv 2104.07012
        softplus_l1      w = softplus(s) / sum softplus(s)                  LSSA, arXiv 2501.13428

    where s has gone through cap tanh(s / cap) and then lost slopes_h (i - j), in that order.

    Args:
        q: (B,H,T,d). k: (B,G,S,d). v: (B,G,S,d_v), with H a multiple of G. Any strides.
        span: visible keys of every row: causal, documents, windows with sinks, caches.
        normaliser: of the table above.
        scale: d ** -0.5 by default.
        bias: number or (H,), for sigmoid and relu.
        sink: for softmax, "off_by_one" (a score of 0) or (H,) learned scores, arXiv 2309.17453.
        clip: (gamma <= 0, zeta >= 1) of the clipped softmax.
        cap: soft cap of the scores, above 0.
        slopes: (H,) of ALiBi (arXiv 2108.12409), natural units per token; constants.
        impl: "triton" (widths up to 256), "reference" or "auto".
        return_lse: also the log-sum-exp of softmax (with its sink), or of |s| for signed.

    Returns:
        o (B,H,T,d_v) in v's dtype, accumulated in fp32 (fp64 for fp64), exactly 0 in rows that see nothing;
        and lse (B,H,T), -inf there. Gradients of q, k, v, bias and sink, through lse too.

    Raises:
        ValueError: a shape, dtype, device, value or combination is wrong.
    """
    _validate(q, k, v, span, normaliser, clip, cap, slopes)
    H, d = q.shape[1], q.shape[-1]
    scale = d**-0.5 if scale is None else scale
    bias = _per_head("bias", bias, q)
    if bias is not None and normaliser not in ("sigmoid", "relu"):
        raise ValueError(f"bias: only sigmoid and relu have one, got it with {normaliser!r}; leave it out")
    if isinstance(sink, str):
        check_choice("sink", sink, ("off_by_one",))
        sink = q.new_zeros(H, dtype=torch.float32)
    if sink is not None:
        if normaliser != "softmax":
            raise ValueError(f"sink: only softmax has one, got it with {normaliser!r}; leave it out")
        check_floats({"sink": sink, "q": q}, "q")
        check_shape("sink", sink, (H,))
    if return_lse and normaliser not in ("softmax", "signed"):
        raise ValueError(f"return_lse: {normaliser!r} has no log-sum-exp; ask for it with softmax or signed")
    options = (normaliser, scale, bias, sink, clip, cap, slopes)
    if launch.choose("attention", impl, q, k, v, refusal=_refusal(q, v)) == "reference":
        o, lse = attention_reference(q, k, v, span, *options)
    else:
        from attnzoo_kernels.attention.ops import attention_kernels, worst

        launch.self_check("attention", q.device, worst)
        o, lse = attention_kernels(q, k, v, span, *options)
    return (o, lse) if return_lse else o


def _refusal(q: Tensor, v: Tensor) -> str | None:
    widest, rows = max(q.shape[-1], v.shape[-1]), q.shape[0] * q.shape[1]
    if widest > LARGEST:
        return f"widths go up to {LARGEST}, got {widest}; use impl='reference'"
    if rows > launch.MOST_PROGRAMS:
        return f"B H goes up to {launch.MOST_PROGRAMS}, got {rows}; use impl='reference'"
    return None


def _per_head(name: str, value: Tensor | float | None, q: Tensor) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_full((q.shape[1],), float(value), dtype=dtype)
    check_floats({name: value, "q": q}, "q")
    check_shape(name, value, (q.shape[1],))
    return value


def _validate(q, k, v, span, normaliser, clip, cap, slopes) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: needs shape (batch, heads, length, width), got {tuple(x.shape)}")
    check_floats({"q": q, "k": k, "v": v, "slopes": slopes}, "q")
    check_same_dtype({"q": q, "k": k, "v": v}, "q")
    (B, H, T, d), (_, G, S, _) = q.shape, k.shape
    check_shape("q", q, (B, H, T, d))
    check_shape("k", k, (B, G, S, d))
    check_shape("v", v, (B, G, S, v.shape[-1]))
    check_shape("slopes", slopes, (H,))
    if H % G:
        raise ValueError(f"k: its heads must divide q's {H}, got {G}")
    check_choice("normaliser", normaliser, NORMALISERS)
    if not (clip[0] <= 0 and clip[1] >= 1 and math.isfinite(clip[1] - clip[0])):
        raise ValueError(f"clip: needs (gamma <= 0, zeta >= 1), got {clip}; hidden keys must stay at 0")
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"cap: must be above 0, got {cap}; None leaves the scores as they are")
    span.check(B, T, S, q.device)
