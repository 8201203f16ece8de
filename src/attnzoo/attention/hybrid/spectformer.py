"""SpectFormer: the first layers filter the sequence by learned spectra, the others are attention.

SpectFormer: Frequency and Attention is what you need in a Vision Transformer, arXiv 2304.06446.

    layers 0 .. alpha - 1:   kappa = irfft(W_hat)[0 : L_f],   W_hat complex (n_f / 2 + 1, D)
                             y_t = sum_(m < L_f) kappa_m * x_(t - m)                per channel
    the others:              multi-head attention

Cached: the last L_f - 1 inputs of a spectral layer, k and v of the others. Our choice: the published filter
is circular, so every token would read every later one; this is the linear convolution with the same filter,
cut at documents. alpha is a third of the depth, at least 1 (published: 4 of 12). At the start the filter's
gain is about 0.03, so that the branch is all but silent; the published block, which spectral_single_residual
brings back, has one residual around filter and MLP: ``x + MLP(LN(filter(LN(x))))``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.own import Core, Flat
from attnzoo.attention.site import Site, flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.long_conv import carried_conv, long_conv_elementwise, long_conv_flops
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.registry import Card, register


class Filter(Core):
    """Causal convolution by a filter that is learned as a spectrum.

    Args:
        taps: L_f. points: n_f, of the transform that makes the taps. std: of the weights at the start.
        limit: tokens that a sequence may have; None = any.
    """

    unsplit = "its heads are channels of the stream, without an output projection"

    def __init__(self, draft: Draft, taps: int, points: int, std: float, limit: int | None) -> None:
        super().__init__()
        self.dim, self.heads, self.taps, self.points = draft.dim, draft.o_heads, taps, points
        self.limit = limit
        start = std * torch.randn(points // 2 + 1, draft.dim, 2)  # real and imaginary part
        self.W_hat = flag(nn.Parameter(start), reinit=False)

    def kernel(self) -> Tensor:
        """``(L_f, D)`` taps, the first for the token itself."""
        wide = self.W_hat if self.W_hat.dtype == torch.float64 else self.W_hat.float()
        return torch.fft.irfft(torch.view_as_complex(wide.contiguous()), self.points, dim=0)[: self.taps]

    def forward(self, call: Call) -> Tensor:
        if self.limit is not None:
            call.line.place(self.limit, "max_seq_len")
        y = carried_conv(call.x, self.kernel(), call, "x")
        return y.to(call.x.dtype).unflatten(-1, (self.heads, -1))

    def memory(self) -> dict[str, Slot]:
        return {"x": Slot("tail", (self.taps - 1, self.dim))} if self.taps > 1 else {}

    def work(self, length: int) -> Iterable[Work]:
        needed, executed = long_conv_flops(length, self.dim)
        yield Work("mixing", "filter inside blocks", needed, executed, "later tokens of a block")

    def elementwise(self) -> dict[str, float]:
        whole = self.limit or 4 * self.taps
        return {"Fourier transforms": self.dim * long_conv_elementwise(whole, self.taps)}


def _alpha(site: Site, alpha: int | None) -> int:
    return max(1, site.depth // 3) if alpha is None else alpha


def _choose(site: Site, *, alpha: int | None, **_: object) -> str:
    return "own" if site.layer < _alpha(site, alpha) else "score"


@register(
    Card(
        name="spectformer",
        title="SpectFormer",
        paper="SpectFormer: Frequency and Attention is what you need in a Vision Transformer",
        arxiv="2304.06446",
        family="hybrid",
        summary="Leading layers are causal convolutions by learned spectra, the others attention.",
        cached="the last L_f - 1 inputs of a spectral layer; k, v of the others",
        adapted="the paper's filter is circular over the sequence; here a causal convolution with its kernel",
        claims=(
            Claim("84.25 % (S), 85.7 % (L)", where="ImageNet-1k"),
            Claim("2 % above GFNet-H and LiT", where="ImageNet-1k"),
        ),
        small={"filter_len": 6, "alpha": 1, "spectral_single_residual": True},
        layers=2,
    ),
    frames=("own", "score"),
    choose=_choose,
)
def spectformer(
    draft: Draft,
    *,
    alpha: int | None = None,
    filter_len: int | None = None,
    n_f: int | None = None,
    init_std: float = 0.02,
    spectral_single_residual: bool = False,
) -> None:
    """Sets the core of spectral layers; the others are the score frame as it is.

    Args:
        alpha: spectral layers, the first ones; 0 = none; default a third of num_layers, at least 1.
        filter_len: L_f, at most max_seq_len; default max_seq_len, and then longer sequences are refused.
        n_f: points of the spectrum, at least L_f; default 2 L_f. init_std: of the spectrum, positive.
        spectral_single_residual: blocks of spectral layers have no residual between filter and MLP.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with alpha=0; x itself where the filter's taps are (1, 0, 0, ...).
    """
    T_max = draft.site.max_len
    taps = T_max if filter_len is None else filter_len
    points = 2 * taps if n_f is None else n_f
    if alpha is not None and alpha < 0:
        raise ValueError(f"alpha: must be at least 0 layers, got {alpha}")
    if not 1 <= taps <= T_max:
        raise ValueError(f"filter_len: must be in 1..max_seq_len={T_max}, got {filter_len}")
    if points < taps:
        raise ValueError(f"n_f: must be at least filter_len={taps}, got {n_f}; leave it out for twice that")
    if init_std <= 0:
        raise ValueError(f"init_std: must be positive, got {init_std}")
    if _choose(draft.site, alpha=alpha) == "score":
        return
    if draft.host["out_bias"] and _alpha(draft.site, alpha) >= draft.site.depth:
        raise ValueError("out_bias: spectral layers have no output projection, got true; leave it out")
    draft.put("core", Filter(draft, taps, points, init_std, taps if taps == T_max else None))
    draft.put("out", Flat())
    draft.single_residual = spectral_single_residual
