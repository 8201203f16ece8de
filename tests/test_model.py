"""The language model: layouts, costs, decoding, generation."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnzoo import Collector, Context, create_model
from attnzoo.model import generate, parse_layout

TINY = {"vocab_size": 40, "dim": 32, "depth": 4, "num_heads": 4}
LAYOUTS = [
    "mla",
    "gated_deltanet*3,mha",
    ["mha", {"name": "sliding_window", "window": 4, "n_sink": 1}, "linear", "dcmha"],
]


def tokens(seed: int = 0, batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_layouts() -> None:
    assert [s.name for s in parse_layout("gated_deltanet*3,mha", 6)] == ["gated_deltanet"] * 3 + ["mha"] + [
        "gated_deltanet"
    ] * 2
    assert [s.name for s in parse_layout(["mha", {"name": "gqa", "num_kv_heads": 2}], 2)] == ["mha", "gqa"]
    model = create_model(LAYOUTS[2], **TINY)
    assert [m.name for m in model.mixers] == ["mha", "sliding_window", "linear", "dcmha"]
    assert model.mixers[1].options["window"] == 4
    assert [m.site.layer for m in model.mixers] == [0, 1, 2, 3] and model.mixers[0].site.depth == 4


@pytest.mark.parametrize("layout", ["mha*0", "mha,,gqa", "", "mha**2", ["mha"], [3] * 4, "mha*5"])
def test_bad_layouts(layout) -> None:
    with pytest.raises(ValueError, match=r"^layout:"):
        create_model(layout, **TINY)


def test_options_reach_the_layers_that_have_them() -> None:
    model = create_model("gqa,linear", **TINY, window=5, feature_map="relu")
    assert model.mixers[0].options["window"] == 5 and model.mixers[1].options["feature_map"] == "relu"
    with pytest.raises(ValueError, match=r"feature_mep.*did you mean feature_map"):
        create_model("gqa,linear", **TINY, feature_mep="relu")
    with pytest.raises(ValueError, match=r"^depth:"):
        create_model("gqa", **{**TINY, "depth": 0})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_config_rebuilds_the_model(layout) -> None:
    torch.manual_seed(0)
    model = create_model(layout, **TINY).double()
    other = create_model(**model.config).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens()), other(tokens()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decoding_packed_rows_equals_one_forward(layout) -> None:
    model = create_model(layout, **TINY).double().eval()
    ids = torch.tensor([[1] * 6 + [2] * 7 + [0] * 4, [0, 0] + [5] * 15])
    x = torch.where(ids == 0, -100, tokens())  # whatever stands at padding
    with torch.no_grad():
        want = model(x, Context(segment_ids=ids))
        cache, parts = model.new_cache(2, 17), []
        for a, b in ((0, 5), (5, 6), (6, 14), (14, 17)):
            parts.append(model(x[:, a:b], Context(segment_ids=ids[:, a:b]), cache))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-9, atol=1e-12)
    assert bool((want[ids == 0] == 0).all())
    alone = model(x[:1, 6:13])
    torch.testing.assert_close(want[:1, 6:13], alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cost_counts_the_whole_model(layout) -> None:
    model, x = create_model(layout, **TINY, impl="reference").eval(), tokens(length=24)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    cost = model.cost(24)
    assert cost.executed_flops * x.numel() == pytest.approx(counter.get_total_flops(), rel=1e-9)
    assert cost.params == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(2, 50, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * (50 * cost.cache_bytes_per_token + cost.state_bytes)


def test_tied_head_shares_its_weights() -> None:
    free, tied = create_model("mha", **TINY), create_model("mha", **TINY, tie_head=True)
    assert free.cost(8).params - tied.cost(8).params == 40 * 32
    assert tied.head.weight is tied.embed.weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_prompts_of_unequal_length_together_equal_one_by_one(layout) -> None:
    model = create_model(layout, **TINY).double()
    prompts = [[1, 2, 3], list(range(4, 15)), [30]]
    for sampling in ({"temperature": 0}, {"temperature": 0.8, "top_k": 7, "top_p": 0.9}):
        for row, prompt in enumerate(prompts):
            together = generate(model, prompts, 9, seed=3, **sampling)
            assert together[row] == generate(model, [prompt], 9, seed=3 + row, **sampling)[0]
            assert len(together[row]) == 9


def test_generate_equals_recomputing_everything() -> None:
    model = create_model("mla", **TINY).double().eval()
    got, text = generate(model, [[3, 1, 4]], 8, temperature=0)[0], [3, 1, 4]
    for _ in range(8):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert got == text[3:]


def test_sampling_options() -> None:
    model = create_model("mha", **TINY).double()
    first = generate(model, [[1]], 12, seed=1)
    assert first == generate(model, [[1]], 12, seed=1) != generate(model, [[1]], 12, seed=2)
    assert generate(model, [[1]], 12, temperature=1.5, top_k=1) == generate(model, [[1]], 12, temperature=0)
    assert generate(model, [[1]], 12, temperature=1.5, top_p=1e-9) == generate(
        model, [[1]], 12, temperature=0
    )
    greedy = generate(model, [[1]], 12, temperature=0)[0]
    stop = greedy[4:6]
    cut = generate(model, [[1]], 12, temperature=0, stop=[stop])[0]
    assert cut == greedy[: next(i for i in range(12) if greedy[i : i + 2] == stop)]
    for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}:"):
            generate(model, [[1]], **{"max_new_tokens": 2, **bad})
    with pytest.raises(ValueError, match=r"^prompts:"):
        generate(model, [[1], []], 2)


def test_cache_says_when_it_is_full() -> None:
    model = create_model("mha", **TINY)
    cache = model.new_cache(2, 5)
    model(tokens(length=4), cache=cache)
    with pytest.raises(ValueError, match=r"^cache: 6 tokens do not fit max_len=5"):
        model(tokens(length=2), cache=cache)
    ids = torch.tensor([[1, 1, 0], [0, 0, 1]])
    cache = model.new_cache(2, 4)
    model(tokens(length=3), Context(segment_ids=ids), cache)
    model(
        tokens(length=2), Context(segment_ids=torch.ones(2, 2, dtype=torch.long)), cache
    )  # rows hold 4 and 3
    with pytest.raises(ValueError, match=r"^cache: 5 tokens"):
        model(tokens(length=1), cache=cache)


def test_a_new_document_frees_the_cache() -> None:
    model = create_model("gqa", **TINY).double().eval()
    cache = model.new_cache(1, 6)
    for ident in (1, 2, 3):
        x = tokens(seed=ident, batch=1, length=6)
        with torch.no_grad():
            got = model(x, Context(segment_ids=torch.full((1, 6), ident)), cache)
            torch.testing.assert_close(got, model(x), rtol=1e-9, atol=1e-12)


def test_auxiliary_losses_are_averaged_over_layers() -> None:
    model, collector = create_model("moh", **TINY), Collector()
    model(tokens(), Context(collector=collector))
    layers = collector.losses["moh/balance"]
    assert sorted(layers) == [0, 1, 2, 3]
    mean = sum(float(v.detach()) for v, _ in layers.values()) / 4
    assert float(collector.total().detach()) == pytest.approx(0.01 * mean)
    assert float(collector.total({"moh/balance": 1.0})) == pytest.approx(mean)
    with pytest.raises(ValueError, match=r"^aux weights:"):
        collector.total({"nothing": 1.0})
    assert float(Collector().total()) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recomputed_activations_give_the_same_gradients(layout) -> None:
    from torch.utils.checkpoint import checkpoint

    model = create_model(layout, **TINY).double()
    loss = model(tokens()).square().mean()
    want = torch.autograd.grad(loss, list(model.parameters()))
    model.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    got = torch.autograd.grad(model(tokens()).square().mean(), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
