"""Running sums, maxima and log-sum-exps over the tokens of a document, on from the cache.

Each takes ``z`` ``(B, T, ...)``, and the name of a state slot ``(...)`` that the calling stage declares.
Padding does not count. Every function takes O(T), on packed documents O(T log T), element-wise work.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.ops.cumulative import logcumsumexp

ENDLESS = 1 << 62  # tokens of a block that no document fills


def running_sum(z: Tensor, call: Call, slot: str) -> Tensor:
    """``sum_(j <= t) z_j``."""
    line, start = call.line, call.mem.state(slot)
    if line.doc is not None:
        # differences of sums over the whole row would lose the digits of short documents
        return running_block_sum(z, call, slot, per=ENDLESS)
    sums = line.blank(z).cumsum(1)
    sums = sums if start is None else sums + start[:, None]
    call.mem.put(slot, sums[:, -1])
    return sums


def running_block_sum(z: Tensor, call: Call, slot: str, per: int) -> Tensor:
    """``sum z_j`` over the token's block of ``per`` tokens, counted inside the document, up to the token.

    Takes O(T log per) work and subtracts nothing, so that long sequences lose no digits.
    """
    line, start = call.line, call.mem.state(slot)
    fill = (line.order % per).reshape(*line.order.shape, *(1,) * (z.dim() - 2))
    z, nothing = line.blank(z), torch.zeros((), dtype=z.dtype, device=z.device)
    if start is not None:
        goes_on = torch.where(fill[:, :1] > 0, start[:, None].to(z.dtype), nothing)
        z = torch.cat([z[:, :1] + goes_on, z[:, 1:]], dim=1)
    back = 1
    while back < min(per, line.length):  # each token joins the run before its own until the block begins
        earlier = torch.cat([torch.zeros_like(z[:, :back]), z[:, :-back]], dim=1)
        z = z + torch.where(fill >= back, earlier, nothing)
        back *= 2
    if start is not None:
        call.mem.put(slot, _newest(z, call, start))
    return z


def _newest(z: Tensor, call: Call, start: Tensor) -> Tensor:
    """The last token's ``z``, padding aside; ``start`` in rows of nothing but padding."""
    if call.line.valid is None:
        return z[:, -1]
    n = call.line.valid.sum(1)
    newest = z[torch.arange(len(z), device=z.device), (n - 1).clamp(min=0)]
    return torch.where((n > 0).reshape(-1, *(1,) * (z.dim() - 2)), newest, start.to(z.dtype))


def count(call: Call, like: Tensor) -> Tensor:
    """``(B or 1, T)`` tokens of the document so far, the token included, in ``like``'s dtype."""
    return (call.line.order + 1).to(like.dtype)


def running_max(z: Tensor, call: Call, slot: str) -> Tensor:
    """``max_(j <= t) z_j``. The slot holds the maximum so far, -inf before the first token."""
    return _running(z, call, slot, torch.maximum, lambda z: z.cummax(1).values)


def running_logsumexp(z: Tensor, call: Call, slot: str) -> Tensor:
    """``log sum_(j <= t) exp z_j``. The slot holds the value so far, -inf before the first token."""
    return _running(z, call, slot, torch.logaddexp, logcumsumexp)


def before(z: Tensor, running: Tensor, call: Call, start: Tensor | None) -> Tensor:
    """The running values one token earlier; the token's own ``z`` where it is the first of its document.

    Args:
        start: the slot's value before this forward, or None.
    """
    first = z[:, :1] if start is None else start[:, None].to(z.dtype)
    previous = torch.cat([first, running[:, :-1]], dim=1)
    begins = (call.line.order == 0).reshape(*call.line.order.shape, *(1,) * (z.dim() - 2))
    return torch.where(begins, z, previous)


def _running(z: Tensor, call: Call, slot: str, join: Callable, whole: Callable) -> Tensor:
    line, start = call.line, call.mem.state(slot)
    z = line.blank(z, fill=-math.inf)
    if start is not None:
        # an empty slot is zeros: it counts only where the document has cached tokens
        seen = line.order[:, :1] > 0
        if line.doc is not None:
            seen = seen & (line.doc[:, :1] == 0)
        seen = seen.reshape(-1, *(1,) * (z.dim() - 2))
        start = torch.where(seen, start.to(z.dtype), -math.inf)
        z = torch.cat([join(z[:, :1], start[:, None]), z[:, 1:]], dim=1)
    if line.doc is None:
        found = whole(z)
    else:
        found, back = z, 1
        while back < line.length:  # each token joins the run before its own until the runs meet
            earlier = torch.cat([found[:, :1].expand(-1, back, *z.shape[2:]), found[:, :-back]], dim=1)
            index = torch.arange(line.length, device=z.device)
            inside = (line.order >= back) & (index >= back)
            inside = inside.reshape(*inside.shape, *(1,) * (z.dim() - 2))
            found = torch.where(inside, join(found, torch.where(inside, earlier, found)), found)
            back *= 2
    call.mem.put(slot, found[:, -1])
    return found
