"""Conversions against what the papers' own code, or an independent one, makes of the same weights."""

from __future__ import annotations

import pytest
import torch

from attnzoo.convert import heads, rope
from attnzoo.convert.factors import reconstruct, stacked, tucker
from attnzoo.convert.latent import energy_rank, x_eco_mla
from attnzoo.convert.layer import Layer, heads_of, side_by_side
from zoo.test_convert import H, close, d, golden, run


def test_mean_pooling_equals_the_released_code() -> None:
    file = golden("c1_mha_to_gqa")
    given = dict(file["weights"])
    biases = zip(("b_q", "b_k", "b_v"), given.pop("b_qkv").split(H * d), strict=True)
    pooled = heads.grouped(Layer(given | dict(biases), H, H, d), 2)
    for symbol, expected in file["extra"].items():
        close(pooled[symbol], expected)


@pytest.mark.parametrize("case", range(4))
def test_transmla_equals_the_released_code(case: int) -> None:
    file = golden("c2_transmla")
    case, options = file["extra"]["cases"][case], file["extra"]["cases"][case]["spec_options"]
    layer = Layer(file["weights"], H, 2, d, 10000.0, file["x"])
    sizes = {"freqfold": options["freqfold"], "collapse": options["collapse"]}
    d_r = d // options["collapse"]
    full = 2 * 2 * d - d_r
    for rank, q_rank, y in (
        (options["kv_rank"], options["q_rank"], case["y_mla"]),
        (full, 0, case["y_rope_removed"]),
    ):
        found = rope.trans_mla(layer, rank, q_rank, balance=options["balance"], **sizes)._asdict()
        weights = {k: v for k, v in found.items() if v is not None}
        shape = {"kv_lora_rank": rank, "q_lora_rank": q_rank, "qk_rope_head_dim": d_r, "v_head_dim": d}
        close(run("mla", weights, file["x"], latent_norm=False, allow_expand=True, **shape), y)
    # the rotary slice keeps these pairs, which are those of a rotary slice of its own width
    kept = torch.arange(d_r // 2) * options["collapse"]
    assert kept.tolist() == case["freq_pairs"].tolist()


@pytest.mark.parametrize("case", range(4))
def test_xecomla_equals_the_released_code(case: int) -> None:
    file = golden("c4_xecomla")
    case = file["extra"]["cases"][case]
    options = case["spec_options"]
    layer = Layer(file["weights"] | {"W_o": case["W_o"]}, H, 2, d)
    ranks = (options["kv_lora_rank"], options["q_lora_rank"])
    d_n, d_r = options["qk_nope_head_dim"], options["qk_rope_head_dim"]
    found = x_eco_mla(layer, *ranks, d_n, d_r)
    # the released code keeps rotary channels in their order and pairs neighbours
    back = torch.cat([torch.arange(0, d_r, 2), torch.arange(1, d_r, 2)]).argsort()
    queries = heads_of(found.W_dq @ found.W_uq, H)
    queries = torch.cat([queries[..., :d_n], queries[..., d_n:][..., back]], dim=-1)
    close(side_by_side(queries), case["W_q_lowrank"])
    down, W_kr = found.W_dkv.split([ranks[0], d_r], dim=1)
    close(down @ found.W_ukv, case["W_kv_lowrank"])
    close(W_kr[:, back], case["W_kr"])
    close(run("mla", found._asdict(), case["x"], latent_norm=False, allow_expand=True, **options), case["y"])


def test_energy_ranks_equal_the_released_code() -> None:
    file = golden("c4_xecomla")
    found = [energy_rank(file["weights"]["W_q"], tau) for tau in file["extra"]["energy_tau"]]
    assert found == file["extra"]["energy_rank_W_q"]


@pytest.mark.parametrize("case", range(3))
def test_tucker_factors_equal_the_independent_ones(case: int) -> None:
    file = golden("c8_tensorllm")
    case = file["extra"]["cases"][case]
    layer, ranks = Layer(file["weights"], H, H, d), tuple(case["ranks"])
    W = stacked(layer)
    for iterate, key in ((False, "rel_err_hosvd"), (True, "rel_err_hooi")):
        error = torch.linalg.norm(reconstruct(tucker(layer, ranks, iterate)) - W) / torch.linalg.norm(W)
        assert abs(float(error) - case[key]) < 1e-6
    parts = tucker(layer, ranks)
    hat = reconstruct(parts)
    for c, symbol in enumerate(("W_q", "W_k", "W_v")):
        if "W_hat_hosvd" in case:
            close(hat[:, :, c].permute(0, 2, 1).flatten(1), case["W_hat_hosvd"][symbol])
    if "W_hat_hosvd" in case:
        close(hat[:, :, 3].permute(2, 1, 0).flatten(0, 1), case["W_hat_hosvd"]["W_o"])
    lost = sum(
        torch.linalg.svdvals(W.movedim(m, 0).flatten(1))[r:].square().sum() for m, r in enumerate(ranks)
    )
    assert torch.linalg.norm(hat - W).square() <= lost + 1e-12


def test_greedy_pairs_equal_the_released_code() -> None:
    file = golden("c9_elitekv")
    layer = Layer(file["weights"], H, H, d, 10000.0, file["x"])
    order, distance = rope.greedy_pairs(layer, 3)
    assert torch.equal(order, file["extra"]["greedy_order"])
    close(distance, file["extra"]["greedy_distance"])
    F = rope.choose_pairs(layer, 2, "greedy")
    assert torch.equal(F, file["extra"]["F"])
    found, expected = rope.partial_rope(layer, F, 18), file["extra"]["converted"]
    for symbol in ("W_qe", "W_qn", "W_ke", "W_o"):
        close(getattr(found, symbol), expected[symbol])
    close(found.W_dkv @ found.W_ukv, expected["W_dkv"] @ expected["W_ukv"])
