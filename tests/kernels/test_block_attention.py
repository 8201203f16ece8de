"""Attention to listed blocks: the reference against a dense mask, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from bounds import assert_within
from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.block_attention import block_attention
from attnzoo_kernels.span import Span

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not launch.has_triton(), reason="triton has no wheel here")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def operands(B: int = 2, H: int = 4, G: int = 2, T: int = 37, S: int = 37, d: int = 16, d_v: int = 8):
    return [draw(B, H, T, d), draw(B, G, S, d, seed=1), draw(B, G, S, d_v, seed=2)]


def lists(B: int, L: int, T: int, S: int, query_block: int, key_block: int, n: int) -> Tensor:
    """Some blocks of each list, in any order, some of them missing."""
    generator, number = torch.Generator().manual_seed(3), -(-S // key_block)
    shape = (B, L, -(-T // query_block), number)
    blocks = torch.rand(shape, generator=generator).argsort(-1)[..., :n]
    return blocks.masked_fill(torch.rand(blocks.shape, generator=generator) < 0.2, -1).int().to(DEVICE)


def dense(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, span: Span, query_block: int, key_block: int):
    """By a (B,H,T,S) table."""
    (B, H, T, d), S, L = q.shape, k.shape[2], blocks.shape[1]
    listed = torch.zeros(B, H, T, S, dtype=torch.bool, device=q.device)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for block in blocks[b, h // (H // L), t // query_block].tolist():
                    if block >= 0:
                        listed[b, h, t, block * key_block : (block + 1) * key_block] = True
    seen = listed & span.visible(S)
    group = H // k.shape[1]
    s = q @ k.repeat_interleave(group, 1).mT * d**-0.5
    p = s.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    lse = s.masked_fill(~seen, -torch.inf).logsumexp(-1)
    return p @ v.repeat_interleave(group, 1), lse


def spans(T: int = 37) -> dict[str, Span]:
    own = torch.arange(T, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    first = torch.zeros_like(own)
    first[0, 5:], first[0, 22:] = 5, 22
    own[1, T - 4 :] = -1
    return {
        "causal": Span.causal(T, T, torch.device(DEVICE)),
        "documents": Span(first, own),
        "window": Span(first, own, window=9, n_sink=2),
    }


@pytest.mark.parametrize("L", [2, 4])
@pytest.mark.parametrize("query_block", [1, 5, 8])
@pytest.mark.parametrize("span", spans())
def test_reference_matches_a_dense_mask(span: str, query_block: int, L: int, monkeypatch) -> None:
    import attnzoo_kernels.block_attention.reference as reference

    monkeypatch.setattr(reference, "GATHERED", 3 * 3 * 7 * 24)
    given, blocks = operands(), lists(2, L, 37, 37, query_block, 7, 3)
    sizes = {"query_block": query_block, "key_block": 7}
    o, lse = block_attention(*given, blocks, spans()[span], **sizes, return_lse=True)
    exact_o, exact_lse = dense(*given, blocks, spans()[span], **sizes)
    torch.testing.assert_close(o, exact_o)
    torch.testing.assert_close(lse, exact_lse)


@pytest.mark.parametrize("least", [1, 2048])
def test_gradcheck_of_the_reference(least: int, monkeypatch) -> None:
    import attnzoo_kernels.block_attention.reference as reference

    monkeypatch.setattr(reference, "LEAST_RECOMPUTED", least)
    given = [x.requires_grad_() for x in operands(T=9, S=9, d=3, d_v=2)]
    blocks = lists(2, 2, 9, 9, 2, 3, 2)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = block_attention(*x, blocks, spans(9)["causal"], query_block=2, key_block=3, return_lse=True)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, given)


def test_all_blocks_are_plain_attention() -> None:
    q, k, v = operands()
    blocks = torch.arange(5, device=DEVICE).expand(2, 2, 5, 5)
    got = block_attention(q, k, v, blocks, spans()["causal"], query_block=8, key_block=8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected)


@pytest.fixture
def poison(monkeypatch) -> None:
    import attnzoo_kernels.block_attention.ops as ops

    monkeypatch.setattr(
        ops, "_empty", lambda like, shape, dtype: like.new_full(shape, torch.nan, dtype=dtype)
    )


def compare(given, blocks: Tensor, span: Span, dtype: torch.dtype = torch.float32, **sizes: int) -> None:
    """Values, log-sum-exps and every gradient."""
    do, dlse = draw(*given[0].shape[:3], given[2].shape[-1], seed=5), draw(*given[0].shape[:3], seed=6)

    def run(impl: str, wide: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.to(dtype).to(wide).detach().requires_grad_() for x in given]
        o, lse = block_attention(*leaves, blocks, span, **sizes, impl=impl, return_lse=True)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (o * do.to(dtype).to(o.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum()
        return {"o": o, "lse": lse} | dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), strict=True)
        )

    got, same, exact = run("triton", dtype), run("reference", dtype), run("reference", torch.float64)
    for name in exact:
        assert_within(name, got[name], same[name], exact[name])


@needs_triton
@pytest.mark.parametrize("L", [2, 4])
@pytest.mark.parametrize("query_block", [1, 8, 64])
@pytest.mark.parametrize("span", spans())
def test_spans(poison, span: str, query_block: int, L: int) -> None:
    blocks = lists(2, L, 37, 37, query_block, 16, 2)
    compare(operands(), blocks, spans()[span], query_block=query_block, key_block=16)


@needs_triton
@pytest.mark.parametrize(
    ("H", "G", "L", "T", "S", "d", "d_v", "query_block", "key_block"),
    [(1, 1, 1, 1, 1, 16, 16, 1, 16), (6, 2, 2, 9, 50, 20, 12, 4, 16), (8, 1, 1, 33, 33, 64, 32, 2, 32),
     (2, 2, 2, 130, 130, 32, 64, 128, 64), (4, 2, 4, 40, 70, 128, 128, 16, 32)],
)  # fmt: skip
def test_shapes(poison, H, G, L, T, S, d, d_v, query_block, key_block) -> None:
    blocks = lists(2, L, T, S, query_block, key_block, 3)
    span = Span.causal(T, S, torch.device(DEVICE))
    compare(operands(2, H, G, T, S, d, d_v), blocks, span, query_block=query_block, key_block=key_block)


@needs_triton
@pytest.mark.parametrize("query_block", [1, 16])
def test_bf16(poison, query_block: int) -> None:
    blocks = lists(2, 2, 37, 37, query_block, 16, 2)
    compare(operands(d=32), blocks, spans()["causal"], torch.bfloat16, query_block=query_block, key_block=16)


@needs_triton
@pytest.mark.parametrize("size", [0.0, 30.0])
def test_extreme_scores(poison, size: float) -> None:
    q, k, v = operands()
    compare([size * q, k, v], lists(2, 4, 37, 37, 8, 16, 2), spans()["causal"], query_block=8, key_block=16)


@needs_triton
def test_nothing_listed(poison) -> None:
    blocks = torch.full((2, 2, 5, 2), -1, device=DEVICE)
    q, k, v = (x.float().requires_grad_() for x in operands())
    o, lse = block_attention(
        q, k, v, blocks, spans()["causal"], query_block=8, key_block=16, impl="triton", return_lse=True
    )
    assert (o == 0).all() and (lse == -torch.inf).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(o.sum(), (q, k, v)))


@needs_triton
def test_opcheck_and_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from attnzoo_kernels.block_attention.ops import block_attention_backward, block_attention_forward

    q, k, v = (x.float().requires_grad_() for x in operands(T=9, S=9))
    span = spans(9)["window"]
    args = (q, k, v, lists(2, 2, 9, 9, 4, 16, 1), span.own, span.first, 5, 1, 4, 16, 0.25)
    torch.library.opcheck(block_attention_forward, args)
    with FlopCounterMode(display=False) as counter:
        o, lse = block_attention_forward(*args)
        o.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 4 * 9 * 16 * (16 + 8 + 4 * 16 + 3 * 8)
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(
        block_attention_backward,
        (torch.ones_like(o), None, o.detach(), lse.detach(), *plain),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_work_is_that_of_the_lists() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    found = []
    for T in (2048, 4096):
        q, k, v = (torch.randn(1, 1, T, 16, device=DEVICE) for _ in range(3))
        blocks = lists(1, 1, T, T, 64, 64, 4)
        with FlopCounterMode(display=False) as counter:
            block_attention(
                q, k, v, blocks, Span.causal(T, T, torch.device(DEVICE)), query_block=64, key_block=64,
                impl="reference",
            )  # fmt: skip
        found.append(counter.get_total_flops())
    assert found[1] == 2 * found[0] == 2 * 2 * 2048 * 256 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 9, 16)}, "q: needs 4 axes"),
        ({"k": torch.zeros(1, 2, 9, 8)}, "k: needs shape"),
        ({"v": torch.zeros(1, 2, 9, 16).half()}, "v: needs q's dtype"),
        ({"blocks": torch.zeros(1, 2, 4, 1).int()}, "blocks: needs shape"),
        ({"blocks": torch.zeros(1, 3, 3, 1).int()}, "blocks: needs a number of lists"),
        ({"blocks": torch.zeros(1, 2, 3, 1)}, "blocks: needs int32 or int64"),
        ({"blocks": torch.full((1, 2, 3, 1), 1)}, "blocks: indices lie between -1 and 0, got 1"),
        ({"blocks": torch.zeros(1, 2, 3, 2).int()}, "blocks: a list names a block twice"),
        ({"query_block": 0}, "query_block: needs an integer"),
        ({"key_block": 2.0}, "key_block: needs an integer"),
        ({"impl": "sparse"}, "impl: needs one of"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    x = torch.zeros(1, 2, 9, 16)
    good = {
        "q": torch.zeros(1, 4, 9, 16), "k": x, "v": x, "blocks": torch.zeros(1, 2, 3, 1).int(),
        "span": Span.causal(9, 9, torch.device("cpu")), "query_block": 4, "key_block": 16,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        block_attention(**(good | change))


@needs_triton
def test_what_the_kernels_refuse() -> None:
    q, k, v = (x.float() for x in operands())
    span = spans()["causal"]
    for sizes, message in (((3, 16), "a power of 2"), ((8, 24), "16, 32, 64 or 128 tokens, got 24")):
        blocks = lists(2, 2, 37, 37, *sizes, 1)
        with pytest.raises(ValueError, match=message):
            block_attention(q, k, v, blocks, span, query_block=sizes[0], key_block=sizes[1], impl="triton")
