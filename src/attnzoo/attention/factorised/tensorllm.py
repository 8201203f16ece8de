"""Tucker attention: the matrices of all heads are one tensor with shared factors and a small core per head.

TensorLLM: Tensorising Multi-Head Attention for Enhanced Reasoning and Compression in LLMs, arXiv 2501.15674.

    W in R^(D x d x 4 x H): W[:, :, c, h] = W_q,h, W_k,h, W_v,h and W_o,h^T for c = 0..3
    W[:, :, c, h] = U1 M_c,h U2^T,   M_c,h = sum_t U3[c, t] C_h[:, :, t]
    U1 in R^(D x R1), U2 in R^(d x R2), U3 in R^(4 x R3), C_h in R^(R1 x R2 x R3)
    x^ = x U1,   q_h = (x^ M_0,h) U2^T, likewise k_h and v_h,   RoPE on q and k,   o_h = attend(q_h, k_h, v_h)
    y  = sum_h ((o_h U2) M_3,h^T) U1^T

Cached: k (after RoPE) and v, 2 H d per token; where R2 < d, x^ M_1 and x^ M_2, 2 H R2, made whole at read or
not at all: values are summed narrow, and without positions U2^T U2 goes to the query.
Our choice (the paper compresses trained weights): factors trained from scratch, by default R1 = D / 2,
R2 = d / 2, R3 = 4; orthonormal columns of U1 and U2, rows of U3 of one length (the identity where R3 = 4), a
core scaled so that the whole matrices start as those of mha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Late
from attnzoo.attention.site import INIT_STD, flag
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.registry import Card, register


class Tucker(Late, Stage):
    """The factors, and the projection to q, k, v: early where R2 = d, late from narrow rows otherwise.

    Args:
        ranks: R1, R2, R3. rotates: whether keys must be whole before they are read.
    """

    unsplit = "all heads are made of factors that they share"

    def __init__(self, draft: Draft, ranks: tuple[int, int, int]) -> None:
        super().__init__()
        D, d, H = draft.dim, draft.head_dim, draft.num_heads
        self.dim, self.width, self.heads, self.ranks = D, d, H, ranks
        (R1, R2, R3), depth = ranks, draft.site.depth
        self.late, self.rotates = d > R2, True
        std = INIT_STD * math.sqrt(4 * D * d / (R1 * R2 * R3))
        self.U1 = _kept(_orthonormal(D, R1))
        self.U2 = _kept(_orthonormal(d, R2))
        rows = torch.eye(4) if R3 == 4 else torch.randn(4, R3)
        rows = rows / rows.norm(dim=1, keepdim=True) * math.sqrt(R3 / 4)
        rows[3] /= math.sqrt(2 * depth)
        self.U3 = _kept(rows)
        self.core = _kept(torch.randn(R3, R1, H, R2) * std)

    def slices(self, first: int, stop: int) -> Tensor:
        """M of the matrices ``first`` .. ``stop - 1``: ``(n, R1, H R2)``."""
        return (self.U3[first:stop] @ self.core.flatten(1)).unflatten(1, (self.ranks[0], -1))

    def whole(self, z: Tensor) -> Tensor:
        """``(..., R2) -> (..., d)``."""
        return z @ self.U2.T

    def narrow(self, x: Tensor) -> list[Tensor]:
        """x^ M of q, k and v, each ``(B, H, T, R2)``."""
        low = x @ self.U1
        parts = low @ self.slices(0, 3).transpose(0, 1).flatten(1)
        return [z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in parts.chunk(3, dim=-1)]

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, H, T, d)`` each."""
        return tuple(self.whole(z) for z in self.narrow(x))

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, None, dict[str, Tensor]]:
        q, k, v = self.narrow(x)
        return self.whole(q), None, {"k": k, "v": v}

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        return self.whole(rows["k"]), self.whole(rows["v"])

    def absorbs(self, new: int, keys: int) -> bool:
        return new < keys

    def absorbed(self, q: Tensor, q_rot: None, rows: dict[str, Tensor], turn: Callable):
        """Narrow values, and narrow keys where nothing rotates them."""
        if self.rotates:
            return q, Keys(turn(self.whole(rows["k"])), rows["v"]), self.whole
        return q @ self.U2.to(q.dtype), Keys(rows["k"], rows["v"]), self.whole

    def memory(self) -> dict[str, Slot]:
        shape = (self.heads, self.ranks[1] if self.late else self.width)
        return {name: Slot("rows", shape) for name in ("k", "v")}

    def work(self, length: int) -> Iterable[Work]:
        R1, R2, _ = self.ranks
        yield Work("projections", "U1", 2 * length * self.dim * R1)
        for name, heads in (("q", True), ("k", False), ("v", False)):
            flops = 2 * length * self.heads * R2 * (R1 + self.width)
            yield Work("projections", f"M_{name} U2", flops, per_head=heads)

    def weight_flops(self) -> float:
        R1, R2, R3 = self.ranks
        return 2.0 * 4 * R3 * self.heads * R1 * R2


class TuckerOut(Stage):
    """The output projection from the same factors.

    Args:
        factors: the projection of the same mixer, which owns them.
    """

    unsplit = "all heads are made of factors that they share"

    def __init__(self, factors: Tucker, bias: bool) -> None:
        super().__init__()
        self.owner = (factors,)  # not a submodule: its parameters are the projection's
        self.bias = nn.Parameter(torch.zeros(factors.dim)) if bias else None

    def forward(self, o: Tensor, call: Call) -> Tensor:
        (factors,) = self.owner
        low = (o @ factors.U2.to(o.dtype)).flatten(2) @ factors.slices(3, 4)[0].T.to(o.dtype)
        y = low @ factors.U1.T.to(o.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def work(self, length: int) -> Iterable[Work]:
        (f,) = self.owner
        R1, R2, _ = f.ranks
        yield Work("projections", "U2 M_o", 2 * length * f.heads * R2 * (f.width + R1), per_head=True)
        yield Work("projections", "U1 of y", 2 * length * R1 * f.dim)


def _orthonormal(rows: int, columns: int) -> Tensor:
    start = torch.empty(rows, columns)
    return start if start.is_meta else nn.init.orthogonal_(start)


def _kept(start: Tensor) -> nn.Parameter:
    return flag(nn.Parameter(start), reinit=False)


@register(
    Card(
        name="tensorllm",
        title="Tucker-tensorised attention",
        paper="TensorLLM: Tensorising Multi-Head Attention for Enhanced Reasoning and Compression in LLMs",
        arxiv="2501.15674",
        family="factorised",
        summary="The matrices of all heads share two bases; each head has a small core of its own.",
        cached="k, v: 2 H d per token, 2 H R2 where R2 < d",
        claims=(
            Claim(
                "up to 250 x fewer attention weights", "params", "lower", "mha", "compressed after training"
            ),
            Claim("equal or better accuracy", where="reasoning, compressed after training"),
        ),
        small={"rank_model": 20, "rank_head": 8, "rank_qkvo": 3},
    ),
    fixed={
        "num_kv_heads": "the tensor has a key and a value block per query head; repeat shared blocks first",
        "qkv_bias": "the factors have no bias",
    },
)
def tensorllm(
    draft: Draft, *, rank_model: int | None = None, rank_head: int | None = None, rank_qkvo: int = 4
) -> None:
    """Sets projection and output.

    Args:
        rank_model: R1 in 1..D, default D / 2. rank_head: R2 in 1..d, default d / 2. rank_qkvo: R3 in 1..4.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha at full ranks with U1 = U2 = U3 = I; mha with the multiplied-out matrices always.
    """
    D, H, d = draft.dim, draft.num_heads, draft.head_dim
    ranks = (
        max(1, D // 2) if rank_model is None else rank_model,
        max(1, d // 2) if rank_head is None else rank_head,
        rank_qkvo,
    )
    for name, rank, most in zip(("rank_model", "rank_head", "rank_qkvo"), ranks, (D, d, 4), strict=True):
        if not 1 <= rank <= most:
            raise ValueError(f"{name}: must be in 1..{most}, got {rank}")
    factors = Tucker(draft, ranks)
    draft.put("project", factors)
    draft.put("out", TuckerOut(factors, draft.host["out_bias"]))

    def settled(done: Draft) -> None:
        if {(H, d)} != {*done.shapes().values(), (done.o_heads, done.v_head_dim)}:
            raise ValueError(
                f"add: the tensor has equal blocks of q, k, v and o, got (heads, width) {done.shapes()}; "
                "leave the variant that changes them out"
            )
        # values are summed narrow by any weights; keys only where no stage turns or changes them
        factors.rotates = done.host["pos"] == "rope" or "position" in done.slots

    # once more, so that all other variants have put their stages
    draft.very_last(settled)
