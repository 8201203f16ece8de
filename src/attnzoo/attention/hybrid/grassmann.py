"""Causal Grassmann flows: no attention, pairs of tokens as planes, gated into the stream.

Attention Is Not What You Need: Grassmann Flows as an Attention-Free Alternative for Sequence Modeling,
arXiv 2512.19428.

    z = x W_r + b_r                                      r wide
    p_ij = z_(t,i) z_(t-lag,j) - z_(t,j) z_(t-lag,i)     i < j: Plucker coordinates of the plane of both
    g_t  = W_p mean_(lags inside the document) p / max(|p|, 1e-6) + b_p        0 where no lag is
    a    = sigmoid([x ; g] W_a + b_a),   y = a * x + (1 - a) * g

Cached: the last max(lags) vectors z. Our choice: y is added to the stream as every mixer's output is;
``residual=false`` gives LayerNorm(y) in place of the stream, as published. Where no pair exists g is 0, not
b_p; heads are slices of the output, which only gates of a composition see. Two z's at a sine below 1e-2 span
no plane: text repeats tokens, and beside equal ones the gradient of p / |p| reaches 1e6, which drowns all
others, and nothing is learned beyond the last token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.own import Core, Flat
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.wedge import wedge
from attnzoo.registry import Card, register

PARALLEL = 1e-2  # sine of the angle up to which two tokens span no plane


class Planes(Core):
    """The flow: planes with earlier tokens, projected and gated.

    Args:
        rank: r. lags: distances to the earlier tokens.
    """

    unsplit = "it has no heads: every channel is made from all"

    def __init__(self, draft: Draft, rank: int, lags: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.heads, self.rank, self.lags = draft.dim, draft.o_heads, rank, lags
        self.coordinates = rank * (rank - 1) // 2
        self.reduce = draft.linear("reduce", draft.dim, rank, bias=True)
        self.plane = draft.linear("plane", self.coordinates, draft.dim, bias=True)
        self.blend = draft.linear("blend", 2 * draft.dim, draft.dim, bias=True)

    def forward(self, call: Call) -> Tensor:
        z = self.reduce(call.x)
        order = call.line.order
        g = self.plane(self._mean(call.mem.tail("z", z, max(self.lags)), order).to(z.dtype))
        some = (order >= min(self.lags))[..., None]
        g = torch.where(some, g, torch.zeros((), dtype=g.dtype, device=g.device))
        x = call.x
        a = torch.sigmoid(self.blend(torch.cat([x.to(g.dtype), g], dim=-1)))
        return torch.lerp(g.to(x.dtype), x, a.to(x.dtype)).unflatten(-1, (self.heads, -1))

    def _mean(self, both: Tensor, order: Tensor) -> Tensor:
        """``(B, T, r (r - 1) / 2)`` mean of unit planes; both ``(B, max lag + T, r)``.

        Planes with one token are linear in the other, so the mean of all is one plane: that with the earlier
        tokens' sum, each over its own plane's size ``|z| |part of the other across z|``.
        """
        both = both if both.dtype == torch.float64 else both.float()
        back, T = max(self.lags), order.shape[1]
        now = both[:, back:]
        then = torch.stack([both[:, back - lag : back - lag + T] for lag in self.lags], dim=2)
        length = torch.linalg.vector_norm(now, dim=-1, keepdim=True)
        unit = (now / length.clamp(min=1e-18))[:, :, None]
        across = then - (then * unit).sum(-1, keepdim=True) * unit
        apart = torch.linalg.vector_norm(across, dim=-1)  # (B, T, lags)
        inside = order[..., None] >= torch.tensor(self.lags, device=order.device)
        share = inside / ((length * apart).clamp(min=1e-6) * inside.sum(-1, keepdim=True).clamp(min=1))
        # equal tokens are common, and around them the direction of a plane, so its gradient, has no bound
        share = torch.where(apart > PARALLEL * torch.linalg.vector_norm(then, dim=-1), share, 0.0)
        return wedge(now, (share[..., None] * then).sum(2))

    def memory(self) -> dict[str, Slot]:
        return {"z": Slot("tail", (max(self.lags), self.rank))}

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_r", 2 * length * self.dim * self.rank)
        needed = max(0, length - min(self.lags))
        one = 2 * self.coordinates * self.dim
        yield Work("mixing", "W_p", one * needed, one * length, "tokens without a pair")
        yield Work("gates", "W_a", 4 * length * self.dim**2)

    def elementwise(self) -> dict[str, float]:
        return {"planes": 3.0 * self.coordinates, "their sizes": 10.0 * len(self.lags) * self.rank}


class Replace(Stage):
    """``LayerNorm(y) - residual``: added to the stream it leaves LayerNorm(y) there."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.gain = flag(nn.Parameter(torch.ones(dim)), decay=False)
        self.bias = flag(nn.Parameter(torch.zeros(dim)), decay=False)
        self.eps = eps

    def forward(self, y: Tensor, call: Call) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], self.gain, self.bias, self.eps) - call.residual


@register(
    Card(
        name="grassmann",
        title="Causal Grassmann flows",
        paper="Attention Is Not What You Need: Grassmann Flows as an Attention-Free Alternative for Sequence "
        "Modeling",
        arxiv="2512.19428",
        family="hybrid",
        summary="Planes spanned by a token and a few earlier ones, gated into the stream; no attention.",
        cached="the last max(lags) reduced vectors z: constant in the length",
        claims=(
            Claim(
                "perplexity 261.1, transformer 235.2",
                "val_bpb",
                "higher",
                "mha",
                "WikiText-2, 13-18M, L = 256, 12 layers",
            ),
            Claim(
                "perplexity 275.7, transformer 248.4",
                "val_bpb",
                "higher",
                "mha",
                "WikiText-2, 13-18M, L = 256, 6 layers",
            ),
        ),
        small={"rank": 5, "lags": (1, 3, 4), "residual": False},
    ),
    frames=("own",),
    host={"norm_eps": 1e-5},
    fixed={"out_bias": "there is no output projection"},
)
def grassmann(
    draft: Draft,
    *,
    rank: int = 32,
    lags: tuple[int, ...] = (1, 2, 4, 8, 12, 16),
    lag_per_layer: bool = False,
    residual: bool = True,
) -> None:
    """Sets the core.

    Args:
        rank: r, at least 2. lags: distances, each at least 1, without repetition.
        lag_per_layer: layer i of n has the one lag number ``i * len(lags) // n``, in place of all.
        residual: y is added to the stream, else it replaces it after a LayerNorm.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: x itself where the gate is open; lags in any order; 0 for g where z's are parallel.
    """
    if rank < 2:
        raise ValueError(f"rank: a plane needs at least 2 dimensions, got {rank}")
    if not lags or min(lags) < 1 or len(set(lags)) < len(lags):
        raise ValueError(f"lags: must be distances of at least 1, each once, got {list(lags)}")
    if lag_per_layer:
        lags = (lags[draft.site.layer * len(lags) // draft.site.depth],)
    draft.put("core", Planes(draft, rank, lags))
    draft.put("out", Flat())
    if not residual:
        draft.put("after", Replace(draft.dim, draft.host["norm_eps"]))
