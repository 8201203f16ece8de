"""The adapters of FlexAttention and xformers: what they map, what they refuse, and what they compute."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import attnzoo
from attnzoo import Context
from attnzoo.attention import implementation
from attnzoo.attention.stages.mask import Causal, band
from attnzoo.attention.timeline import Axis
from attnzoo.ops import adapters
from attnzoo.ops.attention import Keys, attention

DOCS = torch.tensor([[1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 4], [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]])


def places(ids: torch.Tensor) -> Axis:
    order = torch.stack(
        [torch.cat([torch.arange(int(n)) for n in row.unique(return_counts=True)[1]]) for row in ids]
    )
    return Axis(order, ids)


def operands(T: int, S: int, heads: tuple[int, int] = (4, 2), batch: int = 2) -> tuple[torch.Tensor, Keys]:
    g = torch.Generator().manual_seed(T * S)
    make = lambda h, n, d: torch.randn(batch, h, n, d, generator=g)  # noqa: E731
    return make(heads[0], T, 16), Keys(make(heads[1], S, 16), make(heads[1], S, 16))


@pytest.mark.parametrize("mask", [band(), band(3), band(3, 2)], ids=str)
@pytest.mark.parametrize(("T", "S"), [(11, 11), (1, 11), (4, 11)])
def test_flex_is_the_reference(mask: Causal, T: int, S: int) -> None:
    q, keys = operands(T, S)
    expected = attention(q, keys, mask=mask, impl="reference")
    torch.testing.assert_close(attention(q, keys, mask=mask, impl="flex"), expected)


@pytest.mark.parametrize("mask", [band(), band(3), band(3, 2)], ids=str)
def test_flex_keeps_documents_apart(mask: Causal) -> None:
    q, keys = operands(11, 11)
    keys, query = keys._replace(axis=places(DOCS)), places(DOCS)
    expected = attention(q, keys, mask=mask, query=query, impl="reference")
    torch.testing.assert_close(attention(q, keys, mask=mask, query=query, impl="flex"), expected)


def test_flex_decodes_and_packs_in_a_mixer() -> None:
    torch.manual_seed(0)
    mixer = attnzoo.create("mla", dim=32, num_heads=2, impl="flex").eval()
    other = attnzoo.create("mla", dim=32, num_heads=2, impl="reference").eval()
    other.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        ctx = Context(segment_ids=DOCS)
        torch.testing.assert_close(mixer(x, ctx=ctx), other(x, ctx=ctx))
        cache = mixer.new_cache(2, 11)
        parts = [mixer(part, cache=cache) for part in x.split([5, 1, 4, 1], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), other(x))


def test_flex_does_not_train_on_a_cpu() -> None:
    mixer = attnzoo.create("mha", dim=32, num_heads=2, impl="flex")
    with pytest.raises(ValueError, match=r"impl: 'flex' has no backward on a CPU.*impl=sdpa"):
        mixer(torch.randn(1, 4, 32))


@pytest.fixture
def fake_operator(monkeypatch: pytest.MonkeyPatch) -> list:
    """xformers' operator in plain torch on the real bias classes; the calls it got."""
    biases = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is not installed")
    calls = []

    def memory_efficient_attention(q, k, v, attn_bias=None, scale=None):
        calls.append(attn_bias)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        scores = q @ k.mT * scale
        if attn_bias is not None:
            scores = scores + attn_bias.materialize((*scores.shape[:2], q.shape[2], k.shape[2]))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    fake = types.ModuleType("xformers.ops")
    fake.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", biases)
    return calls


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("T", "S"), [(11, 11), (1, 11), (4, 11)])
def test_xformers_maps_bands(fake_operator: list, window: int | None, T: int, S: int) -> None:
    q, keys = operands(T, S)
    expected = attention(q, keys, mask=band(window), impl="reference")
    torch.testing.assert_close(attention(q, keys, mask=band(window), impl="xformers"), expected)
    assert len(fake_operator) == 1


@pytest.mark.parametrize("window", [None, 3])
def test_xformers_maps_documents(fake_operator: list, window: int | None) -> None:
    q, keys = operands(11, 11)
    keys, query = keys._replace(axis=places(DOCS)), places(DOCS)
    expected = attention(q, keys, mask=band(window), query=query, impl="reference")
    torch.testing.assert_close(attention(q, keys, mask=band(window), query=query, impl="xformers"), expected)
    assert len(fake_operator) == 1


def test_xformers_refuses_sinks_and_documents_with_a_cache() -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    query = Axis(torch.arange(4)[None], None)
    with pytest.raises(ValueError, match="impl: 'xformers' knows causal masks and windows"):
        adapters.xformers_bias(band(3, 2), query, 1, 4, 4)
    with pytest.raises(
        ValueError, match="impl: 'xformers' takes documents without a cache, got 4 queries and 9"
    ):
        adapters.xformers_bias(band(), query._replace(doc=torch.ones(1, 4)), 1, 4, 9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mha", {"impl": "xformers"}, "no CPU operators"),
        ("dcmha", {"impl": "flex"}, "'flex' computes dot products and softmax, score here is its own"),
        ("dcmha", {"impl": "sdpa"}, "use auto or reference"),
        ("linear", {"impl": "flex"}, "'flex' does not run a scan"),
        ("linear", {"impl": "triton", "head_dim": 512}, "keys up to 256 wide, got 512"),
        ("linear", {"impl": "triton"}, "'triton' needs a GPU, and there is none here"),
        ("mha", {"impl": "triton"}, "'triton' needs a GPU, and there is none here"),
        ("dcmha", {"impl": "triton", "rank": 5}, "key maps up to rank 4, got 5"),
    ],
)
def test_refusals(monkeypatch, name: str, options: dict, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(implementation, "has_xformers", lambda: True)
    monkeypatch.setattr(implementation, "interpreting", lambda: False)
    with pytest.raises(ValueError, match=message):
        attnzoo.create(name, dim=32, num_heads=2, **options)
