"""Matrix atom sharing: each layer's projections are learned combinations of matrices that all layers share.

Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning, arXiv 2508.04581.

    W_P^l = sum_(s <= S) c^P_(l,s) A^P_s          P in q, k, v (and o); A^P_s of the projection's shape
    mlp:   c^P_l = W_3 gelu(W_2 gelu(W_1 e_l + b_1) + b_2) + b^P_l        e_l: a learned embedding
    free:  c^P_l is a parameter

Cached: as the host. S = L / 3 atoms of q, k, v halve the attention weights, of q, k, v and o leave a third.
The paper drops the MLP after training and keeps c; see `fold`. Our choice: one embedding (width ``coef_dim``)
per layer; one MLP per projection kind for all layers, except for the last bias, which is the layer's own and
starts at the one-hot of floor(l S / L): layers start tied in blocks, at the usual scale. Coefficients are not
decayed: together with decayed atoms their product would collapse. Weights are mixed in every forward.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.crosslayer.provider import Bank, provide
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import INIT_STD, Site, flag
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


class Atoms(nn.Module):
    """The dictionary ``(S, d_out, d_in)`` of one projection kind."""

    def __init__(self, count: int, d_in: int, d_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, d_out, d_in) * std)


class Embedding(nn.Module):
    """What a layer tells the coefficient MLPs, ``(1, d_e)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = flag(nn.Parameter(torch.randn(1, width)), decay=False, reinit=False)


class CoefficientMLP(nn.Module):
    """``e -> W_3 gelu(W_2 gelu(W_1 e))`` of one projection kind, the same for all layers."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.last = nn.Linear(width, count, bias=False)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.weight, std=width**-0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.last.weight, std=INIT_STD)
        for param in self.parameters():
            flag(param, decay=False, reinit=False)

    def forward(self, e: Tensor) -> Tensor:
        return self.last(F.gelu(self.second(F.gelu(self.first(e)))))


class Combination(nn.Module):
    """One matrix of one layer: ``sum_s c_s A_s``.

    Args:
        atoms: the dictionary. start: c at the start. mlp, embedding: what adds to it; None = it is a free
            parameter.
    """

    def __init__(
        self, atoms: Atoms, start: Tensor, mlp: CoefficientMLP | None, embedding: Embedding | None
    ) -> None:
        super().__init__()
        self.atoms, self.mlp, self.embedding = atoms, mlp, embedding
        self.offset = flag(nn.Parameter(start), decay=False, reinit=False)

    def coefficients(self) -> Tensor:
        """c ``(1, S)``; the MLP may take most of the offset away, so nothing is rounded before the sum."""
        if self.mlp is None:
            return self.offset[None]
        with torch.autocast(self.offset.device.type, enabled=False):
            return self.mlp(self.embedding.weight) + self.offset

    def forward(self) -> Tensor:
        atoms = self.atoms.weight
        return (self.coefficients() @ atoms.flatten(1)).view(atoms.shape[1:])

    def weight_flops(self) -> int:
        mlp = 0 if self.mlp is None else sum(w.numel() for w in self.mlp.parameters() if w.dim() == 2)
        return 2 * (self.atoms.weight.numel() + mlp)


@torch.no_grad()
def fold(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same mixer or model with ``coef_param=free``: its MLPs are dropped, and what they
    say is kept.
    """
    state = module.state_dict()
    for name, part in module.named_modules():
        if isinstance(part, Combination):
            made = tuple(f"{name}.{child}." for child in ("mlp", "embedding"))
            state = {key: value for key, value in state.items() if not key.startswith(made)}
            state[f"{name}.offset"] = part.coefficients()[0]
    return state


class Dictionary:
    """Makes the combinations of one layer out of what the model's layers share."""

    def __init__(self, site: Site, count: int, free: bool, width: int) -> None:
        self.site, self.count, self.width = site, count, width
        self.embedding = None if free else Embedding(width)

    def __call__(self, matrix: str, d_in: int, d_out: int, std: float) -> Combination:
        site, S = self.site, self.count
        atoms = site.shared(f"masa.{matrix}", lambda: Atoms(S, d_in, d_out, std))
        if atoms.weight.shape != (S, d_out, d_in):
            raise ValueError(
                f"layout: layer {site.layer} needs {S} atoms of {(d_out, d_in)} for {matrix!r}, earlier "
                f"layers share {tuple(atoms.weight.shape)}; give all layers the same shapes and num_atoms"
            )
        mlp = None
        if self.embedding is not None:
            mlp = site.shared(f"masa.{matrix}.mlp", lambda: CoefficientMLP(self.width, S))
        start = F.one_hot(torch.tensor(site.layer * S // site.depth), S).float()
        return Combination(atoms, start, mlp, self.embedding)


@register(
    Card(
        name="masa",
        title="Matrix atom sharing in attention",
        paper="Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning",
        arxiv="2508.04581",
        family="crosslayer",
        summary="Projections of all layers are learned combinations of a few shared matrices.",
        cached="as the host",
        claims=(
            Claim(
                "perplexity 72.1, full attention 76.1",
                "val_bpb",
                "lower",
                "mha",
                "110M, 2.2B tokens, WikiText",
            ),
            Claim("perplexity 72.1, gqa 78.4", "val_bpb", "lower", "gqa", "110M, 2.2B tokens, WikiText"),
            Claim("half of the parameters of attention", "params", "lower", "mha"),
            Claim("perplexity 72.8 with a third of them (qkvo)", where="110M, 2.2B tokens, WikiText"),
            Claim("perplexity 31.34 (qkvo) against 30.88 of full attention", where="729M"),
        ),
        small={"share": "qkvo", "coef_dim": 8},
        layers=6,
    ),
    frames=("score", "recurrent"),
)
def masa(
    draft: Draft,
    *,
    num_atoms: int | None = None,
    share: Literal["qkv", "qkvo"] = "qkv",
    coef_param: Literal["mlp", "free"] = "mlp",
    coef_dim: int = 64,
) -> None:
    """Makes the projections' weights from shared atoms.

    Args:
        num_atoms: S, in 1..num_layers; default max(1, L / 3).
        share: which projections; "qkv" leaves each layer its own W_o.
        coef_param: whether an MLP makes the coefficients from the layer's embedding, or they are free.
        coef_dim: width of the embedding and the MLP, at least 1.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: its host with S = L and one-hot coefficients; layers with one weight with S = 1; "free" with
        the coefficients that `fold` writes down.
    """
    depth = draft.site.depth
    S = max(1, depth // 3) if num_atoms is None else num_atoms
    if not 1 <= S <= depth:
        raise ValueError(f"num_atoms: must be in 1..num_layers={depth}, got {S}")
    if coef_dim < 1:
        raise ValueError(f"coef_dim: must be at least 1, got {coef_dim}")
    provide(draft, Bank(Dictionary(draft.site, S, coef_param == "free", coef_dim), share))
