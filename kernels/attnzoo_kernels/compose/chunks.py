"""Launches of the kernels for one chunk of query rows, in a workspace that chunks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo_kernels import launch

# Bytes of pairs that exist at once.
WORKSPACE = 1 << 28


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


class Stage:
    """One mix as the kernels read it: ``square (B,T,H,H) or (1,1,H,H)`` and ``key (B, 2 I + 1, H, S)``."""

    def __init__(self, square: Tensor | None, key: Tensor | None, unused: Tensor) -> None:
        self.square, self.key = square, key
        self.operands = (unused if square is None else square, unused if key is None else key)
        given = () if square is None else zip(square.shape[:2], square.stride(), strict=False)
        self.strides = tuple(step if size > 1 else 0 for size, step in given) or (0, 0)
        self.rank = 0 if key is None else key.shape[1] // 2
        self.meta = {
            "HAS_M": square is not None,
            "HAS_KEY": key is not None,
            "RANK": launch.power_of_2(self.rank) if self.rank else 1,
        }


@dataclass
class Chunks:
    """Walks over chunks of query rows; every method works on the current one, ``start`` to ``start + r``.

    Args:
        like: (B,H,T,d) contiguous; S: number of keys; buffers: fp32 numbers per pair that exist at once.
    """

    like: Tensor
    S: int
    first: Tensor
    own: Tensor
    window: int
    n_sink: int
    buffers: int

    def __post_init__(self) -> None:
        B, H, T, _ = self.like.shape
        self.P = -(-self.S // 16)
        pair_row = 64 * self.P * B * H * self.buffers
        self.most = min(T, max(16, WORKSPACE // pair_row // 64 * 64))
        self.space = _empty(self.like, (self.buffers, B * H * self.most * self.P * 16), torch.float32)
        self.start, self.r = 0, self.most
        self.tiles: dict[str, launch.Tile] = {}

    def __iter__(self):
        T = self.like.shape[2]
        for start in range(0, T, self.most):
            self.start, self.r = start, min(self.most, T - start)
            yield slice(start, start + self.r)

    @property
    def fresh(self) -> bool:
        return self.start == 0

    def buffer(self, i: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Buffer ``i`` in a dtype of at most 4 bytes."""
        return self.space[i].view(dtype)

    def _launch(self, kernel: launch.Kernel, name: str, run: Callable[[launch.Tile], Any]) -> Any:
        """Tiles are chosen in the first chunk, where every kernel can run any number of times."""
        if name not in self.tiles:
            B, H, _, d = self.like.shape
            shape = (name, H, d, launch.power_of_2(B), launch.bucket(self.S), str(self.like.dtype))
            self.tiles[name] = launch.tuner.pick(kernel, shape, self.like.device, run)
        return run(self.tiles[name])

    def _sizes(self) -> tuple[int, ...]:
        _, H, T, _ = self.like.shape
        return H, T, self.S, self.start, self.r, self.P

    def _span(self) -> tuple[int, ...]:
        strides = (x.stride(0) if x.shape[0] > 1 else 0 for x in (self.first, self.own))
        return *strides, self.window, self.n_sink

    def product(self, kind: str, left: Tensor, right: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """kind: "pairs", "rows" or "cols" of `kernel_products`."""
        from attnzoo_kernels.compose import kernel_products as k

        B, H, _, _ = self.like.shape
        kernel = {"pairs": k.PAIRS, "rows": k.ROWS, "cols": k.COLS}[kind]
        D = (right if kind == "pairs" else out).shape[-1]

        def run(tile: launch.Tile) -> None:
            t, s = -(-self.r // tile.meta["BLOCK_T"]), -(-self.S // tile.meta["BLOCK_S"])
            d = -(-D // tile.meta["BLOCK_D"])
            grid = {"pairs": (s, t, B * H), "rows": (t, d, B * H), "cols": (s, d, B * H)}[kind]
            kernel.fn[grid](
                left, right, out, self.first, self.own, *self._sizes(), scale, *self._span(), D=D,
                WINDOW=self.window > 0, PRECISION=launch.precision(),
                **({"FRESH": self.fresh} if kind == "cols" else {}), **tile.meta,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        self._launch(kernel, f"{kind} {D}", run)

    def _mix_meta(self, stage: Stage) -> dict[str, Any]:
        from attnzoo_kernels.compose import kernel_mix as k

        # Operands of 16 bits have at most the digits of TF32.
        short = self.like.element_size() == 2 and not torch.version.hip
        return stage.meta | {
            "WINDOW": self.window > 0,
            "PRECISION": "tf32" if short else launch.precision(),
            "GROUP": k.GROUP,
        }

    def _grid(self, tile: launch.Tile) -> tuple[int, int, int]:
        from attnzoo_kernels.compose import kernel_mix as k

        return -(-self.S // tile.meta["BLOCK_S"]), -(-self.r // k.GROUP), self.like.shape[0]

    def mix(self, stage: Stage, a: Tensor, stat: Tensor, out: Tensor, weights: bool) -> None:
        from attnzoo_kernels.compose import kernel_mix as k

        def run(tile: launch.Tile) -> None:
            k.MIX.fn[self._grid(tile)](
                a, stat, *stage.operands, out, self.first, self.own, *self._sizes(), *stage.strides,
                stage.rank, *self._span(), WEIGHTS=weights, **self._mix_meta(stage), **tile.meta,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        self._launch(k.MIX, f"mix {weights} {stage.meta}", run)

    def stats(self, a: Tensor, stat: Tensor) -> None:
        from attnzoo_kernels.compose import kernel_mix as k

        B, H, _, _ = self.like.shape

        def run(tile: launch.Tile) -> None:
            k.STATS.fn[(self.r, B * H)](
                a, stat, self.first, self.own, *self._sizes(), *self._span(), WINDOW=self.window > 0,
                **tile.meta, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        self._launch(k.STATS, "stats", run)

    def unmix(
        self,
        stage: Stage,
        mixed: Tensor,
        stat: Tensor,
        a: Tensor,
        by_out: Tensor,
        delta: Tensor | None,
        by_in: Tensor,
        by_key: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of pre where ``delta (B,H,r)`` is given, of post elsewhere.

        Returns:
            by_m (blocks,B,r,H,H) and by_row (blocks,B,H,r), as `kernel_mix.unmix` says.
        """
        from attnzoo_kernels.compose import kernel_mix as k

        B, H, _, _ = self.like.shape
        pre = delta is not None

        def run(tile: launch.Tile) -> tuple[Tensor, Tensor]:
            grid = self._grid(tile)
            by_m = _empty(
                mixed, (grid[0], B, self.r, H, H) if stage.square is not None else (1,), torch.float32
            )
            by_row = _empty(mixed, (1,) if pre else (grid[0], B, H, self.r), torch.float32)
            k.UNMIX.fn[grid](
                mixed, stat, a, by_out, delta if pre else stat, *stage.operands, by_in, by_m, by_key, by_row,
                self.first, self.own, *self._sizes(), *stage.strides, stage.rank, *self._span(), PRE=pre,
                FRESH=self.fresh, **self._mix_meta(stage), **tile.meta,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            return by_m, by_row

        return self._launch(k.UNMIX, f"unmix {pre} {stage.meta}", run)
