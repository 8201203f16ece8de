"""Learned tokens before every document: as if the caller had put them there."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.model import generate

TINY = {"vocab_size": 20, "dim": 16, "depth": 2, "num_heads": 2}
M = 3
LAYOUTS = ["mha", "gated_deltanet,sliding_window", "hymba"]


def pair(layout: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model with learned tokens, and one without whose tokens 20, 21, 22 are those."""
    options = {"window": 6} if "window" in layout else {}
    if layout == "hymba":
        options = {"window": 4, "num_meta_tokens": M, "global_layers": (1,)}
    torch.manual_seed(0)
    model = attnzoo.create_model(layout, prefix_tokens=M, **TINY, **options).double()
    plain = attnzoo.create_model(layout, **TINY | {"vocab_size": 20 + M}, **options).double()
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("prefix")}
    more = torch.zeros(M, 16, dtype=torch.float64)
    weights["embed.weight"] = torch.cat([model.embed.weight.detach(), model.prefix.weight.detach()])
    weights["head.weight"] = torch.cat([model.head.weight.detach(), more])
    plain.load_state_dict(weights)
    return model.eval(), plain.eval()


def alone(plain: torch.nn.Module, tokens: Tensor) -> Tensor:
    """One document ``(T,)`` with its learned tokens spelled out."""
    whole = torch.cat([torch.arange(20, 20 + M), tokens])
    return plain(whole[None])[0, M:, :20]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_document_has_them(layout: str) -> None:
    model, plain = pair(layout)
    tokens = torch.randint(0, 20, (2, 15))
    same(model(tokens), torch.stack([alone(plain, row) for row in tokens]))
    # documents of length 5, 1 and 7; padding in front and behind; one row a single document
    ids = torch.tensor([[0, 3, 3, 3, 3, 3, 8, 1, 1, 1, 1, 1, 1, 1, 0], [1] * 15])
    y = model(tokens, Context(segment_ids=ids))
    for start, stop in ((1, 6), (6, 7), (7, 14)):
        same(y[0, start:stop], alone(plain, tokens[0, start:stop]))
    assert bool((y[0, [0, 14]] == 0).all())
    same(y[1], alone(plain, tokens[1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", [(15,), (1,) * 15, (4, 1, 6, 4)])
@torch.no_grad()
def test_cached_documents_get_them_once(layout: str, split: tuple[int, ...]) -> None:
    model, _ = pair(layout)
    tokens = torch.randint(0, 20, (2, 15))
    ids = torch.tensor([[0, 3, 3, 3, 3, 3, 8, 1, 1, 1, 1, 1, 1, 1, 1], [2] * 9 + [4] * 6])
    for given in (None, ids):
        want = model(tokens, Context(segment_ids=given))
        cache, outs, at = model.new_cache(2, 40), [], 0
        for size in split:
            ctx = Context(segment_ids=None if given is None else given[:, at : at + size])
            outs.append(model(tokens[:, at : at + size], ctx, cache))
            at += size
        same(torch.cat(outs, dim=1), want)


@torch.no_grad()
def test_prompts_of_unequal_length_and_rows_that_begin_late() -> None:
    model, plain = pair("mha")
    prompts = [[1, 2, 3, 4], [5, 6]]
    together = generate(model, prompts, 5, temperature=0)
    assert together == [generate(model, [p], 5, temperature=0)[0] for p in prompts]
    # a row that held nothing yet gets its first token without ids
    cache = model.new_cache(2, 10)
    model(torch.tensor([[7, 8], [0, 0]]), Context(segment_ids=torch.tensor([[1, 1], [0, 0]])), cache)
    y = model(torch.tensor([[9], [4]]), cache=cache)
    same(y[0, 0], alone(plain, torch.tensor([7, 8, 9]))[-1])
    same(y[1, 0], alone(plain, torch.tensor([4]))[0])


@torch.no_grad()
def test_positions_shift() -> None:
    model, _ = pair("mha")
    tokens = torch.randint(0, 20, (2, 9))
    given = torch.arange(9)[None].expand(2, -1)
    same(model(tokens, Context(positions=given)), model(tokens))
    # rotations are relative
    same(model(tokens, Context(positions=given + 50)), model(tokens))
    stretched = model(tokens, Context(positions=3 * given))
    assert (stretched - model(tokens)).abs().max() > 1e-6


def test_gradients_reach_them_and_the_model_is_rebuilt_from_its_config() -> None:
    model, _ = pair("mha")
    model.train()(torch.randint(0, 20, (2, 5))).square().sum().backward()
    assert bool((model.prefix.weight.grad != 0).all())
    again = attnzoo.create_model(**model.config).double().eval()
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 20, (1, 5))
    assert torch.equal(again(tokens), model.eval()(tokens))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_costs_are_those_of_the_longer_rows(layout: str) -> None:
    model, plain = pair(layout)
    T = 10
    ours, longer = model.cost(T), plain.cost(T + M)
    head = 2.0 * 16 * 20
    rest = longer.forward_flops - 2.0 * 16 * (20 + M)
    assert math.isclose(ours.forward_flops, rest * (T + M) / T + head)
    assert math.isclose(sum(ours.split.values()), ours.forward_flops)
    assert ours.params == sum(p.numel() for p in model.parameters())
    cache, cost = model.new_cache(2, 12, dtype=torch.float64), model.cost(12, torch.float64)
    assert cache.nbytes == 2 * (math.ceil(12 * cost.cache_bytes_per_token) + cost.state_bytes)


def test_refuses_a_negative_number() -> None:
    with pytest.raises(ValueError, match=r"prefix_tokens: must be an integer of at least 0, got -1"):
        attnzoo.create_model("mha", **TINY, prefix_tokens=-1)
