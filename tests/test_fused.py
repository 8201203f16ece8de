"""The CPU's fast paths of training equal their plain definitions: values, every gradient, documents,
precision.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.attention.stages.mask import band
from attnzoo.attention.timeline import Axis
from attnzoo.ops import (
    Keys,
    attention,
    blends,
    conv,
    cumulative,
    fused,
    kept,
    seen,
    taylor,
    unit_heads,
    wedge,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def both(fast, plain, *leaves: Tensor) -> None:
    """Same values and gradients, in fp64."""
    got, want = fast(*leaves), plain(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    probe = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((y * probe).sum(), leaves) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_elementwise_steps_equal_their_twins() -> None:
    both(
        lambda x, g: fused.rms_norm(x, g, 1e-6),
        lambda x, g: fused.plain_rms_norm(x, g, 1e-6),
        draw(2, 5, 8),
        draw(8, seed=1),
    )
    both(fused.swiglu, fused.plain_swiglu, draw(2, 5, 8), draw(2, 5, 8, seed=1))
    angle = torch.randn(1, 7, 1, 3, dtype=torch.float64)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    both(lambda z: fused.rotate(z, cos, sin), lambda z: fused.plain_rotate(z, cos, sin), draw(2, 3, 7, 6))


def test_split_linear_is_the_layer() -> None:
    layer = nn.Linear(6, 9, bias=False).double()
    both(
        lambda x, _: torch.cat(fused.split_linear(layer, x, [2, 4, 3]), -1),
        lambda x, _: layer(x) + 0 * layer.weight.sum(),
        draw(2, 5, 6),
        layer.weight,
    )


@pytest.mark.parametrize("T", [1, 3, 9])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_causal_convolution(T: int, silu: bool, packed: bool, biased: bool) -> None:
    """Fewer tokens than taps, too; documents that end after each token, or after a few."""
    order = torch.stack([torch.arange(T) % 4, torch.arange(T) % 2]) if packed else None
    leaves = draw(2, T, 5), draw(5, 4, seed=1), draw(5, seed=2)
    both(
        lambda z, w, b: conv.causal_conv(z, w, b if biased else None, order, silu) + 0 * b,
        lambda z, w, b: conv.plain_causal_conv(z, w, b if biased else None, order, silu) + 0 * b,
        *leaves,
    )


def test_causal_convolution_of_low_precision_is_wide() -> None:
    z = draw(2, 5, 3, dtype=torch.bfloat16)
    taps = draw(3, 4, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv.causal_conv(z, taps, None, None, True)
        y.sum().backward()
    want = conv.plain_causal_conv(z.double(), taps.double(), None, None, True)
    assert y.dtype == taps.grad.dtype == torch.float32 and z.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)


def test_log_sum_exps_so_far() -> None:
    """Values far apart, and stretches of nothing: at the start, in the middle, all along."""
    both(cumulative.logcumsumexp, cumulative.plain_logcumsumexp, draw(2, 17, 3))
    z = 300 * draw(3, 17, 2).detach()
    z[0, :4], z[1], z[2, 5:9] = -torch.inf, -torch.inf, -torch.inf
    found = []
    for run in (
        cumulative.logcumsumexp,
        lambda z: torch.stack([z[:, : t + 1].logsumexp(1) for t in range(17)], 1),
    ):
        leaf = z.clone().requires_grad_()
        y = run(leaf)
        some = y.isfinite()
        found.append((y, torch.autograd.grad(y[some].sin().sum(), leaf)[0][some]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_planes() -> None:
    for r in (1, 2, 5):
        both(wedge.wedge, wedge.plain_wedge, draw(2, 3, r), draw(2, 3, r, seed=1))


def test_pairs_of_rows() -> None:
    for n in (1, 2, 5, 6):
        both(taylor.pairs, taylor.plain_pairs, draw(2, n, 3))


@pytest.mark.parametrize("squash", [False, True])
def test_heads_of_unit_length(squash: bool) -> None:
    s, gain = draw(2, 3, 4, 5), draw(3, seed=1)
    both(
        lambda s, gain: unit_heads.unit_heads(s, gain, 1e-3, squash),
        lambda s, gain: unit_heads.plain_unit_heads(s, gain, 1e-3, squash),
        s,
        gain,
    )
    zero = torch.zeros_like(s).requires_grad_()
    y = unit_heads.unit_heads(zero, gain, 1e-3, squash)
    assert torch.equal(torch.autograd.grad(y.sum(), zero)[0], gain[:, None, None].expand_as(s) / 1e-3)


@pytest.mark.parametrize("T", [1, 2, 17])
def test_softmax_as_a_recurrence(T: int) -> None:
    for i in range(2):
        both(
            lambda s, i=i: cumulative.softmax_steps(s)[i],
            lambda s, i=i: cumulative.plain_softmax_steps(s)[i],
            draw(2, T, 3),
        )


def test_blends() -> None:
    both(
        lambda x, other, mu: torch.stack(blends.blends(x, other, mu)),
        lambda x, other, mu: torch.stack(blends.plain_blends(x, other, mu)),
        *(draw(2, 5, 3), draw(2, 5, 3, seed=1), draw(4, 3, seed=2)),
    )


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("hidden", [0.0, float("inf"), float("nan")])
def test_softmax_over_what_is_seen(blind: bool, hidden: float) -> None:
    """Rows that see nothing; hidden scores that are infinite or no numbers."""
    visible = torch.ones(2, 1, 5, 7, dtype=torch.bool).tril(2)
    visible[1, :, 3] &= not blind
    s = draw(2, 3, 5, 7)
    both(
        lambda s: seen.softmax(s.masked_fill(~visible, hidden), visible),
        lambda s: seen.plain_softmax(s.masked_fill(~visible, hidden), visible),
        s,
    )
    p = seen.softmax(s.masked_fill(~visible, hidden), visible)
    assert bool((p[~visible.expand_as(p)] == 0).all())


def test_gradients_by_finite_differences() -> None:
    torch.autograd.gradcheck(lambda x, g: fused.rms_norm(x, g, 1e-6), (draw(3, 4), draw(4, seed=1)))
    torch.autograd.gradcheck(fused.swiglu, (draw(3, 4), draw(3, 4, seed=1)))
    layer = nn.Linear(4, 5, bias=False).double()
    torch.autograd.gradcheck(lambda x: fused.split_linear(layer, x, [2, 3]), (draw(1, 3, 4),))
    torch.autograd.gradcheck(
        lambda q, k, v: kept.kept_attention(q, k, v, 0.5),
        (draw(1, 2, 5, 3), draw(1, 1, 5, 3, seed=1), draw(1, 1, 5, 2, seed=2)),
    )


def test_a_hooked_layer_is_called() -> None:
    layer, seen = nn.Linear(4, 4, bias=False), []
    layer.register_forward_hook(lambda *args: seen.append(1))
    fused.split_linear(layer, torch.randn(1, 2, 4), [2, 2])
    assert seen == [1]


@pytest.mark.parametrize("length", [64, 65, 129, 200])
@pytest.mark.parametrize("heads, widths", [(4, (16, 16)), (2, (16, 24)), (1, (24, 20))])
@pytest.mark.parametrize("packed", [False, True])
def test_kept_weights_equal_the_reference(
    length: int, heads: int, widths: tuple[int, int], packed: bool
) -> None:
    q = draw(2, 4, length, widths[0])
    k, v = draw(2, heads, length, widths[0], seed=1), draw(2, heads, length, widths[1], seed=2)
    order, doc = torch.arange(length)[None], None
    if packed:
        cuts = torch.tensor([3, 4, length // 2])
        doc = (order[..., None] >= cuts).sum(-1)
        order = order - torch.cat([torch.zeros(1, dtype=torch.long), cuts])[doc]
    axis = Axis(order, doc)
    masks = [band()] if length <= 4 * sum(widths) else []
    for mask in [*masks, band(9, 2)]:
        both(
            lambda q, k, v, mask=mask: attention(q, Keys(k, v, axis), mask=mask, query=axis, impl="sdpa"),
            lambda q, k, v, mask=mask: attention(q, Keys(k, v, axis), mask=mask, query=axis,
            impl="reference"), q, k, v,
        )  # fmt: skip


def test_the_kept_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("attnzoo.ops.attention")  # the package's attribute is the function
    taken, whole = [], module.kept_attention
    monkeypatch.setattr(module, "kept_attention", lambda *args: (taken.append(1), whole(*args))[1])
    model = attnzoo.create_model("mha", vocab_size=9, dim=64, depth=1, num_heads=2)
    x = torch.randint(9, (1, 80))
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
    assert taken == [1], "in training and only there"


def test_no_gradient_to_the_future() -> None:
    q, k, v = draw(1, 2, 130, 16), draw(1, 2, 130, 16, seed=1), draw(1, 2, 130, 16, seed=2)
    for i in (0, 63, 127, 128):
        y = kept.kept_attention(q, k, v, 0.25)
        for grad in torch.autograd.grad(y[:, :, i].sum(), (q, k, v)):
            assert bool((grad[:, :, i + 1 :] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_round_no_worse_than_torch(dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of torch's kernel in the same precision, plus one rounding."""
    leaves = [draw(2, 4, 150, 32, seed=s) for s in range(3)]
    probe = torch.randn(2, 4, 150, 32, dtype=torch.float64)

    def run(read, dtype: torch.dtype) -> list[Tensor]:
        low = [z.detach().to(dtype).requires_grad_() for z in leaves]
        y = read(*low)
        return [y.detach(), *torch.autograd.grad((y * probe.to(dtype)).sum(), low)]

    def torch_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    want = run(torch_kernel, torch.float64)
    theirs = run(torch_kernel, dtype)
    ours = run(lambda q, k, v: kept.kept_attention(q, k, v, 32**-0.5), dtype)
    for exact, a, b in zip(want, ours, theirs, strict=True):
        band_ = torch.finfo(dtype).eps * exact.norm()
        assert (a.double() - exact).norm() <= 2 * (b.double() - exact).norm() + band_


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_training_at_length_equals_the_reference(name: str) -> None:
    """T above every threshold of a fast path, packed documents and padding included."""
    torch.manual_seed(0)
    fast = attnzoo.create(name, 64, 4).double()
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(0.1 * torch.randn_like(p))
    slow = attnzoo.create(name, 64, 4, impl="reference").double()
    slow.load_state_dict(fast.state_dict())
    ids = torch.cat(
        [torch.full((2, 70), 1), torch.full((2, 1), 2), torch.full((2, 60), 3), torch.zeros(2, 9)], 1
    ).long()
    for ctx in (None, attnzoo.Context(segment_ids=ids)):
        both(lambda x, ctx=ctx: fast(x, ctx), lambda x, ctx=ctx: slow(x, ctx), draw(2, 140, 64))


@pytest.mark.parametrize("name", ["mha", "sliding_window", "mla"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside autocast", "inside"])
def test_autocast_trains_packed_rows_within_its_rounding(name: str, inside: bool) -> None:
    """Scores stay fp32 whatever autocast would do to products, also where the backward pass runs under it."""
    torch.manual_seed(0)
    mixer = attnzoo.create(name, 64, 4)
    x, ids = torch.randn(2, 120, 64), torch.ones(2, 120, dtype=torch.long)
    ids[0, 40:], ids[1, 110:] = 2, 0

    def gradients(enabled: bool) -> Tensor:
        mixer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = mixer(x, attnzoo.Context(segment_ids=ids)).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in mixer.parameters()])

    exact, rounded = gradients(False), gradients(True)
    assert (rounded - exact).norm() <= 0.02 * exact.norm()
