"""Attention to listed blocks in plain torch: the listed keys of some query blocks are gathered at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from attnzoo_kernels.rows import LEAST_RECOMPUTED
from attnzoo_kernels.span import Span

GATHERED = 1 << 22  # numbers of keys that are gathered at once, per batch and list


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    span: Span,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the public function, with the log-sum-exp always; work O(T n key_block)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    (B, H, T, d), (_, L, Q, n), S = q.shape, blocks.shape, k.shape[2]
    span = Span(*(_padded(x, Q * query_block) for x in (span.first, span.own)), span.window, span.n_sink)
    queries = F.pad(q, (0, 0, 0, Q * query_block - T)).reshape(B, L, H // L, Q, query_block, d)
    keys, values = (x.repeat_interleave(L // x.shape[1], 1) for x in (k, v))
    step = max(1, GATHERED // (n * key_block * (d + v.shape[-1])))
    recompute = torch.is_grad_enabled() and T >= LEAST_RECOMPUTED

    def run(part: slice, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        listed = blocks[:, :, part].long()
        cols = listed[..., None] * key_block + torch.arange(key_block, device=q.device)
        usable = ((listed[..., None] >= 0) & (cols < S)).flatten(3)
        cols = cols.flatten(3).clamp(0, S - 1)
        own, first = (_blocks(x, part, query_block) for x in (span.own, span.first))
        seen = usable[..., None, :] & span.sees(own, first, cols[..., None, :])
        here_k, here_v = (_gather(x, cols).to(dtype) for x in (keys, values))
        s = torch.einsum("blrcmd,blcnd->blcrmn", queries[:, :, :, part].to(dtype) * scale, here_k)
        hidden = ~seen[:, :, :, None]
        empty = hidden.all(-1)
        s = s.masked_fill(hidden, -torch.inf)
        lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1)
        p = (s - lse[..., None]).exp()
        here_v = here_v.masked_fill(hidden.all((3, 4))[..., None], 0.0)
        o = torch.einsum("blcrmn,blcnd->blrcmd", p, here_v).to(v.dtype)
        return o, lse.masked_fill(empty, -torch.inf).permute(0, 1, 3, 2, 4)

    parts = []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, Q, step):
            args = (slice(start, start + step), queries, keys, values)
            parts.append(checkpoint(run, *args, use_reentrant=False) if recompute else run(*args))
    o, lse = (torch.cat(x, 3) for x in zip(*parts, strict=True))
    return o.reshape(B, H, -1, v.shape[-1])[:, :, :T], lse.reshape(B, H, -1)[:, :, :T]


def _padded(x: Tensor, length: int) -> Tensor:
    """Rows beyond T see what the last one sees; their outputs are dropped."""
    return torch.cat([x, x[:, -1:].expand(-1, length - x.shape[1])], 1)


def _blocks(x: Tensor, part: slice, size: int) -> Tensor:
    """(B or 1, 1, c, size, 1) of (B or 1, T)."""
    return x.unflatten(1, (-1, size))[:, None, part, :, None]


def _gather(x: Tensor, cols: Tensor) -> Tensor:
    """(B,L,c,m,·) rows of x (B,L,S,·) at cols (B,L,c,m)."""
    index = cols.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index).unflatten(2, cols.shape[2:])
