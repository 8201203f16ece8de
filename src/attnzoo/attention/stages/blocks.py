"""Tokens by blocks of their documents, wherever these begin: for what sums over whole blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.call import Call


class Layout(NamedTuple):
    """This forward's tokens on an axis of whole blocks of the documents.

    Args:
        size: tokens per block; count: blocks N.
        number: ``(B or 1, N)`` of each block in its document; doc: its document, or None.
        place: ``(B, T)`` of each token on that axis; None where they follow each other from ``lead`` on.
        source: ``(B, N * size)`` the token at each place, T = none. lead: places before the first token.
    """

    size: int
    count: int
    number: Tensor
    doc: Tensor | None
    place: Tensor | None
    source: Tensor | None
    lead: int

    @classmethod
    def of(cls, call: Call, size: int) -> Layout:
        line, T = call.line, call.line.length
        if line.doc is None:
            lead = line.past % size
            count = -(-(lead + T) // size)
            number = torch.arange(count, device=line.order.device)[None] + line.past // size
            return cls(size, count, number, None, None, None, lead)
        valid = torch.ones_like(line.doc, dtype=torch.bool) if line.valid is None else line.valid
        begins = valid & (line.order % size == 0)
        begins[:, 0] = valid[:, 0]
        block = begins.cumsum(1) - 1
        count = max(int(block.max()) + 1, 1)
        block = torch.where(valid, block, count)  # padding stands behind all blocks
        place = torch.where(valid, block * size + line.order % size, count * size)
        B, step = len(place), torch.arange(T, device=place.device)
        source = place.new_full((B, count * size + 1), T).scatter(1, place, step.expand(B, T))[:, :-1]
        number = place.new_zeros(B, count + 1).scatter(1, block, line.order // size)[:, :-1]
        doc = place.new_full((B, count + 1), -1).scatter(1, block, line.doc)[:, :-1]
        return cls(size, count, number, doc, place, source, 0)

    def spread(self, z: Tensor) -> Tensor:
        """``(B, T, H, d)`` -> ``(B, H, N, size, d)``, zero where no token stands."""
        if self.source is None:
            z = F.pad(z, (0, 0, 0, 0, self.lead, self.count * self.size - self.lead - z.shape[1]))
        else:
            z = F.pad(z, (0, 0, 0, 0, 0, 1))
            z = z.gather(1, self.source[..., None, None].expand(-1, -1, *z.shape[2:]))
        return z.unflatten(1, (self.count, -1)).permute(0, 3, 1, 2, 4)

    def collect(self, o: Tensor, length: int) -> Tensor:
        """``(B, H, N, size, d)`` -> ``(B, T, H, d)``."""
        o = o.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if self.place is None:
            return o[:, self.lead : self.lead + length]
        index = self.place.clamp(max=o.shape[1] - 1)
        return o.gather(1, index[..., None, None].expand(-1, -1, *o.shape[2:]))

    def block_of(self, place: Tensor) -> Tensor:
        """``(B, M)`` blocks of the tokens ``place``."""
        return (self.place.gather(1, place) // self.size).clamp(max=self.count - 1)
