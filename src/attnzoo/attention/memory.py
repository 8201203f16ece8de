"""What a mixer keeps between calls: cached rows, tails of convolutions, scan states.

Stages declare their slots (`Stage.memory`), so that `new_cache`, `cost()` and the forward read one table, and
use three calls that mean the same in training, prefill and decode, and where ranks share a sequence
(`PartMemory`): `rows`, `tail`, `state`/`put`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.attention.block_rows import BlockRows


class Memory(BlockRows):
    """The slots as one forward sees them; without a cache everything passes through.

    Attributes:
        alone: nothing was before and nothing is kept: the forward has all of its tokens' past.
    """

    @property
    def alone(self) -> bool:
        return self.cache is None

    def tail(self, name: str, z: Tensor, n: int) -> Tensor:
        """``z`` ``(B, T, C)`` preceded by the ``n`` tokens before it (zeros without a cache): ``(B, n + T,
        C)``.

        Document cuts are the stage's: the predecessor ``m`` steps back counts where ``order >= m``.
        """
        if self.cache is None:
            return torch.nn.functional.pad(z, (0, 0, n, 0))
        old = self.cache.slots[name]
        both = torch.cat([old.to(z.dtype), z], dim=1)
        if not self.line.clock.ragged or n == 0:
            old.copy_(both[:, both.shape[1] - n :])
        else:
            last = self.line.count()[:, None] + torch.arange(n, device=z.device)
            old.copy_(both.gather(1, last[..., None].expand(-1, -1, z.shape[2])))
        return both

    def state(self, name: str) -> Tensor | None:
        """The state that the cached document has reached; None without a cache."""
        return None if self.cache is None else self.cache.slots[name]

    def put(self, name: str, value: Tensor) -> None:
        if self.cache is not None:
            self.cache.slots[name].copy_(value)

    def total(self, z: Tensor) -> Tensor:
        """The sum of ``z`` over all parts of the sequences."""
        return z

    def close(self, y: Tensor) -> Tensor:
        """Ends the layer's forward, whose output is ``y``."""
        return y
