"""Based: exp of the scores by its second-order Taylor polynomial, on tiny queries and keys.

Simple linear attention language models balance the recall-throughput tradeoff, arXiv 2402.18668.

    q, k in R^d', d' = 16;  s_tj = q_t . k_j / sqrt(d');  f(s) = 1 + s + s^2 / 2 = phi(q) . phi(k)
    o_t = sum_(j <= t) f(s_tj) v_j / (sum_(j <= t) f(s_tj) + eps),   y = concat(o) W_o

f >= 1/2, so that denominators grow with t and eps = norm_eps never matters.
Cached: the sums of phi(k) v^T and phi(k), H (1 + d' + d' (d' + 1) / 2) (d_v + 1) numbers in fp32, products of
two entries once. The paper's models alternate with short sliding windows; that is a matter of layouts.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from attnzoo.attention.base import Choices, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.linear import plain_sum
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.taylor import feature_count, taylor, taylor_flops
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class Taylor(Stage):
    """Scan stage: normalised polynomial attention, with the moments of the keys as its state.

    Args:
        shape: (heads, width of q and k, width of v). order: of the polynomial. scale: of the scores.
        eps: added to denominators. packed: keep products of two entries once.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        order: int,
        scale: float,
        eps: float,
        chunk_size: int,
        packed: bool = True,
    ) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")
        self.shape, self.order, self.scale, self.eps = shape, order, scale, eps
        self.chunk_size, self.packed = chunk_size, packed

    def choose(self, asked: str) -> Choices:
        if asked not in ("auto", "reference"):
            raise ValueError(f"impl: {asked!r} has no kernel for polynomial weights; use auto or reference")
        return same("reference", "polynomial tiles and a state of key moments, in torch matmuls")

    def split(self, share: Share) -> None:
        self.shape = (share.count(self.shape[0]), *self.shape[1:])

    def memory(self) -> dict[str, Slot]:
        heads, width, v_width = self.shape
        return {"S": Slot("state", (heads, feature_count(width, self.order, self.packed), v_width + 1))}

    def forward(self, terms: Terms, call: Call) -> Tensor:
        o, state = taylor(
            *terms[:3],
            order=self.order,
            scale=self.scale,
            eps=self.eps,
            packed=self.packed,
            initial_state=call.mem.state("S"),
            output_final_state=not call.mem.alone,
            chunk_size=self.chunk_size,
            segments=call.line.doc,
            valid=call.line.valid,
        )
        call.mem.put("S", state)
        return o

    def work(self, length: int) -> Iterable[Work]:
        heads, width, v_width = self.shape
        flops = taylor_flops(length, heads, width, v_width + 1, self.order, self.chunk_size, self.packed)
        why = "later tokens of a tile"
        yield Work("mixing", "polynomial", flops.method, flops.executed, why, per_head=True)

    def elementwise(self) -> dict[str, float]:
        heads, width, _ = self.shape
        return {"features": 2.0 * heads * feature_count(width, self.order, self.packed)}


@register(
    Card(
        name="based",
        title="Based: Taylor linear attention",
        paper="Simple linear attention language models balance the recall-throughput tradeoff",
        arxiv="2402.18668",
        family="linear",
        summary="exp of the scores by its second-order Taylor polynomial, on tiny queries and keys.",
        cached="moments of the keys, H (1 + d' + d' (d' + 1) / 2) (d_v + 1) numbers: constant in the length",
        claims=(
            Claim("perplexity of Mamba", where="1.3B, together with sliding windows"),
            Claim(
                "6.22 points more than Mamba on tasks of recall", where="1.3B, together with sliding windows"
            ),
            Claim(
                "24 times the generation throughput of FlashAttention-2", "decode_ms", "lower", "mha", "1.3B"
            ),
        ),
        small={"feature_dim": 2, "chunk_size": 4},
    ),
    frames=("recurrent",),
    host={"norm_eps": 1e-12},
)
def based(draft: Draft, *, feature_dim: int = 16) -> None:
    """Sets the width of queries and keys, and the scan.

    Args:
        feature_dim: d', width of queries and keys, at most 32; head_dim is that of the values.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: fast_factorizable of order 2 without its norm, at nu = sqrt(d').
    """
    if not 1 <= feature_dim <= 32:
        raise ValueError(
            f"feature_dim: must be in 1..32, since features grow with its square, got {feature_dim}"
        )
    if feature_dim % 2 and draft.host["pos"] == "rope":
        raise ValueError(f"feature_dim: RoPE turns pairs of channels, got an odd width {feature_dim}")
    draft.head_dim = feature_dim

    def complete(done: Draft) -> None:
        plain_sum(done)
        shape = (done.o_heads, done.head_dim, done.v_head_dim)
        host = done.host
        done.put("scan", Taylor(shape, 2, done.head_dim**-0.5, host["norm_eps"], host["chunk_size"]))

    draft.last(complete)
