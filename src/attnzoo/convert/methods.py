"""The conversions by name: from the layers of a model to variants, their options and their weights.

A method is a function ``(layers, *, option=default) -> list[Target]``; its keyword-only parameters are its
options. What of it is exact stands in its docstring, and the tests hold it to that; how far the rest is from
the source is what `convert` measures.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnzoo.convert import factors, heads, latent, rope
from attnzoo.convert.layer import Layer, heads_of, side_by_side
from attnzoo.convert.target import LATENT, PLAIN, Method, Target


def to_gqa(
    layers: list[Layer],
    *,
    num_kv_heads: int,
    pooling: Literal["mean", "first", "random", "svd"] = "mean",
) -> list[Target]:
    """Pools key/value heads into groups (2305.13245). Exact where the heads of a group are equal; "svd" is
    also exact for values of rank <= d per group, and for such keys where nothing rotates them; it pools
    rotated keys by their mean.
    """
    return [
        Target(
            "gqa",
            layer.options() | {"num_kv_heads": num_kv_heads},
            heads.grouped(layer, num_kv_heads, pooling),
        )
        for layer in layers
    ]


def to_transmla(
    layers: list[Layer],
    *,
    kv_rank: int,
    q_rank: int = 0,
    freqfold: int = 1,
    collapse: int = 1,
    balance: float = 1.0,
) -> list[Target]:
    """TransMLA (2502.07864). Exact: merging and turning the keys at freqfold 1, balancing, the full rank.
    Approximate: no rotation but on the shared rotary key, folding, collapsing, cutting the rank.
    """
    made = [rope.trans_mla(x.with_ones(), kv_rank, q_rank, freqfold, collapse, balance) for x in layers]
    return [
        _mla(layer, found, q_rank, kv_rank, layer.head_dim, layer.head_dim // collapse)
        for layer, found in zip(layers, made, strict=True)
    ]


def to_xecomla(
    layers: list[Layer],
    *,
    kv_rank: int,
    q_rank: int,
    qk_nope_head_dim: int | None = None,
    qk_rope_head_dim: int | None = None,
    energy: float | None = None,
) -> list[Target]:
    """X-EcoMLA (2503.11132): a start from singular vectors; not the source's function even at full rank.
    Exact: a source without positions at full rank.

    Widths default to half a head each, without positions to all of it. With ``energy`` the ranks are each
    layer's own.
    """
    targets = []
    for layer in layers:
        default = 0 if layer.theta is None else layer.head_dim // 4 * 2 or 2
        d_r = default if qk_rope_head_dim is None else qk_rope_head_dim
        d_n = layer.head_dim - d_r if qk_nope_head_dim is None else qk_nope_head_dim
        found = latent.x_eco_mla(layer.with_ones(), kv_rank, q_rank, d_n, d_r, energy)
        targets.append(_mla(layer, found, found.W_dq.shape[1], found.W_ukv.shape[0], d_n, d_r))
    return targets


def _mla(layer: Layer, found: rope.Latent, q_rank: int, rank: int, d_n: int, d_r: int) -> Target:
    options = {
        "kv_lora_rank": rank,
        "q_lora_rank": q_rank,
        "qk_nope_head_dim": d_n,
        "qk_rope_head_dim": d_r,
        "v_head_dim": layer.head_dim,
        "latent_norm": False,
        "allow_expand": True,
    }
    if "b_q" in layer.weights:
        options["qkv_bias"] = True
    return Target("mla", options, _biases({k: v for k, v in found._asdict().items() if v is not None}, layer))


def _biases(weights: dict[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    """The last rows of the maps from x as biases, where there are any; see `Layer.with_ones`."""
    if "b_q" not in layer.weights:
        return weights
    maps = ("W_dq" if "W_dq" in weights else "W_uq", "W_dkv")
    biases = {name.replace("W", "b"): weights[name][-1] for name in maps}
    return weights | {name: weights[name][:-1] for name in maps} | biases


def to_mha2mla(
    layers: list[Layer],
    *,
    num_rope_pairs: int,
    kv_rank: int,
    strategy: Literal["high", "low", "uniform", "norm"] = "norm",
) -> list[Target]:
    """MHA2MLA (2502.14837), in the layout of elitekv. Exact with all pairs kept and at full rank."""
    return [_partial(layer, num_rope_pairs, kv_rank, strategy) for layer in layers]


def to_elitekv(layers: list[Layer], *, num_rope_pairs: int, kv_rank: int) -> list[Target]:
    """EliteKV (2503.01586): greedy choice of pairs. Exact with all pairs kept and at full rank."""
    return [_partial(layer, num_rope_pairs, kv_rank, "greedy") for layer in layers]


def _partial(layer: Layer, count: int, rank: int, strategy: str) -> Target:
    whole = layer.with_ones()
    found = rope.partial_rope(whole, rope.choose_pairs(whole, count, strategy), rank)
    queries = [heads_of(W, layer.heads) for W in (found.W_qn, found.W_qe)]
    weights = {
        "W_uq": side_by_side(torch.cat(queries, dim=-1)),
        "W_dkv": torch.cat([found.W_dkv, found.W_ke], dim=1),
        "W_ukv": found.W_ukv,
        "W_o": found.W_o,
    }
    options = {"num_rope_pairs": count, "kv_rank": rank, "num_kv_heads": layer.kv_heads}
    if count:
        options["rope_pairs"] = found.F.tolist()
    return Target("elitekv", layer.options() | options, _biases(weights, layer))


def to_dha(layers: list[Layer], *, budget: int, fusion: bool = False) -> list[Target]:
    """DHA (2406.06567): ``budget`` key and value heads over all layers, in groups of their own. Exact where
    the heads of a group are equal; always with ``fusion``: then training has to bring them together.
    """
    targets = []
    for layer, found in zip(layers, heads.fuse(layers, budget), strict=True):
        options = {
            "num_key_heads": max(found.key_map) + 1,
            "num_value_heads": max(found.value_map) + 1,
            "key_map": found.key_map,
            "value_map": found.value_map,
        }
        weights = heads.repeated(layer) if fusion else found.weights
        options |= {"fusion": True} if fusion else {}
        targets.append(Target("dha", layer.options() | options, weights))
    return targets


def to_tpla(
    layers: list[Layer], *, latent_shards: int = 2, basis: Literal["pca", "hadamard"] = "pca"
) -> list[Target]:
    """MLA to TPLA (2508.15881). Exact: folding the gain, changing the basis. Approximate: a norm and a
    softmax per slice of the latent.
    """
    targets = []
    for layer in layers:
        found = latent.tensor_parallel(layer, latent_shards, basis)
        options = {"latent_shards": latent_shards, "shard_gain": found.gain}
        if "gamma_kv" in found.weights:
            options |= {"shard_norm": "sharded", "shard_share": found.energy}
        targets.append(Target("tpla", options, found.weights))
    return targets


def to_tensorllm(
    layers: list[Layer], *, rank_model: int, rank_head: int, rank_qkvo: int = 4, iterate: bool = False
) -> list[Target]:
    """TensorLLM (2501.15674): Tucker factors by HOSVD, with ``iterate`` HOOI. Exact at full ranks."""
    ranks = (rank_model, rank_head, rank_qkvo)
    options = dict(zip(("rank_model", "rank_head", "rank_qkvo"), ranks, strict=True))
    found = [factors.tucker(layer, ranks, iterate) for layer in layers]
    return [
        Target("tensorllm", layer.options() | options, dict(zip(("U1", "U2", "U3", "C"), f, strict=True)))
        for layer, f in zip(layers, found, strict=True)
    ]


def to_headshare(layers: list[Layer], *, share_rate: float = 0.3) -> list[Target]:
    """DirectShare (2402.11819): the heads most alike take the blocks of an earlier layer's head."""
    table = heads.nearest_heads(layers, share_rate)
    return [
        Target("headshare", layer.options() | {"share_table": table, "num_kv_heads": layer.kv_heads}, weights)
        for layer, weights in zip(layers, heads.replaced(layers, table), strict=True)
    ]


def to_masa(layers: list[Layer], *, num_atoms: int, share: Literal["qkv", "qkvo"] = "qkv") -> list[Target]:
    """MASA (2508.04581) by matrix PCA. Exact with as many atoms as layers."""
    weights = [{k: v for k, v in layer.weights.items() if k.startswith("b_")} for layer in layers]
    for name in "qkvo":
        matrices = torch.stack([layer.weights[f"W_{name}"] for layer in layers])
        if name in share:
            found = factors.atoms(matrices, num_atoms)
            for i, own in enumerate(weights):
                own |= {f"A_{name}": found.atoms, f"c_{name}": found.coefficients[i]}
        else:
            for own, matrix in zip(weights, matrices, strict=True):
                own[f"W_{name}"] = matrix
    options = {"num_atoms": num_atoms, "share": share, "coef_param": "free"}
    return [
        Target("masa", layer.options() | options | {"num_kv_heads": layer.kv_heads}, own)
        for layer, own in zip(layers, weights, strict=True)
    ]


METHODS: dict[str, Method] = {
    "gqa": Method(to_gqa, PLAIN, biases=True),
    "transmla": Method(to_transmla, PLAIN, reads_text=True, biases=True),
    "mha2mla": Method(to_mha2mla, PLAIN, reads_text=True, biases=True),
    "elitekv": Method(to_elitekv, PLAIN, reads_text=True, biases=True),
    "xecomla": Method(to_xecomla, PLAIN, biases=True),
    "dha": Method(to_dha, PLAIN, biases=True),
    "tpla": Method(to_tpla, ("mla",), reads_text=True, keeps=LATENT),
    "tensorllm": Method(to_tensorllm, PLAIN),
    "headshare": Method(to_headshare, PLAIN, biases=True),
    "masa": Method(to_masa, PLAIN, biases=True),
}
