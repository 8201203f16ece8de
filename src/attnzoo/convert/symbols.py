"""Weights of mixers by the papers' symbols, as matrices for ``x @ W``: what conversions read and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.crosslayer.headshare import Assembled
from attnzoo.attention.crosslayer.masa import Combination
from attnzoo.attention.crosslayer.provider import Made
from attnzoo.attention.factorised.tensorllm import Tucker, TuckerOut
from attnzoo.attention.latent.latent import Latent
from attnzoo.attention.sharing.sqa import TiledQueries
from attnzoo.attention.stages.mask import band
from attnzoo.attention.stages.out import LinearOut
from attnzoo.attention.stages.project import QKV
from attnzoo.convert.layer import Layer

Given = Mapping[str, Tensor]
LATENT = {"q_down": "W_dq", "q_up": "W_uq", "kv_down": "W_dkv", "kv_up": "W_ukv"}
GAINS = {"q_gain": "gamma_q", "kv_gain": "gamma_kv"}


def read(mixer: Mixer, x: Tensor | None) -> Layer:
    """A layer as conversions see it.

    Raises:
        ValueError: it has learned stages beyond its projections, which no conversion carries over.
    """
    for stage in mixer.stages():
        if not isinstance(stage, READABLE) and any(True for _ in stage.parameters()):
            where, what = mixer.site.layer, type(stage).__name__
            raise ValueError(f"model: layer {where} has a {what}, which no conversion carries over")
    late = isinstance(mixer.project, Latent)
    weights = _latent(mixer.project) if late else _plain(mixer.project)
    weights["W_o"] = mixer.out.out_proj.weight.double().T
    if mixer.out.out_proj.bias is not None:
        weights["b_o"] = mixer.out.out_proj.bias.double()
    theta = mixer.options["rope_theta"] if mixer.options["pos"] == "rope" else None
    heads, kv_heads, width = _sizes(mixer)
    if isinstance(mixer.project, TiledQueries):  # the same heads again, as matrices of their own
        tiles = mixer.project.tiles
        heads *= tiles
        weights |= {name: weights[name].tile(tiles) for name in ("W_q", "b_q") if name in weights}
    mask = band(mixer.options["window"], mixer.options["n_sink"])
    return Layer(weights, heads, kv_heads, width, theta, x, mask)


def _plain(project: QKV) -> dict[str, Tensor]:
    layer = project.qkv_proj
    weights = dict(zip(("W_q", "W_k", "W_v"), layer.weight.double().T.split(project.sizes, 1), strict=True))
    if layer.bias is not None:
        weights |= zip(("b_q", "b_k", "b_v"), layer.bias.double().split(project.sizes), strict=True)
    return weights


def _latent(project: Latent) -> dict[str, Tensor]:
    weights = {
        symbol: getattr(project, name).weight.double().T
        for name, symbol in LATENT.items()
        if hasattr(project, name)
    }
    biases = {symbol.replace("W", "b"): getattr(project, name, None) for name, symbol in LATENT.items()}
    weights |= {b: m.bias.double() for b, m in biases.items() if m is not None and m.bias is not None}
    gains = {symbol: getattr(project, name, None) for name, symbol in GAINS.items()}
    return weights | {symbol: gain.double() for symbol, gain in gains.items() if gain is not None}


def _sizes(mixer: Mixer) -> tuple[int, int, int]:
    if isinstance(mixer.project, Latent):
        return mixer.project.heads, mixer.project.heads, mixer.project.widths[2]
    return mixer.project.heads[0], mixer.project.heads[1], mixer.project.widths[0]


@torch.no_grad()
def write(mixer: Mixer, weights: Given) -> None:
    """Sets every parameter of ``mixer`` from weights by symbol."""
    for stage in mixer.stages():
        if any(True for _ in stage.parameters()):
            next(put for kind, put in WRITERS.items() if isinstance(stage, kind))(stage, weights)


def _write_qkv(stage: QKV, given: Given) -> None:
    _write_linear(stage.qkv_proj, "qkv", stage.sizes, given)


def _write_out(stage: LinearOut, given: Given) -> None:
    _write_linear(stage.out_proj, "o", [stage.sizes[1]], given)


def _write_linear(layer: nn.Module, names: str, sizes: Sequence[int], given: Given) -> None:
    """A projection of the matrices ``names``, plain or made from what layers share."""
    if isinstance(layer, Made):
        for name, piece in zip(names, layer.pieces, strict=True):
            _write_piece(piece, name, given)
    else:
        for name, part in zip(names, layer.weight.split(list(sizes)), strict=True):
            part.copy_(given[f"W_{name}"].T)
    if layer.bias is not None:
        layer.bias.copy_(torch.cat([given[f"b_{name}"] for name in names]))


def _write_piece(piece: nn.Module, name: str, given: Given) -> None:
    if isinstance(piece, Combination):
        piece.atoms.weight.copy_(given[f"A_{name}"].mT)
        piece.offset.copy_(given[f"c_{name}"])
        return
    weight = given[f"W_{name}"].T
    if not isinstance(piece, Assembled):
        piece.weight.copy_(weight)
        return
    rows = weight.T if piece.outward else weight
    blocks = rows.unflatten(0, (len(piece.rows), -1))
    homes = [(bank, i) for bank in piece.banks for i in range(len(bank.weight))]
    for block, row in zip(blocks, piece.rows, strict=True):
        bank, i = homes[row]
        bank.weight[i].copy_(block)


def _write_latent(stage: Latent, given: Given) -> None:
    for name, symbol in LATENT.items():
        layer = getattr(stage, name, None)
        if layer is not None:
            layer.weight.copy_(given[symbol].T)
            if layer.bias is not None:
                layer.bias.copy_(given[symbol.replace("W", "b")])
    for name, symbol in GAINS.items():
        if getattr(stage, name, None) is not None:
            getattr(stage, name).copy_(given[symbol])


def _write_tucker_out(stage: TuckerOut, given: Given) -> None:
    stage.bias.copy_(given["b_o"])


def _write_tucker(stage: Tucker, given: Given) -> None:
    for name in ("U1", "U2", "U3"):
        getattr(stage, name).copy_(given[name])
    stage.core.copy_(given["C"].permute(3, 1, 0, 2))


READABLE = (QKV, LinearOut, Latent)
WRITERS: dict[type[Stage], Callable[[Stage, Given], None]] = {
    QKV: _write_qkv,
    LinearOut: _write_out,
    Latent: _write_latent,
    Tucker: _write_tucker,
    TuckerOut: _write_tucker_out,
}
