"""How documents are cut into chunks that begin at multiples of their size, counted in the document."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.timeline import Timeline


def bits(x: Tensor) -> Tensor:
    """``bit_length`` of integers >= 0."""
    return torch.frexp(x.double()).exponent.long()


class Grid(NamedTuple):
    """Where the tokens of one forward stand in chunks that begin at multiples of C of their document.

    Args:
        size: C. count: N. first: slot of each row's first token, ``(B or 1,)``.
        index: ``(B or 1, N)`` which chunk of its document. last: ``(B or 1, 2)`` chunk and slot of the last
            token.
        place: ``(B, T)`` chunk * C + slot, N * C at padding; None = consecutive from ``skip``.
        levels: of whole chunks that can hold something.
    """

    size: int
    count: int
    first: Tensor
    index: Tensor
    last: Tensor
    place: Tensor | None
    levels: int
    skip: int = 0

    @classmethod
    def of(cls, line: Timeline, size: int) -> Grid:
        if line.doc is None:
            skip, start = line.past % size, line.past // size
            count = -(-(skip + line.length) // size)
            end = skip + line.length - 1
            device = line.order.device
            index = torch.arange(start, start + count, device=device)[None]
            last = torch.tensor([[end // size, end % size]], device=device)
            first = torch.tensor([skip], device=device)
            return cls(size, count, first, index, last, None, (start + count - 1).bit_length(), skip)
        order = line.order
        valid = torch.ones_like(order, dtype=torch.bool) if line.valid is None else line.valid
        begins = (order % size == 0) & valid
        begins[:, 0] = valid[:, 0]
        chunk = begins.cumsum(1) - 1
        count = max(1, int(chunk.max()) + 1)
        place = torch.where(valid, chunk * size + order % size, count * size)
        index = torch.zeros(len(order), count + 1, dtype=torch.long, device=order.device)
        index.scatter_(1, torch.where(valid, chunk, count), order // size)
        end = place.gather(1, (valid.sum(1, keepdim=True) - 1).clamp(min=0)).clamp(max=count * size - 1)
        last = torch.cat([end // size, end % size], dim=1)
        index = index[:, :count]
        return cls(size, count, order[:, 0] % size, index, last, place, int(index.max()).bit_length())

    def split(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """``(B, T, H, ...)`` -> ``(B, N, H, C, ...)``, zeros at empty slots."""
        if self.place is None:
            after = self.count * self.size - self.skip - z.shape[1]
            z = F.pad(z, (0, 0) * (z.dim() - 2) + (self.skip, after))
        else:
            slots = z.new_zeros(len(z), self.count * self.size + 1, *z.shape[2:])
            z = slots.index_put((torch.arange(len(z), device=z.device)[:, None], self.place), z)[:, :-1]
        return z.unflatten(1, (self.count, self.size)).transpose(2, 3).to(dtype)

    def join(self, o: Tensor, length: int) -> Tensor:
        """The inverse of `split`; anything at padding."""
        o = o.transpose(2, 3).flatten(1, 2)
        if self.place is None:
            return o[:, self.skip : self.skip + length]
        place = self.place.clamp(max=o.shape[1] - 1)
        return o[torch.arange(len(o), device=o.device)[:, None], place]
