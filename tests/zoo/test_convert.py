"""Conversions: what is exact is exact, and the searches find what is nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.stages.mask import band
from attnzoo.convert import heads, rope
from attnzoo.convert.factors import atoms
from attnzoo.convert.latent import hadamard, tensor_parallel
from attnzoo.convert.layer import Layer, heads_of, side_by_side
from golden import load_spec_weights

FILES = Path(__file__).parents[1] / "golden"
D, H, d = 32, 4, 8


def golden(name: str) -> dict[str, Any]:
    return torch.load(FILES / f"{name}.op.pt", weights_only=True)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def source(kv_heads: int = H) -> Layer:
    G = kv_heads
    weights = {
        "W_q": draw(D, H * d),
        "W_k": draw(D, G * d),
        "W_v": draw(D, G * d),
        "W_o": draw(H * d, D),
    }
    return Layer({k: v / D**0.5 for k, v in weights.items()}, H, G, d, 10000.0, draw(2, 23, D))


def run(name: str, weights: dict[str, Tensor], x: Tensor, **options: Any) -> Tensor:
    mixer = attnzoo.create(name, D, H, **options).double()
    return load_spec_weights(mixer, weights)(x)


def plain(layer: Layer, **options: Any) -> Tensor:
    return run("gqa", layer.weights, layer.x, num_kv_heads=layer.kv_heads, **options)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_copied_heads_pool_exactly(pooling: str) -> None:
    layer = source(2)
    wide = dict(layer.weights)
    for name in "kv":
        wide[f"W_{name}"] = side_by_side(heads_of(wide[f"W_{name}"], 2).repeat_interleave(2, 0))
    pooled = heads.grouped(Layer(wide, H, H, d), 2, pooling)
    for symbol, expected in layer.weights.items():
        close(pooled[symbol], expected)


@pytest.mark.parametrize("calibrated", [True, False])
def test_values_of_low_rank_share_exactly(calibrated: bool) -> None:
    """Value heads of a group that span no more than one head's width become one, keys being copies."""
    layer = source(2)
    keys = heads_of(layer.weights["W_k"], 2).repeat_interleave(2, 0)
    values = [heads_of(layer.weights["W_v"], 2)[h // 2] @ draw(d, d) for h in range(H)]
    wide = layer.weights | {"W_k": side_by_side(keys), "W_v": side_by_side(torch.stack(values))}
    full = Layer(wide, H, H, d, 10000.0, layer.x if calibrated else None)
    pooled = heads.grouped(full, 2, "svd")
    close(
        run("gqa", pooled, layer.x, num_kv_heads=2),
        run("mha", wide, layer.x),
    )


def test_keys_of_low_rank_share_exactly_where_nothing_rotates_them() -> None:
    """Keys and values of a group are maps of one; the queries and the output take the maps in."""
    layer = source(2)
    both = {
        f"W_{n}": side_by_side(
            torch.stack([heads_of(layer.weights[f"W_{n}"], 2)[h // 2] @ draw(d, d) for h in range(H)])
        )
        for n in "kv"
    }
    full = Layer(layer.weights | both, H, H, d, None, layer.x)
    pooled = heads.grouped(full, 2, "svd")
    close(
        run("gqa", pooled, layer.x, num_kv_heads=2, pos="none"), run("mha", full.weights, layer.x, pos="none")
    )


def test_turning_keys_across_heads_is_exact_at_freqfold_1() -> None:
    """The fold's rotations act alike on both channels of a pair, so they commute with RoPE."""
    file = golden("c2_transmla")
    layer = Layer(file["weights"], H, 2, d, 10000.0, file["x"])
    U, _ = rope.fold(layer, 1, 1)
    W = layer.weights["W_k"].unflatten(1, (2, 2, d // 2))  # (D, G, c, f)
    turned = torch.einsum("dgcf,fge->decf", W, U).flatten(1)
    q = layer.weights["W_q"].unflatten(1, (H, 2, d // 2))
    own = U[:, torch.arange(H) // 2]  # (f, H, e)
    slots = torch.einsum("dhcf,fhe->dhecf", q, own)
    x, total = layer.x, torch.zeros(())
    for e in range(2):
        both = (
            (x @ slots[:, :, e].flatten(1)).unflatten(-1, (H, d)),
            (x @ turned.unflatten(1, (2, d))[:, e])[..., None, :],
        )
        z = [rope.turn_pairs(z.transpose(1, 2).unflatten(-1, (2, d // 2)), 1e4).flatten(-2) for z in both]
        total = total + z[0] @ z[1].mT
    T = x.shape[1]
    p = (total / d**0.5).masked_fill(~torch.ones(T, T).tril().bool(), float("-inf")).softmax(-1)
    v = (x @ layer.weights["W_v"]).unflatten(-1, (2, d)).transpose(1, 2).repeat_interleave(2, 1)
    y = (p @ v).transpose(1, 2).flatten(2) @ layer.weights["W_o"]
    close(y, file["extra"]["y_exact_freqfold1"])
    close(y, file["y"])


def test_balancing_is_exact_at_full_rank() -> None:
    layer = source(2)
    full = 2 * 2 * d - d
    products = []
    for balance in (0.3, 1.0, 5.0):
        found = rope.trans_mla(layer, full, balance=balance)
        products.append(found.W_dkv[:, :full] @ found.W_ukv)
    close(products[0], products[1])
    close(products[2], products[1])


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("strategy", ["high", "low", "uniform", "norm", "greedy"])
def test_partial_rope_with_all_pairs_is_exact(strategy: str, kv_heads: int) -> None:
    layer = source(kv_heads)
    F = rope.choose_pairs(layer, d // 2, strategy)
    assert torch.equal(F, torch.arange(d // 2).expand(kv_heads, -1))
    found = rope.partial_rope(layer, F, kv_heads * d)
    joint = (found.W_dkv @ found.W_ukv).unflatten(1, (kv_heads, d))
    close(joint.flatten(1), layer.weights["W_v"])
    close(found.W_ke, layer.weights["W_k"])


def test_greedy_distances_are_of_visible_keys() -> None:
    """What a window hides does not count: the first choice against a loop over pairs of tokens."""
    layer = source(2)
    layer.mask = band(4, 1)
    order, distance = rope.greedy_pairs(layer, 1)
    q, k = (
        z.unflatten(-1, (-1, d)) for z in (layer.x @ layer.weights["W_q"], layer.x @ layer.weights["W_k"])
    )
    for g in range(2):
        lost = torch.zeros(d // 2, dtype=torch.float64)
        for f in range(d // 2):
            change, count = 0.0, 0
            for b in range(2):
                for i in range(23):
                    for j in range(i + 1):
                        if i - j >= 4 and j >= 1:
                            continue
                        angle = (j - i) * 1e4 ** (-torch.arange(d // 2).double() / (d // 2))
                        for h in (2 * g, 2 * g + 1):
                            a, c = q[b, i, h].view(2, -1), k[b, j, g].view(2, -1)
                            dot, cross = (a * c).sum(0), a[1] * c[0] - a[0] * c[1]
                            gap = dot - dot * angle.cos() - cross * angle.sin()
                            gap[f] = 0
                            change, count = change + gap.sum().abs() / d**0.5, count + 1
            lost[f] = change / count
        assert int(lost.argmin()) == int(order[g, 0])
        close(distance[g, 0], lost.min())


def test_greedy_choice_ends_at_the_source() -> None:
    order, distance = rope.greedy_pairs(source(), d // 2)
    assert torch.equal(order.sort(1).values, torch.arange(d // 2).expand(H, -1))
    assert distance[:, -1].max() < 1e-12


def latent_layer(rank: int) -> Layer:
    weights = {
        "W_uq": draw(D, H * (d + 4)),
        "W_dkv": draw(D, rank + 4),
        "gamma_kv": 1 + 0.3 * draw(rank),
        "W_ukv": draw(rank, H * 2 * d),
        "W_o": draw(H * d, D),
    }
    return Layer(
        {k: v / (D**0.5 if v.dim() == 2 else 1) for k, v in weights.items()}, H, H, d, 1e4, draw(2, 23, D)
    )


@pytest.mark.parametrize("basis", ["pca", "hadamard"])
def test_folding_and_turning_the_latent_is_exact_for_mla(basis: str) -> None:
    layer = latent_layer(16)
    options = {"kv_lora_rank": 16, "qk_rope_head_dim": 4}
    found = tensor_parallel(layer, 2, basis)
    close(run("mla", found.weights, layer.x, **options), run("mla", layer.weights, layer.x, **options))
    assert abs(sum(found.energy) - 1) < 1e-12
    assert (found.energy[0] > found.energy[1]) == (basis == "pca")
    assert all(abs(g * e - 1) < 1e-12 for g, e in zip(found.gain, found.energy, strict=True))


def test_the_basis_is_that_of_the_latents_with_their_biases() -> None:
    layer = latent_layer(16)
    layer.weights["b_dkv"] = draw(20)
    found = tensor_parallel(layer, 2)
    c = (layer.x @ found.weights["W_dkv"] + found.weights["b_dkv"])[..., :16].flatten(0, 1)
    moment = c.T @ c
    close(moment, moment.diagonal().diag())
    close(
        torch.tensor(found.energy, dtype=moment.dtype), moment.diagonal().view(2, 8).sum(1) / moment.trace()
    )


def test_biases_are_rows_for_an_input_of_one() -> None:
    layer = source(2)
    plain = layer.weights | {f"b_{n}": draw(layer.weights[f"W_{n}"].shape[1]) for n in "qkv"}
    whole = Layer(plain, H, 2, d, 1e4, layer.x).with_ones()
    for n in "qkv":
        close(whole.inputs() @ whole.weights[f"W_{n}"], layer.x @ plain[f"W_{n}"] + plain[f"b_{n}"])
    assert "b_q" not in whole.weights and layer.with_ones() is layer


def test_slices_that_say_the_same_read_as_the_whole() -> None:
    """Where every slice of the latent has the same scores, the gains make each one's those of mla."""
    layer = latent_layer(16)
    layer.weights |= {
        "gamma_kv": torch.ones(16).double(),
        "W_dkv": torch.cat([layer.weights["W_dkv"][:, :8].repeat(1, 2), layer.weights["W_dkv"][:, 16:]], 1),
        "W_ukv": layer.weights["W_ukv"][:8].repeat(2, 1),
    }
    options = {"kv_lora_rank": 16, "qk_rope_head_dim": 4}
    sharded = run("tpla", layer.weights, layer.x, shard_norm="sharded", shard_gain=[2.0, 2.0], **options)
    close(sharded, run("mla", layer.weights, layer.x, **options), 1e-6)


def test_hadamard_is_orthogonal() -> None:
    M = hadamard(16, seed=3)
    close(M @ M.T, torch.eye(16).double())


def test_fused_groups_of_equal_heads_are_exact() -> None:
    """Two layers whose heads repeat: the search finds the copies, wherever they stand."""
    layers = []
    for _ in range(2):
        layer = source(2)
        order = torch.tensor([0, 1, 0, 1])  # not neighbours
        wide = layer.weights | {
            f"W_{n}": side_by_side(heads_of(layer.weights[f"W_{n}"], 2)[order]) for n in "kv"
        }
        layers.append(Layer(wide, H, H, d, 1e4, layer.x))
    for layer, found in zip(layers, heads.fuse(layers, 8), strict=True):
        assert found.key_map == found.value_map == [0, 1, 0, 1]
        for name, table in (("k", found.key_map), ("v", found.value_map)):
            close(side_by_side(heads_of(found.weights[f"W_{name}"], 2)[table]), layer.weights[f"W_{name}"])


@pytest.mark.parametrize("budget", [6, 9, 13])
def test_merges_are_the_cheapest_over_all_layers(budget: int) -> None:
    """Ward's criterion as sums of squared distances to means, every pair measured anew at each merge."""
    layers = [source(H) for _ in range(2)]
    for symbol in ("W_k", "W_v"):
        layers[0].weights[symbol] *= 3  # heads count relative to their layer

    def spread(z: Tensor) -> float:
        return float((z - z.mean(0)).square().sum())

    points, groups = {}, {}
    for i, layer in enumerate(layers):
        for n in "kv":
            blocks = heads_of(layer.weights[f"W_{n}"], H).flatten(1)
            points[i, n], groups[i, n] = blocks / blocks.norm(), [[h] for h in range(H)]
    for _ in range(4 * H - budget):
        costs = {}
        for key, own in groups.items():
            for a in range(len(own)):
                for b in range(a + 1, len(own)):
                    z = points[key]
                    costs[key, a, b] = spread(z[own[a] + own[b]]) - spread(z[own[a]]) - spread(z[own[b]])
        key, a, b = min(costs, key=costs.get)
        groups[key][a] += groups[key].pop(b)
    for i, found in enumerate(heads.fuse(layers, budget)):
        for n, table in (("k", found.key_map), ("v", found.value_map)):
            made = [{h for h in range(H) if table[h] == g} for g in range(max(table) + 1)]
            assert sorted(map(sorted, made)) == sorted(map(sorted, groups[i, n]))


def test_contiguous_fusion_is_mean_pooling() -> None:
    layer = source()
    for name in "kv":  # the pairs (0, 1) and (2, 3) are alike but not equal
        blocks = heads_of(layer.weights[f"W_{name}"], H)
        blocks = blocks[[0, 0, 2, 2]] + 0.01 * draw(H, D, d)
        layer.weights[f"W_{name}"] = side_by_side(blocks)
    (found,) = heads.fuse([layer], 4)
    pooled = heads.grouped(layer, 2)
    close(found.weights["W_k"], pooled["W_k"])
    close(found.weights["W_v"], pooled["W_v"])


def test_shared_heads_go_to_roots() -> None:
    first = source()
    second, third = (Layer({k: v.clone() for k, v in first.weights.items()}, H, H, d) for _ in range(2))
    third.weights["W_q"] = second.weights["W_q"] + 1e-3 * draw(D, H * d)
    table = heads.nearest_heads([first, second, third], rate=2 / 3)
    assert len(table) == 2 * H
    assert all(root[0] == 0 and root[1] == own[1] for own, root in table)


def test_share_penalty_is_the_distance_of_shared_heads() -> None:
    layers = [source(2), source(2), source(2)]
    for layer in layers:
        layer.weights = {k: v.requires_grad_() for k, v in layer.weights.items()}
    table = [[[1, 2], [0, 1]], [[1, 3], [0, 0]], [[2, 0], [1, 0]]]
    found = heads.share_penalty(layers, table)
    total = 0.0
    for (i, h), (j, g) in table:
        for name, n in (("W_q", H), ("W_k", 2), ("W_v", 2)):
            ours, theirs = (layers[a].weights[name].split(d, 1)[b * n // H] for a, b in ((i, h), (j, g)))
            total = total + (ours - theirs).square().sum().sqrt() / 3
    close(found, total)
    found.backward()
    assert all(layer.weights[f"W_{n}"].grad.abs().sum() > 0 for layer in layers for n in "qkv")
    assert layers[0].weights["W_o"].grad is None


def test_atoms_are_the_best_and_exact_with_one_per_layer() -> None:
    matrices = draw(5, 6, 7)
    for count in (2, 5):
        found = atoms(matrices, count)
        error = torch.einsum("ls,snm->lnm", found.coefficients, found.atoms) - matrices
        left = torch.linalg.svdvals(matrices.flatten(1))[count:].square().sum()
        assert abs(error.square().sum() - left) < 1e-12
