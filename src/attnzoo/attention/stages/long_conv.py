"""Causal convolutions as long as the sequence, in O(T log^2 T), cut at documents and exact in every gradient.

One FFT over the whole sequence mixes all tokens and relies on rounding to cancel: a later token, or another
document, would be felt in the last digits. Here a Fourier transform only ever carries a finished block into
the block behind it (blocks of 32, 64, 128 ... tokens, after matrix products inside each 32), so that nothing
flows back. The one document that can cross from a block into the next is that of the block's last token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.attention.call import Call
from attnzoo_kernels.rows import LEAST_RECOMPUTED

BASE = 32  # tokens per block inside which a matrix product beats the transform


def long_conv(z: Tensor, taps: Tensor, doc: Tensor | None) -> Tensor:
    """``y_t = sum_m taps_m * z_(t - m)`` per channel, over the token's own document.

    Args:
        z: ``(B, T, C)``. taps: ``(n, C)``; those beyond T are not read.
        doc: ``(B, T)`` document of each token, never mixed; None = one.

    Returns:
        ``(B, T, C)`` in fp32, or in fp64 where ``z`` is.
    """
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast(z.device.type, enabled=False):
        z, taps = z.to(wide).permute(2, 0, 1), taps.to(wide).T  # (C, B, T), (C, n)
        if torch.is_grad_enabled() and z.shape[2] >= LEAST_RECOMPUTED:
            # linear in both: nothing but they themselves is worth keeping
            y = checkpoint(_conv, z, taps, doc, use_reentrant=False)
        else:
            y = _conv(z, taps, doc)
        return y.permute(1, 2, 0)


def carried_conv(x: Tensor, kernel: Tensor, call: Call, slot: str) -> Tensor:
    """`long_conv` of ``x`` ``(B, T, C)`` on from the cache, which keeps the inputs that ``kernel`` ``(n, C)``
    still reaches in the tail ``slot`` of n - 1 rows.
    """
    line, back = call.line, len(kernel) - 1
    if call.mem.alone or back == 0:
        return long_conv(x, kernel, line.doc)
    both = call.mem.tail(slot, x, back)
    if x.shape[1] == 1:
        reach = torch.arange(back, -1, -1, device=both.device)
        seen = (line.order >= reach)[..., None].to(kernel.dtype)  # (B or 1, n, 1)
        return (both.to(kernel.dtype) * seen * kernel.flip(0)).sum(1, keepdim=True)
    if line.doc is None:
        return long_conv(both, kernel, None)[:, back:]
    # cached inputs are of run 0 as far as its document goes back
    held = (line.clock.used - line.clock.start)[:, None]
    reach = torch.arange(back, 0, -1, device=both.device)
    doc = torch.cat([torch.where(reach <= held, 0, -1), line.doc], dim=1)
    return long_conv(both, kernel, doc)[:, back:]


def long_conv_flops(T: int, channels: int) -> tuple[int, int]:
    """FLOPs of the matrix products over T tokens: those of visible pairs, and those executed."""
    size = min(BASE, T)
    whole, rest = divmod(T, size)
    needed = whole * size * (size + 1) // 2 + rest * (rest + 1) // 2
    return 2 * channels * needed, 2 * channels * -(-T // size) * size * size


def long_conv_elementwise(T: int, n: int) -> float:
    """Operations per token and channel of the Fourier transforms, 5 N log2 N each."""
    return sum(2 * len(starts) * 5 * size * (2 * size).bit_length() for size, starts in levels(T, n)) / T


def levels(T: int, n: int, size: int = BASE) -> Iterator[tuple[int, range]]:
    """Block size, and where the blocks begin that are carried into the block behind them."""
    n = min(n, T)
    while size < n:
        yield size, range(0, T - size, 2 * size)
        size *= 2
    if size < T and n > 1:  # no tap reaches beyond the neighbour
        yield size, range(0, T - size, size)


def _conv(z: Tensor, taps: Tensor, doc: Tensor | None) -> Tensor:
    """z ``(C, B, T)``, taps ``(C, n)`` -> ``(C, B, T)``."""
    T, base = z.shape[2], min(BASE, z.shape[2])
    if doc is None:
        y = _inside(z, taps, base)
        steps = list(levels(T, taps.shape[1]))
    else:
        y = z * taps[:, :1, None]
        steps = list(levels(T, taps.shape[1], 1))
    for size, starts in steps:
        first = _blocks(z, size, starts, 0)  # (C, B, P, size)
        if doc is not None:
            ids = _blocks(doc, size, starts, 0)
            crosses = ids[..., -1:]
            first = torch.where(ids == crosses, first, torch.zeros((), dtype=z.dtype, device=z.device))
        behind = _carried(first, F.pad(taps[:, : 2 * size], (0, max(0, 2 * size - taps.shape[1]))))
        if doc is not None:
            same = _blocks(doc, size, starts, size) == crosses
            behind = torch.where(same, behind, torch.zeros((), dtype=z.dtype, device=z.device))
        lead = starts.step - size  # what of a step no block fills
        behind = F.pad(behind, (lead, 0)).flatten(2)
        behind = behind if lead else F.pad(behind, (size, 0))
        y = y + F.pad(behind, (0, T - behind.shape[2]))
    return y


def _blocks(z: Tensor, size: int, starts: range, shift: int) -> Tensor:
    """``(..., P, size)`` blocks that begin at ``starts + shift``; what lies beyond the end is zero."""
    stop = shift + len(starts) * starts.step
    z = F.pad(z, (0, max(0, stop - z.shape[-1])))[..., shift:stop]
    return z.unflatten(-1, (len(starts), starts.step))[..., :size]


def _inside(z: Tensor, taps: Tensor, size: int) -> Tensor:
    """The pairs inside blocks of ``size`` tokens."""
    C, B, T = z.shape
    step = torch.arange(size, device=z.device)
    back = step[None, :] - step[:, None]  # (from, to)
    known = F.pad(taps[:, :size], (0, max(0, size - taps.shape[1])))
    table = known[:, back.clamp(min=0)].masked_fill(back < 0, 0.0)
    blocks = F.pad(z, (0, -T % size)).reshape(C, -1, size)
    return torch.bmm(blocks, table).view(C, B, -1)[..., :T]


def _carried(first: Tensor, taps: Tensor) -> Tensor:
    """What blocks ``(C, B, P, s)`` give to the s tokens behind each; taps ``(C, 2 s)``."""
    C, B, P, size = first.shape
    if size < BASE:
        step = torch.arange(size, device=first.device)
        table = taps[:, size + step[None, :] - step[:, None]]  # (C, from, to)
        return torch.bmm(first.reshape(C, B * P, size), table).view(C, B, P, size)
    # wrapped lags fall into the first half, which is dropped
    spectrum = torch.fft.rfft(first, 2 * size) * torch.fft.rfft(taps)[:, None, None]
    return torch.fft.irfft(spectrum, 2 * size)[..., size:]
