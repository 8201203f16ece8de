"""Fewer queries than keys on a GPU: flash attention, no table. Written out for a CPU; on a GPU, itself."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import Context
from attnzoo.attention.stages.mask import Causal, band
from attnzoo.attention.timeline import Axis
from attnzoo.ops import Keys, attention
from attnzoo.ops import last_queries as module
from attnzoo.ops.last_queries import last_queries, takes
from attnzoo.parallel.context import Span
from attnzoo.parallel.successive import Successive
from gpu_kernels import FLASH, AsGpu, flash_on_cpu

T, S = 5, 14
SHAPES = [(4, 4, 8, 8), (4, 2, 6, 5), (4, 2, 5, 9), (4, 1, 16, 8), (3, 3, 12, 12)]  # H, G, d, d_v


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every score, for whole heads."""
    T, S = q.shape[2], k.shape[2]
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
    later = torch.arange(S, device=q.device) > torch.arange(S - T, S, device=q.device)[:, None]
    return (q @ k.mT * scale).masked_fill(later, float("-inf")).softmax(-1) @ v


def check(run: Callable, want: Callable, *given: Tensor, close: float = 1e-12) -> None:
    """Outputs and all gradients."""
    found = []
    for call in (run, want):
        o = call(*given)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=o.dtype)
        found.append((o, *torch.autograd.grad(o, given, do)))
    torch.testing.assert_close(*found, rtol=close, atol=close)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_dense_attention(shape: tuple[int, int, int, int]) -> None:
    H, G, d, d_v = shape
    q, k, v = draw(2, H, T, d), draw(2, G, S, d), draw(2, G, S, d_v)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with AsGpu():
            return attention(q, Keys(k, v), scale=0.3)

    with (
        flash_on_cpu() as calls,
        mock.patch.object(Causal, "visible", side_effect=AssertionError("a table")),
    ):
        check(run, lambda *z: dense(*z, 0.3), q, k, v)
    assert calls[FLASH] == 1 and sum(calls.values()) == 2


def test_heads_that_are_mapped() -> None:
    q, k, v = draw(1, 4, T, 8), draw(1, 3, S, 8), draw(1, 2, S, 8)
    k_map, v_map = torch.tensor([2, 0, 1, 2]), torch.tensor([1, 1, 0, 0])

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with AsGpu():
            return attention(q, Keys(k, v, k_map=k_map, v_map=v_map), scale=0.3)

    with flash_on_cpu():
        check(run, lambda q, k, v: dense(q, k[:, k_map], v[:, v_map], 0.3), q, k, v)


def test_is_what_torch_calls_causal_lower_right() -> None:
    q, k, v = draw(2, 2, T, 8), draw(2, 2, S, 8), draw(2, 2, S, 8)
    want = scaled_dot_product_attention(q, k, v, causal_lower_right(T, S))
    with flash_on_cpu(), AsGpu():
        torch.testing.assert_close(last_queries(q, k, v, 8**-0.5), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_in_the_dtype_of_autocast(dtype: torch.dtype) -> None:
    """Values decide, as elsewhere; what comes back has their dtype."""
    q, k, v = draw(1, 2, T, 8, dtype=torch.float32), draw(1, 2, S, 8, dtype=torch.float32), draw(1, 2, S, 8)
    v = v.detach().to(dtype)
    cast = torch.autocast("cpu", torch.bfloat16)
    with (
        flash_on_cpu(),
        AsGpu(),
        cast,
        mock.patch.object(module, "takes", wraps=takes) as asked,
    ):
        o = attention(q, Keys(k, v))
    assert [z.dtype for z in asked.call_args.args] == [torch.bfloat16] * 3 and o.dtype == dtype
    want = dense(*(z.bfloat16().double() for z in (q, k, v)), 8**-0.5)
    torch.testing.assert_close(o.double(), want, rtol=2**-6, atol=2**-6)


def test_only_plain_causal_attention_of_aligned_keys_of_one_document_is_asked_for() -> None:
    q, k, v = draw(1, 2, T, 8), draw(1, 2, S, 8), draw(1, 2, S, 8)
    places, docs = torch.arange(S)[None], torch.tensor([[0] * 11 + [1] * 3])
    packed, query = Axis(places, docs), Axis(places[:, -T:], docs[:, -T:])
    with AsGpu() as gpu, flash_on_cpu() as calls:
        attention(q, Keys(k, v), mask=band(13))
        attention(q, Keys(k, v, aligned=False))
        attention(q, Keys(k, v, packed), query=query)
        attention(q, Keys(k, v), impl="reference")
        attention(q, Keys(k, v), also=("lse",))
        attention(q[:, :, -1:], Keys(k, v))
        attention(q, Keys(k[:, :, -T:], v[:, :, -T:]))
        assert gpu.asked == 0 and not calls
        attention(q, Keys(k, v))
    assert gpu.asked == 1 and calls[FLASH] == 1
    assert not takes(q, k, v), "a CPU has none"


@pytest.mark.parametrize("answer", [True, False])
def test_torch_decides_whether_it_takes_them(answer: bool) -> None:
    q, k, v, asked = draw(1, 4, T, 8), draw(1, 2, S, 8), draw(1, 2, S, 8), []

    def can(params: object) -> bool:
        asked.append((params.query.shape[1], params.key.shape[1], params.value.shape[1], params.enable_gqa))
        assert not params.is_causal and params.attn_mask is None
        return answer

    with mock.patch.object(module, "can_use_flash_attention", can):
        assert takes(q, k, v) == answer and asked == [(4, 2, 2, True)]
        assert takes(q, q, q) == answer and asked[1] == (4, 4, 4, False)
        with mock.patch.object(torch.version, "hip", "7.0"):
            assert not takes(q, k, v)


def test_a_table_is_made_where_it_does_not() -> None:
    q, k, v = draw(1, 4, T, 8), draw(1, 2, S, 8), draw(1, 2, S, 8)
    with AsGpu(False), flash_on_cpu() as calls:
        got = attention(q, Keys(k, v), scale=0.3)
    torch.testing.assert_close(got, dense(q, k, v, 0.3), rtol=1e-12, atol=1e-12)
    assert not calls


def test_operations_are_counted() -> None:
    q, k, v = draw(1, 4, T, 8), draw(1, 2, S, 8), draw(1, 2, S, 8)
    with flash_on_cpu(), FlopCounterMode(display=False) as counter, AsGpu():
        o = attention(q, Keys(k, v))
        ahead = counter.get_total_flops()
        o.sum().backward()
    assert ahead == 2 * 2 * 4 * T * S * 8 and counter.get_total_flops() == ahead * 3.5


@pytest.mark.parametrize("taken", [True, False])
def test_compiles_in_one_graph(taken: bool) -> None:
    q, k, v = (draw(1, n, m, 6, dtype=torch.float32) for n, m in ((4, T), (2, S), (2, S)))
    table = torch.ones(T, S, dtype=torch.bool).tril(S - T)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = last_queries(q, k, v, 0.3)
        o = scaled_dot_product_attention(q, k, v, table, scale=0.3, enable_gqa=True) if o is None else o
        return o[..., :6]

    torch._dynamo.reset()
    with (
        flash_on_cpu() as calls,
        mock.patch.object(torch._C, "_can_use_flash_attention", lambda params, debug: taken),
    ):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        check(compiled, lambda *z: dense(*z, 0.3), q, k, v, close=1e-5)
    assert sum(calls.values()) == 2 * taken


def build(name: str) -> attnzoo.model.LanguageModel:
    return attnzoo.create_model(name, vocab_size=17, dim=32, depth=2, num_heads=4).double()


@pytest.mark.parametrize("name", ["mha", "gqa", "mla", "cla"])
def test_prefill_in_chunks_is_one_forward(name: str) -> None:
    model, tokens = build(name), torch.randint(17, (2, 24))
    want, cache, outs = model(tokens), model.new_cache(2, 24), []
    with torch.no_grad(), flash_on_cpu() as calls, AsGpu() as gpu:
        for part in tokens.split([9, 4, 10, 1], dim=1):
            outs.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(outs, dim=1), want, rtol=1e-9, atol=1e-9)
    assert calls[FLASH] == gpu.asked == 2 * 2  # layers, chunks that are neither first nor one token


@pytest.mark.parametrize("name", ["mha", "gqa", "mla"])
def test_ranks_that_share_sequences_make_no_table(name: str) -> None:
    model, tokens = build(name), torch.randint(17, (2, 24))
    params, probe = list(model.parameters()), torch.randn(2, 24, 17, dtype=torch.float64)
    found = []
    for ranks in (1, 3):
        link = Successive()
        with flash_on_cpu() as calls, AsGpu(ranks > 1):
            spans = [Span(i, ranks, link.channel()) if ranks > 1 else None for i in range(ranks)]
            y = torch.cat([model(tokens, Context(span=span)) for span in spans], dim=1)
        with flash_on_cpu() as back:
            found.append([y, *torch.autograd.grad((y * probe).sum(), params)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert calls[FLASH] == sum(back.values()) == 2 * 2


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 2, 64, 64), (4, 4, 192, 128), (4, 1, 256, 128)], ids=str)
def test_the_kernel_itself(shape: tuple[int, int, int, int]) -> None:
    """As near to fp64 as the same precision with a table is, but for a rounding."""
    (H, G, d, d_v), scale = shape, shape[2] ** -0.5
    given = [draw(2, H, 77, d), draw(2, G, 333, d), draw(2, G, 333, d_v)]
    given = [z.detach().to("cuda", torch.bfloat16).requires_grad_() for z in given]
    exact = [z.detach().double().requires_grad_() for z in given]
    do = torch.randn(2, H, 77, d_v, device="cuda", dtype=torch.float64)
    table = torch.ones(77, 333, dtype=torch.bool, device="cuda").tril(333 - 77)

    def by_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, table, scale=scale, enable_gqa=True)

    def read(run: Callable, given: list[Tensor]) -> list[Tensor]:
        o = run(*given)
        return [o, *torch.autograd.grad(o, given, do.to(o.dtype))]

    with mock.patch.object(Causal, "visible", side_effect=AssertionError("a table")):
        found = read(lambda q, k, v: attention(q, Keys(k, v), scale=scale), given)
    want = read(lambda *z: dense(*z, scale), exact)
    same = read(by_table, given)
    for a, b, c in zip(found, want, same, strict=True):
        band = torch.finfo(torch.bfloat16).eps * b.abs().max()
        assert (a - b).abs().max() <= 2 * ((c - b).abs().max() + band)
