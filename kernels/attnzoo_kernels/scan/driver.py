"""What the kernels of a chunked scan run on: operands, sizes and buffers, by the names that they use."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo_kernels import launch
from attnzoo_kernels.scan.decay import MIN_LOG_DECAY


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def chunk_of(chunk_size: int, T: int) -> int:
    """Tokens in a chunk of the kernels: 16, 32 or 64."""
    most = min(chunk_size, launch.power_of_2(T))
    return 64 if most >= 64 else 32 if most >= 32 else 16


class Driver:
    """One call's operands, sizes and buffers by the names that the kernels give them."""

    def __init__(self, q, k, v, g, beta, e, a, scale, state, segments, chunk_size):
        (self.B, self.T, self.H, self.K), self.V = q.shape, v.shape[-1]
        self.out = v.dtype
        dtypes = {x.dtype for x in (q, k, v, e, a) if x is not None}
        self.dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        # TF32 keeps all digits of fp16 and states beyond its range.
        self.precision = "tf32" if dtypes == {torch.float16} else launch.precision()
        self.C = chunk_of(chunk_size, self.T)
        self.N = -(-self.T // self.C)
        self.count = self.B * self.H * self.N
        self.KP = launch.power_of_2(self.K, 16)
        self.VP = -(-self.V // 64) * 64 if self.V > 32 else launch.power_of_2(self.V, 16)
        self.rank_one, self.diagonal = a is not None, g is not None and g.dim() == 4
        q, k, v = (x.to(self.dtype).contiguous() for x in (q, k, v))
        e, a = (k if x is None else x.to(self.dtype).contiguous() for x in (e, a))
        self.x: dict[str, Any] = {
            **dict.fromkeys(("lower_k", "scores_k", "writes_k", "dlower_k", "dscores_k"), q),
            **dict.fromkeys(("inner", "dgates", "dbeta", "de_out", "da_out", "lower", "dlower", "scores"), q),
            "q": q,
            "k": k,
            "v": v,
            "e": e,
            "a": a,
            "beta": q if beta is None else beta.float().contiguous(),
            "g": g.contiguous() if self.diagonal else q,
            "gates": q if self.diagonal else self._gates(g, q),
            "segments": q if segments is None else segments.contiguous(),
            "initial": state.float().contiguous(),
            "scale": scale,
            "size": self.count * self.C,
            "N": self.N,
            "T": self.T,
            "H": self.H,
            "K": self.K,
            "V": self.V,
        }
        self.constants = {"C": self.C, "KP": self.KP, "VP": self.VP, "PRECISION": self.precision}
        self.constants |= {"DIAGONAL": self.diagonal, "RANK_ONE": self.rank_one, "RUNS": segments is not None}
        self.constants["PROBES"] = self.rank_one or beta is not None

    def _gates(self, g: Tensor | None, q: Tensor) -> Tensor:
        """(4, B*H*N, C): sums of log2 decays in a chunk as two fp32 numbers, and those before the own decay.

        fp64 keeps the digits of a decay near 1 that follows one near 0.
        """
        g = q.new_zeros(q.shape[:3]) if g is None else g
        g = F.pad(g.double().clamp(min=MIN_LOG_DECAY), (0, 0, 0, self.N * self.C - self.T))
        sums = g.view(self.B, self.N, self.C, self.H).permute(0, 3, 1, 2).cumsum(-1) * math.log2(math.e)
        both = torch.stack([sums, F.pad(sums[..., :-1], (1, 0))]).view(2, self.count, self.C)
        high = both.float()
        return torch.stack([high, (both - high).float()], 1).flatten(0, 1)

    def new(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self.x[name] = empty(self.x["q"], shape, dtype or self.dtype)
        return self.x[name]

    def rows(self, names: str, width: int) -> None:
        """New buffers with a row per token of every chunk."""
        for name in names.split():
            self.new(name, self.count, self.C, width)

    def run(self, kernel: launch.Kernel, *grid: Any, **renamed: Tensor) -> dict[str, int]:
        """Launch over (grid); an axis may be a function of the tile's sizes. Returns those sizes."""
        q, sizes = self.x["q"], {"BK": self.KP, "BV": self.VP}
        values = self.x | self.constants | renamed

        def meta(tile: launch.Tile) -> dict[str, int]:
            return {name: min(value, sizes[name]) for name, value in tile.meta.items()}

        def start(tile: launch.Tile) -> None:
            chosen = meta(tile)
            axes = tuple(axis(chosen) if callable(axis) else axis for axis in grid)
            kernel.start(tile, axes, values | chosen)

        key = (launch.bucket(self.T), str(self.dtype), self.KP, self.VP, self.rank_one, self.diagonal)
        tile = launch.tuner.pick(kernel, key, q.device, start)
        start(tile)
        return meta(tile)

    def values_axis(self, meta: dict[str, int]) -> int:
        return self.VP // meta["BV"]

    def keys_axis(self, meta: dict[str, int]) -> int:
        return self.KP // meta["BK"]

    def per_token(self, x: Tensor) -> Tensor:
        """(B*H*N, C) -> (B,T,H)."""
        return x.view(self.B, self.H, -1)[..., : self.T].transpose(1, 2)
