"""The delta and rank-1 scans as custom ops of torch, over the Triton kernels.

Only the inputs are kept for the backward pass, which makes the matrices of the chunks and the states again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from attnzoo_kernels import launch
from attnzoo_kernels.scan.decay import MIN_LOG_DECAY
from attnzoo_kernels.scan.flops import scan_flops

# Widest keys: a pass over the states keeps whole columns of a state in registers.
MAX_K = 256
INPUTS = ("q", "k", "v", "g", "beta", "e", "a", "state")


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _chunk(chunk_size: int, T: int) -> int:
    """Tokens in a chunk of the kernels: 16, 32 or 64."""
    most = min(chunk_size, launch.power_of_2(T))
    return 64 if most >= 64 else 32 if most >= 32 else 16


class _Scan:
    """One call's operands, sizes and buffers by the names that the kernels give them."""

    def __init__(self, q, k, v, g, beta, e, a, scale, state, segments, chunk_size):
        (self.B, self.T, self.H, self.K), self.V = q.shape, v.shape[-1]
        self.out = v.dtype
        dtypes = {x.dtype for x in (q, k, v, e, a) if x is not None}
        self.dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        # TF32 keeps all digits of fp16 and states beyond its range.
        self.precision = "tf32" if dtypes == {torch.float16} else launch.precision()
        self.C = _chunk(chunk_size, self.T)
        self.N = -(-self.T // self.C)
        self.count = self.B * self.H * self.N
        self.KP = launch.power_of_2(self.K, 16)
        self.VP = -(-self.V // 64) * 64 if self.V > 32 else launch.power_of_2(self.V, 16)
        self.rank_one, self.diagonal = a is not None, g is not None and g.dim() == 4
        q, k, v = (x.to(self.dtype).contiguous() for x in (q, k, v))
        e, a = (k if x is None else x.to(self.dtype).contiguous() for x in (e, a))
        self.x: dict[str, Any] = {
            **dict.fromkeys(("lower_k", "scores_k", "writes_k", "dlower_k", "dscores_k"), q),
            **dict.fromkeys(("inner", "dgates", "dbeta", "de_out", "da_out"), q),
            **{"q": q, "k": k, "v": v, "e": e, "a": a},
            "beta": q if beta is None else beta.float().contiguous(),
            "g": g.contiguous() if self.diagonal else q,
            "gates": q if self.diagonal else self._gates(g, q),
            "segments": q if segments is None else segments.contiguous(),
            "initial": state.float().contiguous(),
            **{"scale": scale, "size": self.count * self.C, "N": self.N},
            **{"T": self.T, "H": self.H, "K": self.K, "V": self.V},
        }
        self.constants = {"C": self.C, "KP": self.KP, "VP": self.VP, "PRECISION": self.precision}
        self.constants |= {"DIAGONAL": self.diagonal, "RANK_ONE": self.rank_one, "RUNS": segments is not None}

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
        self.x[name] = _empty(self.x["q"], shape, dtype or self.dtype)
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
            used = {name: (values | chosen)[name] for name in kernel.fn.arg_names}
            kernel.fn[axes](**used, num_warps=tile.warps, num_stages=tile.stages)

        key = (launch.bucket(self.T), str(self.dtype), self.KP, self.VP, self.rank_one, self.diagonal)
        tile = launch.tuner.pick(kernel, key, q.device, start)
        start(tile)
        return meta(tile)

    def values_axis(self, meta: dict[str, int]) -> int:
        return self.VP // meta["BV"]

    def keys_axis(self, meta: dict[str, int]) -> int:
        return self.KP // meta["BK"]

    def forward(self) -> None:
        """The chunks' matrices and operands, then the states, y and the final state."""
        from attnzoo_kernels.scan import kernel_delta_diagonal as diagonal
        from attnzoo_kernels.scan import kernel_delta_pairs as pairs
        from attnzoo_kernels.scan import kernel_delta_states as states

        lower = self.new("lower", self.count, self.C, self.C, dtype=torch.float32)
        self.rows("inverse scores", self.C)
        if self.rank_one:
            self.rows("lower_k scores_k", self.C)
        if self.diagonal:
            self.run(diagonal.PAIRS_DIAGONAL, self.count, (self.C // 16) ** 2)
        else:
            self.run(pairs.PAIRS, self.count)
        self.run(pairs.INVERSE, self.count, lower=lower, out=self.x["inverse"])
        del self.x["lower"], lower
        self.rows("w reads writes" + " writes_k" * self.rank_one, self.KP)
        self.rows("u y", self.VP)
        self.new("carry", self.count, self.KP, dtype=torch.float32)
        self.run(states.OPERANDS, self.count, lambda meta: self.keys_axis(meta) + self.values_axis(meta))
        self.new("states", self.B * self.H, self.N + 1, self.KP, self.VP)
        self.new("final", self.B, self.H, self.K, self.V, dtype=torch.float32)
        self.run(states.STATES_FORWARD, self.B * self.H, self.values_axis)
        del self.x["u"]

    def outputs(self) -> tuple[Tensor, Tensor]:
        from attnzoo_kernels.scan import kernel_delta_states as states

        o = self.new("o", self.B, self.T, self.H, self.V, dtype=self.out)
        self.run(states.OUTPUTS, self.count, self.values_axis)
        return o, self.x["final"]

    def backward(self, do: Tensor, dfinal: Tensor) -> dict[str, Tensor]:
        """Gradients of what INPUTS names, in the dtypes of the work."""
        from attnzoo_kernels.scan import kernel_delta_gradients as gradients
        from attnzoo_kernels.scan import kernel_delta_states as states

        self.x |= {"do": do.to(self.dtype).contiguous(), "dfinal": dfinal.float().contiguous()}
        self.new("dstates", self.count, self.KP, self.VP)
        self.rows("dy", self.VP)
        dinitial = self.new("dinitial", self.B, self.H, self.K, self.V, dtype=torch.float32)
        sums = self._states_backward(states.STATES_BACKWARD)
        del self.x["w"], self.x["reads"], self.x["writes"], self.x["carry"]
        self.rows("dz", self.VP)
        self.rows("dlower dscores" + " dlower_k dscores_k" * self.rank_one, self.C)
        dv = self.new("dv", self.B, self.T, self.H, self.V)
        dbeta = self.new("dbeta", self.count, self.C, dtype=torch.float32)
        self.run(gradients.VALUE_GRADIENTS, self.count)
        del self.x["dy"], self.x["inverse"]
        return {"v": dv, "state": dinitial, **self._key_gradients(dbeta, sums)}

    def _states_backward(self, kernel: launch.Kernel) -> Tensor:
        """Returns dcarry; its first axis is as long as the tile makes it, so room is left for the most."""
        least = min(self.VP, min(tile.meta["BV"] for tile in kernel.tiles))
        dcarry = self.new("dcarry", self.VP // least, self.count, self.KP, dtype=torch.float32)
        self.x["parts"] = self.values_axis(self.run(kernel, self.B * self.H, self.values_axis))
        return dcarry[: self.x["parts"]]

    def _key_gradients(self, dbeta: Tensor, dcarry: Tensor) -> dict[str, Tensor]:
        from attnzoo_kernels.scan import kernel_delta_diagonal as diagonal
        from attnzoo_kernels.scan import kernel_delta_gradients as gradients

        kernel, B, T, H, K = gradients.KEY_GRADIENTS, self.B, self.T, self.H, self.K
        found = {"q": self.new("dq_out", B, T, H, K), "k": self.new("dk_out", B, T, H, K)}
        if self.rank_one:
            found |= {"e": self.new("de_out", B, T, H, K), "a": self.new("da_out", B, T, H, K)}
        if self.diagonal:
            self.new("inner", 3 + self.rank_one, self.count, self.C, self.KP, dtype=torch.float32)
            self.run(diagonal.PAIRS_DIAGONAL_BACKWARD, self.count, self.C // 16, self.keys_axis)
            dgates = found["g"] = self.new("dgates", B, T, H, K, dtype=torch.float32)
        most = self.KP // min(self.KP, min(tile.meta["BK"] for tile in kernel.tiles))
        if not self.diagonal:
            dgates = self.new("dgates", most, 2, self.count, self.C, dtype=torch.float32)
        parts = self.new("dbeta", most, self.count, self.C, dtype=torch.float32)
        used = self.keys_axis(self.run(kernel, self.count, self.keys_axis))
        if not self.rank_one:
            found["beta"] = self._per_token(dbeta + parts[:used].sum(0))
        if not self.diagonal:
            found["g"] = self._per_token(self._gate_gradient(dgates[:used].sum(0), dcarry.sum((0, 2))))
        return found

    def _gate_gradient(self, dsums: Tensor, dcarry: Tensor) -> Tensor:
        """From those of the operands' G and the probe's, (2, B*H*N, C), and of a whole chunk's, (B*H*N)."""
        dg = dsums.sum(0).flip(-1).cumsum(-1).flip(-1) + dcarry[:, None]
        return dg - dsums[1] if self.rank_one else dg

    def _per_token(self, x: Tensor) -> Tensor:
        """(B*H*N, C) -> (B,T,H)."""
        return x.view(self.B, self.H, -1)[..., : self.T].transpose(1, 2)


@torch.library.custom_op("attnzoo::scan_delta_forward", mutates_args=())
def scan_delta_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, e: Tensor | None,
    a: Tensor | None, scale: float, state: Tensor, segments: Tensor | None, chunk_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    work = _Scan(q, k, v, g, beta, e, a, scale, state, segments, chunk_size)
    work.forward()
    return work.outputs()


@scan_delta_forward.register_fake
def _(q, k, v, g, beta, e, a, scale, state, segments, chunk_size) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape, dtype=torch.float32)


@torch.library.custom_op("attnzoo::scan_delta_backward", mutates_args=())
def scan_delta_backward(
    do: Tensor, dfinal: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    e: Tensor | None, a: Tensor | None, scale: float, state: Tensor, segments: Tensor | None, chunk_size: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the inputs that are given, in the order of INPUTS."""
    work = _Scan(q, k, v, g, beta, e, a, scale, state, segments, chunk_size)
    work.forward()
    found = work.backward(do, dfinal)
    given = zip(INPUTS, (q, k, v, g, beta, e, a, state), strict=True)
    return [found[name].to(x.dtype).contiguous() for name, x in given if x is not None]


@scan_delta_backward.register_fake
def _(do, dfinal, q, k, v, g, beta, e, a, scale, state, segments, chunk_size) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, g, beta, e, a, state) if x is not None]


def _setup(ctx, inputs, output) -> None:
    q, k, v, g, beta, e, a, ctx.scale, state, segments, ctx.chunk_size = inputs
    ctx.save_for_backward(q, k, v, g, beta, e, a, state, segments)


def _backward(ctx, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, state, segments = ctx.saved_tensors
    found = iter(scan_delta_backward(do, dfinal, *inputs, ctx.scale, state, segments, ctx.chunk_size))
    grads = [None if x is None else next(found) for x in (*inputs, state)]
    return (*grads[:7], None, grads[7], None, None)


scan_delta_forward.register_autograd(_backward, setup_context=_setup)


def _count(q: Any, v: Any, g: Any, a: Any, chunk_size: int) -> int:
    (B, T, H, K), V = q, v[-1]
    diagonal = g is not None and len(g) == 4
    kind = "rank_one" if a is not None else "delta_diagonal" if diagonal else "delta"
    return B * scan_flops(kind, T, H, K, V, _chunk(chunk_size, T)).executed


@register_flop_formula(torch.ops.attnzoo.scan_delta_forward)
def _forward_flops(q, k, v, g, beta, e, a, scale, state, segments, chunk_size, *_, **__) -> int:
    return _count(q, v, g, a, chunk_size)


@register_flop_formula(torch.ops.attnzoo.scan_delta_backward)
def _backward_flops(do, dfinal, q, k, v, g, beta, e, a, scale, state, segments, chunk_size, *_, **__) -> int:
    return 3 * _count(q, v, g, a, chunk_size)


def scan_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    e: Tensor | None,
    a: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The delta rule (beta) or the rank-1 transition (e, a) of `scan`, whose arguments these are, validated.

    Gated DeltaNet (arXiv 2412.06464), Kimi Delta Attention (arXiv 2510.26692), RWKV-7 (arXiv 2503.14456).

    Args:
        g: None, (H,), (B,T,H) or (B,T,H,K).
        state: (B,H,K,V) fp32.
        chunk_size: rounded down to 64, 32 or 16.

    Returns:
        o (B,T,H,V) in v's dtype, and the final state (B,H,K,V) fp32.

    Raises:
        ValueError: K is above 256, or neither beta nor e and a are given.
    """
    if q.shape[-1] > MAX_K:
        raise ValueError(f"q: the kernels take keys of at most {MAX_K}, got {q.shape[-1]}; use the reference")
    if (beta is None) == (a is None) or (e is None) != (a is None):
        raise ValueError("beta: needs exactly one of beta and (e, a); give one of them")
    if g is not None and g.dim() == 1:
        g = g.expand(q.shape[:3])
    return scan_delta_forward(q, k, v, g, beta, e, a, float(scale), state, segments, chunk_size)
