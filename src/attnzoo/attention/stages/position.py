"""Where positions enter."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.ops.fused import rotate


class NoPosition(Stage):
    """Queries and keys as they are; the base of position stages.

    A stage rotates by ``turn(z, pos, call)``, which sees queries, keys before the cache, or cached keys at
    their places; or it changes whole keys in ``at_read(q, keys, call)``, by ``appended`` further channels.
    """

    rotates = False
    appended = 0
    alike = True

    def forward(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return self.turn(q, call.line.pos, call), self.turn(k, call.line.pos, call)

    def turn(self, z: Tensor, pos: Tensor, call: Call) -> Tensor:
        """``z`` ``(B, heads, T, width)`` at positions ``(B or 1, T)``."""
        return z

    def at_read(self, q: Tensor, keys, call: Call):
        """``q`` and the `Keys` so far, as scores see them."""
        return q, keys


class Rope(NoPosition):
    """Rotary embedding in the rotate-half layout (arXiv 2104.09864).

    Pair f of an r-wide slice is channels f and f + r/2, turned by ``position * theta^(-2f/r)``. Angles are
    formed in fp64 and the rotation in at least fp32, so that long positions stay exact.

    Args:
        width: r, even. theta: base of the frequencies.

    Raises:
        ValueError: the width is odd.
    """

    rotates = True
    alike = True

    def __init__(self, width: int, theta: float = 10000.0, field: str = "head_dim") -> None:
        super().__init__()
        if width % 2:
            raise ValueError(
                f"{field}: RoPE turns pairs of channels, got an odd width {width}; "
                "make it even or set pos=none"
            )
        if theta <= 0:
            raise ValueError(f"rope_theta: must be positive, got {theta}")
        self.width, self.theta = width, theta

    def turn(self, z: Tensor, pos: Tensor, call: Call) -> Tensor:
        work = torch.float64 if z.dtype == torch.float64 else torch.float32
        # the line's own positions by name, for compiled code would be bound to an id; others are kept with
        # their table, so that no other tensor can have their id
        where = "line" if pos is call.line.pos else id(pos)
        name = ("rope", self.width, self.theta, work, where)
        _, cos, sin = call.line.once(name, lambda: (pos, *self._table(pos, work)))
        turned = rotate(z, cos, sin)
        # autocast rounds for whoever wants it rounded; meta tensors know no autocast
        keep = not z.is_meta and torch.is_autocast_enabled(z.device.type)
        return turned if keep else turned.to(z.dtype)

    def _table(self, pos: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``(B or 1, T, 1, width)``, as `rotate` wants them."""
        step = torch.arange(0, self.width, 2, device=pos.device, dtype=torch.float64) / self.width
        angle = pos.double()[:, :, None, None] * self.theta**-step
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def elementwise(self) -> dict[str, float]:
        return {"rope": 3.0 * self.width}
