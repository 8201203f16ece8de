"""MHLA: linear attention with a state per block of tokens; each block of queries reads its own mixture.

MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head, arXiv 2601.07832.

    f(q), f(k) = relu, then rotated;  S_c = sum_(j in block c) f(k_j) v_j^T
    o_i = d_k^(-1/2) (sum_(c' < c) M_cc' S_c' + M_cc sum_(j <= i, j in c) f(k_j) v_j^T)^T f(q_i),  i in c
    y = concat(RMSNorm_head(o) * silu(x W_g)) W_o
    M = tril(clamp(M, 1e-5, 1)), L x L, for all heads; row c starts at 1 / (c + 1)

Cached: S_c of every finished block, H d_k d_v numbers per block_size tokens; the running block's sum, and its
mixture, which changes only where a block begins; all in fp32. It grows with the length.
Our choice: documents count their own blocks; the clamp is part of the graph (the released code overwrites the
weights); d_k is made even under rotation. A document longer than L blocks is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Choices, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.linear import FeatureMap, plain_sum
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.blocks import Layout
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.refine import ShortConv
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class BlockMix(Stage):
    """Scan stage: sums of blocks, mixed by a learned lower triangular matrix.

    Args:
        shape: (heads, width of q and k, width of v). blocks: L. size: tokens per block.
    """

    def __init__(self, shape: tuple[int, int, int], blocks: int, size: int, scale: float) -> None:
        super().__init__()
        self.shape, self.size, self.scale = shape, size, scale
        start = 1 / torch.arange(1, blocks + 1, dtype=torch.float32)[:, None].expand(-1, blocks)
        self.M = flag(nn.Parameter(start.tril()), decay=False, reinit=False)

    def choose(self, asked: str) -> Choices:
        if asked not in ("auto", "reference"):
            raise ValueError(f"impl: {asked!r} has no kernel for mixed blocks; use auto or reference")
        return same("reference", "sums of blocks and their mixture, in torch matmuls")

    def split(self, share: Share) -> None:
        self.shape = (share.count(self.shape[0]), *self.shape[1:])
        share.keep(self)

    def memory(self) -> dict[str, Slot]:
        heads, width, v_width = self.shape
        return {
            "sums": Slot("blocks", (heads, width * v_width), self.size, wide=True),
            "S": Slot("state", self.shape),
            "mixed": Slot("state", self.shape),
        }

    def forward(self, terms: Terms, call: Call) -> Tensor:
        q, k, v = terms[:3]
        call.line.place(len(self.M) * self.size, "num_blocks")
        dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        layout = Layout.of(call, self.size)
        with torch.autocast(q.device.type, enabled=False):
            M = self.M.to(dtype).clamp(1e-5, 1)
            q, k, v_blocks = (layout.spread(z.to(dtype)) for z in (q * self.scale, k, v))  # B,H,N,C,·
            o = (q @ k.mT).tril() @ v_blocks
            sums = k.mT @ v_blocks
            carried = self._carried(call)
            if carried is not None:  # the first block began before this forward
                first = torch.cat([q[:, :, :1] @ carried[:, :, None], torch.zeros_like(o[:, :, 1:])], dim=2)
                o, sums = o + first, torch.cat([sums[:, :, :1] + carried[:, :, None], sums[:, :, 1:]], dim=2)
            mixed = self._mixed(M, sums, layout, call)
            own = M.diagonal()[layout.number][:, None, :, None, None]
            o = q @ mixed + own * o
        self._keep(sums, mixed, layout, call)
        return layout.collect(o, v.shape[1]).to(v.dtype)

    def _carried(self, call: Call) -> Tensor | None:
        """``(B, H, d_k, d_v)`` sum of the block that goes on from the cache; None where none does."""
        line, state = call.line, call.mem.state("S")
        if state is None or (line.doc is None and line.past % self.size == 0):
            return None
        if line.doc is None:
            return state
        goes_on = line.order[:, 0] % self.size != 0  # a new document begins with order 0
        return torch.where(goes_on[:, None, None, None], state, 0.0)

    def _mixed(self, M: Tensor, sums: Tensor, layout: Layout, call: Call) -> Tensor:
        """``(B, H, N, d_k, d_v)`` what each block reads of the finished blocks of its document."""
        line, (ends, _) = call.line, call.mem.block_ends(self.size)
        if layout.doc is None:
            ended = sums[:, :, : ends.shape[1]]
        else:
            index = layout.block_of(ends)[:, None, :, None, None].expand(
                -1, sums.shape[1], -1, *sums.shape[3:]
            )
            ended = sums.gather(2, index)
        kept = line.doc is None and layout.lead and layout.count == 1  # the running block's mixture is known
        if kept and ended.shape[2] == 0:
            return call.mem.state("mixed")[:, :, None]
        columns = call.mem.ended("sums", ended.flatten(3), self.size)
        if kept:
            return call.mem.state("mixed")[:, :, None]
        axis = call.mem.ended_axis(self.size)
        row, column = layout.number[:, :, None], (axis.order // self.size)[:, None]
        seen = column < row
        if axis.doc is not None:
            seen = seen & (layout.doc[:, :, None] == axis.doc[:, None])
        last = len(M) - 1  # slots of blocks that are not there may stand anywhere
        weights = M[row.clamp(max=last), column.clamp(max=last)] * seen
        return (weights[:, None] @ columns).unflatten(-1, sums.shape[3:])

    def _keep(self, sums: Tensor, mixed: Tensor, layout: Layout, call: Call) -> None:
        """The running block's sum and mixture."""
        if call.mem.alone:
            return
        line = call.line
        if layout.doc is None:
            call.mem.put("S", sums[:, :, -1])
            call.mem.put("mixed", mixed[:, :, -1])
            return
        n = line.count()
        block = layout.block_of((n - 1).clamp(min=0)[:, None])[:, None, :, None, None]
        for name, z in (("S", sums), ("mixed", mixed)):
            last = z.gather(2, block.expand(-1, z.shape[1], -1, *z.shape[3:]))[:, :, 0]
            call.mem.put(name, torch.where((n > 0)[:, None, None, None], last, call.mem.state(name)))

    def work(self, length: int) -> Iterable[Work]:
        (heads, width, v_width), size = self.shape, self.size
        count, ended = -(-length // size), length // size
        tail = length - (count - 1) * size
        state, pair = 2 * heads * width * v_width, 2 * heads * (width + v_width)
        inside = (count - 1) * size * (size + 1) // 2 + tail * (tail + 1) // 2
        needed, runs = (count - 1) * size + length - min(size, length), 2 * count * size
        yield Work(
            "mixing", "own block", pair * inside, pair * count * size**2, "later tokens", per_head=True
        )
        why = "the last block's sum, the first one's empty past"
        yield Work("mixing", "sums of blocks", state * needed, state * runs, why, per_head=True)
        mixes = count * (count - 1) // 2, count * ended
        yield Work("mixing", "mixture", *(state * m for m in mixes), "later blocks", per_head=True)


@register(
    Card(
        name="mhla_linear",
        title="MHLA: token-level multi-head linear attention",
        paper="MHLA: Restoring Expressivity of Linear Attention via Token-Level Multi-Head",
        arxiv="2601.07832",
        family="linear",
        summary="A state per block of tokens, of which each block of queries reads its own mixture.",
        cached="a state (H d_k d_v) per finished block: grows with the length",
        claims=(
            Claim("+3.6 % on ImageNet, +12.6 % on image generation", where="at equal complexity"),
            Claim("+6.3 % on language", where="at equal complexity"),
        ),
        small={"block_size": 4, "num_blocks": 40, "use_short_conv": True},
    ),
    frames=("recurrent",),
    host={"pos": "rope"},
    fixed={"chunk_size": "the blocks are the chunks; set block_size"},
)
def mhla_linear(
    draft: Draft,
    *,
    num_blocks: int | None = None,
    block_size: int = 64,
    expand_k: float = 0.5,
    feature_map: Literal["elu1", "relu", "identity", "hedgehog", "t2r", "dpfp", "hadamard"] = "relu",
    use_output_gate: bool = True,
    use_short_conv: bool = False,
    conv_kernel: int = 4,
) -> None:
    """Sets feature map, blocks, head norm and gate.

    Args:
        num_blocks: L (default: as many as max_seq_len needs). block_size: tokens per block.
        expand_k: width of q and k over that of v; the product is made even under pos=rope.
        feature_map: as in linear. use_output_gate: the silu gate. use_short_conv: convolutions with silu on
            q, k and v, of conv_kernel taps.

    Shape: (B, T, D) -> (B, T, D), T up to num_blocks * block_size.
    Reduces to: linear (normalize=False) where M is 1; block-wise retention where M_cc' = gamma^(c - c').
    """
    L = -(-draft.site.max_len // max(block_size, 1)) if num_blocks is None else num_blocks
    for name, value in (("block_size", block_size), ("num_blocks", L)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    width = draft.head_dim * expand_k
    if expand_k <= 0 or width > 16 * draft.head_dim:
        raise ValueError(f"expand_k: must be in (0, 16], got {expand_k}")
    even = 2 if draft.host["pos"] == "rope" else 1
    draft.head_dim = max(1, -(-int(width) // even)) * even

    def complete(done: Draft) -> None:
        plain_sum(done)
        if use_short_conv:
            shapes = list(done.shapes(projected=True).values())
            done.put("refine", ShortConv(shapes, conv_kernel, [F.silu] * 3))
        phi = FeatureMap(feature_map, done.shapes())
        done.put("refine", phi)
        done.project_width, done.head_dim = done.project_width or done.head_dim, done.head_dim * phi.growth
        scale = done.head_dim**-0.5 if done.scale is None else done.scale
        done.put("scan", BlockMix((done.o_heads, done.head_dim, done.v_head_dim), L, block_size, scale))
        done.put("combine", HeadNorm(done.v_head_dim, done.host["norm_eps"]))
        if use_output_gate:
            done.put("combine", Gate(done.site, done.dim, done.o_heads, done.v_head_dim, F.silu))

    draft.last(complete)
