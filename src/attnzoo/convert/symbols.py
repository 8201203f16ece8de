"""Weights of mixers by the papers' symbols, as matrices for ``x @ W``: what conversions read and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.latent.mla import Latent
from attnzoo.attention.stages.out import LinearOut
from attnzoo.attention.stages.project import QKV
from attnzoo.convert.layer import Layer

Rule = Callable[[Mapping[str, Tensor]], Tensor]


def matrix(*symbols: str) -> Rule:
    """Matrices side by side, as the weight of one `nn.Linear`."""
    return lambda given: torch.cat([given[s] for s in symbols], dim=1).T


def vector(*symbols: str) -> Rule:
    """Vectors one after the other."""
    return lambda given: torch.cat([given[s] for s in symbols])


RULES: dict[type[Stage], dict[str, Rule]] = {
    QKV: {"qkv_proj.weight": matrix("W_q", "W_k", "W_v"), "qkv_proj.bias": vector("b_q", "b_k", "b_v")},
    LinearOut: {"out_proj.weight": matrix("W_o"), "out_proj.bias": vector("b_o")},
    Latent: {
        "q_down.weight": matrix("W_dq"),
        "q_gain": vector("gamma_q"),
        "q_up.weight": matrix("W_uq"),
        "kv_down.weight": matrix("W_dkv"),
        "kv_gain": vector("gamma_kv"),
        "kv_up.weight": matrix("W_ukv"),
    },
}


def read(mixer: Mixer, x: Tensor | None) -> Layer:
    """A layer as conversions see it.

    Raises:
        ValueError: it has learned stages beyond its projections, which no conversion carries over.
    """
    for stage in mixer.stages():
        if type(stage) not in RULES and any(True for _ in stage.parameters()):
            where, what = mixer.site.layer, type(stage).__name__
            raise ValueError(f"model: layer {where} has a {what}, which no conversion carries over")
    late = isinstance(mixer.project, Latent)
    weights = _latent(mixer.project) if late else _plain(mixer.project)
    weights["W_o"] = mixer.out.out_proj.weight.double().T
    if mixer.out.out_proj.bias is not None:
        weights["b_o"] = mixer.out.out_proj.bias.double()
    theta = mixer.options["rope_theta"] if mixer.options["pos"] == "rope" else None
    heads, kv_heads, width = _sizes(mixer)
    return Layer(weights, heads, kv_heads, width, theta, x)


def _plain(project: QKV) -> dict[str, Tensor]:
    layer = project.qkv_proj
    weights = dict(zip(("W_q", "W_k", "W_v"), layer.weight.double().T.split(project.sizes, 1), strict=True))
    if layer.bias is not None:
        weights |= zip(("b_q", "b_k", "b_v"), layer.bias.double().split(project.sizes), strict=True)
    return weights


def _latent(project: Latent) -> dict[str, Tensor]:
    names = {"q_down": "W_dq", "q_up": "W_uq", "kv_down": "W_dkv", "kv_up": "W_ukv"}
    weights = {
        symbol: getattr(project, name).weight.double().T
        for name, symbol in names.items()
        if hasattr(project, name)
    }
    gains = {"gamma_q": getattr(project, "q_gain", None), "gamma_kv": project.kv_gain}
    return weights | {symbol: gain.double() for symbol, gain in gains.items() if gain is not None}


def _sizes(mixer: Mixer) -> tuple[int, int, int]:
    if isinstance(mixer.project, Latent):
        return mixer.project.heads, mixer.project.heads, mixer.project.widths[2]
    return mixer.project.heads[0], mixer.project.heads[1], mixer.project.widths[0]


@torch.no_grad()
def write(mixer: Mixer, weights: Mapping[str, Tensor]) -> None:
    """Sets every parameter of ``mixer`` from weights by symbol."""
    for stage in mixer.stages():
        for name, param in stage.named_parameters():
            param.copy_(RULES[type(stage)][name](weights))
