"""Attention with any normaliser in plain torch, a run of query rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.rows import by_rows
from attnzoo_kernels.span import Span


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    normaliser: str,
    scale: float,
    bias: Tensor | None,
    sink: Tensor | None,
    clip: tuple[float, float],
    cap: float | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the public function, with the log-sum-exp always; work O(T window) under a window without sinks."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    T, S = q.shape[2], k.shape[2]
    bias, sink, slopes = (None if x is None else x.to(dtype) for x in (bias, sink, slopes))

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        cols = span.cols(S, rows)
        if cols.start >= cols.stop:
            cols = slice(0, 1)
        s = _scores(q[:, :, rows], k[:, :, cols], span, rows, cols, scale, cap, bias, slopes)
        seen = span.visible(S, rows, cols)
        p, lse = normalise(s, seen, normaliser, sink, clip)
        grouped = p.unflatten(1, (v.shape[1], -1))
        values = v[:, :, None, cols].to(dtype)
        unseen = ~seen.any(2)[:, :, None, :, None]
        return (grouped @ values.masked_fill(unseen, 0.0)).flatten(1, 2).to(v.dtype), lse

    with torch.autocast(q.device.type, enabled=False):
        o, lse = by_rows(run, T, S)
    return o, lse


def _scores(q, k, span: Span, rows: slice, cols: slice, scale, cap, bias, slopes) -> Tensor:
    """(B,H,t,s) in fp32 or fp64."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
    s = (grouped @ k[:, :, None].to(dtype).mT).flatten(1, 2) * scale
    if cap is not None:
        s = cap * torch.tanh(s / cap)
    if slopes is not None:
        j = torch.arange(cols.start, cols.stop, device=q.device)
        s = s - slopes[:, None, None] * (span.own[:, rows, None] - j)[:, None]
    return s if bias is None else s + bias[:, None, None]


def normalise(
    s: Tensor, seen: Tensor, normaliser: str, sink: Tensor | None, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Weights, exactly 0 where not seen, and the rows' log-sum-exp (of |s| for signed; empty rows -inf)."""
    low = s.masked_fill(~seen, -torch.inf)
    if normaliser in ("sigmoid", "relu"):
        p = s.sigmoid() if normaliser == "sigmoid" else s.relu()
        return p.masked_fill(~seen, 0.0), low.detach()[..., 0]
    if normaliser == "softplus_l1":
        p = torch.logaddexp(s, torch.zeros_like(s)).masked_fill(~seen, 0.0)
        total = p.sum(-1, keepdim=True)
        return p / total.masked_fill(total == 0, 1.0), total.detach()[..., 0]
    if normaliser == "signed":
        low = s.abs().masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1).expand(low.shape[:-1])
    lse = low.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink[:, None].expand_as(lse))
    p = (low - lse[..., None]).exp()
    if normaliser == "clipped_softmax":
        p = ((clip[1] - clip[0]) * p + clip[0]).clamp(0, 1)
    if normaliser == "signed":
        p = p * s.sign()
    return p.masked_fill(~seen, 0.0), lse.masked_fill(empty, -torch.inf)
