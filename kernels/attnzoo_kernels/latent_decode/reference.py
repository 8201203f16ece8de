"""Decoding over latents in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.span import Span

# Cached rows converted to the working precision at once.
COLUMNS = 4096


def latent_decode_reference(q: Tensor, c: Tensor, k_rope: Tensor | None, span: Span, scale: float) -> Tensor:
    """As the public function; scores of all keys are held, ``(B,H,S)``, and blocks of the cache."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    S, d_c = c.shape[1:]
    blocks = [slice(start, start + COLUMNS) for start in range(0, S, COLUMNS)]
    with torch.autocast(q.device.type, enabled=False):
        q_c, q_r = (q[:, :, 0].to(dtype) * scale).tensor_split([d_c], dim=-1)
        parts = []
        for cols in blocks:
            part = q_c @ c[:, cols].to(dtype).transpose(1, 2)
            if k_rope is not None:
                part = part + q_r @ k_rope[:, cols].to(dtype).transpose(1, 2)
            parts.append(part)
        hidden = ~span.visible(S)[:, :, 0]
        scores = torch.cat(parts, dim=-1).masked_fill(hidden, -torch.inf)
        empty = hidden.all(-1, keepdim=True)
        p = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(hidden, 0.0)
        # Rows of a cache that nobody wrote yet may hold anything, NaN too.
        unseen = hidden.all(1)[..., None]
        o = sum(p[..., cols] @ c[:, cols].to(dtype).masked_fill(unseen[:, cols], 0.0) for cols in blocks)
    return o[:, :, None].to(q.dtype)
