"""spectformer and grassmann against loops over tokens, their identities; what they, mano and mega refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.attention.stages.long_conv import long_conv
from attnzoo.context import Context
from tiny import D, H, T, same, tokens

GOLDEN = Path(__file__).parent.parent / "golden"


def build(name: str, dim: int = D, heads: int = H, **options: Any) -> Mixer:
    """A mixer all of whose parameters matter."""
    mixer = attnzoo.create(name, dim, heads, **options).double().requires_grad_(False)
    for param in mixer.parameters():
        noise = torch.randn_like(param)
        param.copy_(param + 0.3 * noise if param.dim() < 2 else noise / param.shape[-1] ** 0.5)
    return mixer


def norm(z: Tensor, gain: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    z = z - z.mean(-1, keepdim=True)
    return z / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain + bias


def silu(z: Tensor) -> Tensor:
    return z / (1 + (-z).exp())


def affine(z: Tensor, layer: torch.nn.Linear) -> Tensor:
    return z @ layer.weight.T + (0.0 if layer.bias is None else layer.bias)


# spectformer


@pytest.mark.parametrize("length", [1, 5, 31, 33, 70, 131])
@pytest.mark.parametrize("taps", [1, 4, 32, 40, 200])
def test_long_convolution_at_documents(length: int, taps: int) -> None:
    z, kernel = tokens(2, length, 3), tokens(taps, 3)
    doc = (torch.rand(2, length) < 0.1).cumsum(1)
    for ids in (None, doc):
        want = torch.zeros_like(z)
        for t in range(length):
            for m in range(min(taps, t + 1)):
                mine = 1.0 if ids is None else (ids[:, t] == ids[:, t - m]).double()[:, None]
                want[:, t] += kernel[m] * z[:, t - m] * mine
        torch.testing.assert_close(long_conv(z, kernel, ids), want, rtol=1e-10, atol=1e-11)


def test_long_convolution_lets_nothing_flow_back() -> None:
    z, kernel = tokens(1, 150, 2).requires_grad_(), tokens(150, 2)
    y = long_conv(z, kernel, None)
    for i in (0, 31, 32, 63, 64, 100, 148):
        (grad,) = torch.autograd.grad(y[:, i].sum(), z, retain_graph=True)
        assert (grad[:, i + 1 :] == 0).all() and (grad[:, : i + 1] != 0).all()


@pytest.mark.parametrize("points", [12, 13, 40])
def test_spectformer_taps_are_a_fourier_sum(points: int) -> None:
    mixer, x = build("spectformer", filter_len=12, n_f=points), tokens(2, 30, D)
    W = torch.complex(*mixer.core.W_hat.unbind(-1))
    taps = torch.zeros(12, D).double()
    for m in range(12):
        for f in range(points // 2 + 1):
            weight = 1 if f == 0 or 2 * f == points else 2
            turn = 2 * math.pi * f * m / points
            wave = W[f].real * math.cos(turn) - W[f].imag * (math.sin(turn) if f else 0)
            taps[m] += weight * wave / points
    want = torch.zeros_like(x)
    for t in range(30):
        for m in range(min(12, t + 1)):
            want[:, t] += taps[m] * x[:, t - m]
    same(mixer(x), want)


def test_spectformer_is_a_linear_convolution_not_a_circular_one() -> None:
    mixer, x = build("spectformer", filter_len=T, n_f=T, max_seq_len=T), tokens()
    spectrum = torch.complex(*mixer.core.W_hat.unbind(-1))
    released = torch.fft.irfft(torch.fft.rfft(x, dim=1) * spectrum, T, dim=1)
    same(mixer(x)[:, -1], released[:, -1])  # the last token's past is the whole circle
    assert (mixer(x)[:, 0] - released[:, 0]).abs().max() > 1e-3


def test_spectformer_layers() -> None:
    kinds = [type(attnzoo.create("spectformer", D, H, num_layers=7, layer_idx=i)).__name__ for i in range(7)]
    assert kinds == ["OwnAttention"] * 2 + ["ScoreAttention"] * 5
    plain, mha = build("spectformer", alpha=0), build("mha")
    mha.load_state_dict(plain.state_dict())
    x = tokens()
    same(plain(x), mha(x))


def test_spectformer_blocks_with_a_single_residual() -> None:
    """The published block: filter, then MLP, and one residual around both; the other layers keep two."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "dim": D, "depth": 2, "num_heads": H, "alpha": 1, "filter_len": 8}
    model = attnzoo.create_model("spectformer", spectral_single_residual=True, **sizes).double()
    first, second = model.blocks
    assert (first.mixer.single_residual, second.mixer.single_residual) == (True, False)
    with torch.no_grad():
        first.mixer.core.W_hat.normal_()
    ids = torch.randint(9, (2, T))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    model(ids)
    h, out = seen[:2]
    want = h + first.mlp(first.mlp_norm(first.mixer(first.mixer_norm(h))))
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
    middle = out + second.mixer(second.mixer_norm(out))
    torch.testing.assert_close(seen[3], middle + second.mlp(second.mlp_norm(middle)), rtol=1e-10, atol=1e-12)
    assert not attnzoo.create_model("spectformer", **sizes).blocks[0].mixer.single_residual


def test_spectformer_with_one_tap_is_the_identity() -> None:
    mixer, x = build("spectformer", filter_len=8), tokens()
    mixer.core.W_hat.copy_(torch.tensor([1.0, 0.0]).expand_as(mixer.core.W_hat))
    same(mixer(x), x)


def test_sequences_beyond_the_filter_or_the_table_are_refused() -> None:
    for name in ("spectformer", "mega"):
        mixer = build(name, max_seq_len=12)
        mixer(tokens(2, 12, D))
        with pytest.raises(ValueError, match=r"max_seq_len: .*13 tokens.*room for 12"):
            mixer(tokens(2, 13, D))
        cache = mixer.new_cache(2, 40)
        mixer(tokens(2, 12, D), cache=cache)
        with pytest.raises(ValueError, match=r"max_seq_len: .*13 tokens.*room for 12"):
            mixer(tokens(2, 1, D), cache=cache)
        ids = torch.arange(20).expand(2, -1) // 10 + 1
        mixer(tokens(2, 20, D), Context(segment_ids=ids))  # each document fits
    build("spectformer", max_seq_len=12, filter_len=6)(tokens(2, 30, D))


# grassmann


@pytest.mark.parametrize("lags", [(1, 2, 4), (4, 1), (3,)])
def test_grassmann_by_its_definition(lags: tuple[int, ...]) -> None:
    mixer, x = build("grassmann", rank=4, lags=lags), tokens()
    core, want = mixer.core, torch.zeros_like(tokens())
    for b in range(len(x)):
        z = affine(x[b], core.reduce)
        for t in range(T):
            planes = []
            for lag in lags:
                if t >= lag:
                    wedge = torch.outer(z[t], z[t - lag]) - torch.outer(z[t - lag], z[t])
                    p = torch.stack([wedge[i, j] for i in range(4) for j in range(i + 1, 4)])
                    planes.append(p / max(float(p.norm()), 1e-6))
            g = affine(torch.stack(planes).mean(0), core.plane) if planes else torch.zeros(D).double()
            a = torch.sigmoid(affine(torch.cat([x[b, t], g]), core.blend))
            want[b, t] = a * x[b, t] + (1 - a) * g
    same(mixer(x), want)


def test_grassmann_planes() -> None:
    mixer, x = build("grassmann", rank=4, lags=(1,)), tokens(1, 2, D)
    swapped = x.flip(1)
    mean = lambda z: mixer.core._mean(torch.nn.functional.pad(z, (0, 0, 1, 0)), torch.arange(2)[None])[0, 1]  # noqa: E731
    z = affine(x, mixer.core.reduce)
    same(mean(z), -mean(affine(swapped, mixer.core.reduce)))
    assert float(mean(torch.stack([z[:, 0], 2 * z[:, 0]], dim=1)).abs().max()) < 1e-9, "no plane"
    other = torch.stack([3 * z[:, 0], z[:, 1] + 2 * z[:, 0]], dim=1)  # another basis of the same plane
    same(mean(other), mean(z))


def test_grassmann_lags() -> None:
    for layers, want in ((12, [1, 1, 2, 2, 4, 4, 8, 8, 12, 12, 16, 16]), (3, [1, 4, 12])):
        for i in range(layers):
            mixer = build("grassmann", lag_per_layer=True, num_layers=layers, layer_idx=i)
            assert mixer.core.lags == (want[i],)
    one, other, x = build("grassmann", lags=(1, 3, 4)), build("grassmann", lags=(4, 1, 3)), tokens()
    other.load_state_dict(one.state_dict())
    same(one(x), other(x))


def test_grassmann_reaches_as_far_as_its_layers_add_up() -> None:
    first, second = (build("grassmann", rank=4, lags=lags) for lags in ((1, 3), (2, 4)))
    x = tokens().requires_grad_()
    (grad,) = torch.autograd.grad(second(first(x))[:, T - 1].sum(), x)
    seen = grad.abs().amax((0, 2)) > 0
    reach = {0} | {a + b for a in (0, 1, 3) for b in (0, 2, 4)}
    assert [T - 1 - t for t in range(T) if seen[t]] == sorted((n for n in reach if n < T), reverse=True)


def test_grassmann_without_residual_leaves_the_norm_in_the_stream() -> None:
    mixer, plain = build("grassmann", residual=False), build("grassmann")
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k.startswith("core")})
    x, stream = tokens(), tokens()
    after = mixer.after[0]
    same(stream + mixer(x, Context(residual=stream)), norm(plain(x), after.gain, after.bias))


REFUSED = [
    ("mano", {"rate": 1}, "rate", 1),
    ("mano", {"window": 0}, "window", 0),
    ("mano", {"levels": 0}, "levels", 0),
    ("mano", {"levels": 3, "window": 4, "max_seq_len": 15}, "levels", 16),
    ("mano", {"out_bias": True}, "out_bias", True),
    ("mano", {"impl": "flex"}, "impl", "flex"),
    ("mega", {"z_dim": 0}, "z_dim", 0),
    ("mega", {"h_dim": 0}, "h_dim", 0),
    ("mega", {"ema_dim": 0}, "ema_dim", 0),
    ("mega", {"attn_chunk": 0}, "attn_chunk", 0),
    ("mega", {"z_dim": 3, "rel_pos_bias": "rotary"}, "z_dim", 3),
    ("mega", {"attn_act": "relu"}, "attn_act", "relu"),
    ("mega", {"impl": "sdpa"}, "impl", "sdpa"),
    ("mega", {"out_bias": True}, "out_bias", True),
    ("spectformer", {"alpha": -1}, "alpha", -1),
    ("spectformer", {"filter_len": 0}, "filter_len", 0),
    ("spectformer", {"filter_len": 9, "max_seq_len": 8}, "filter_len", 9),
    ("spectformer", {"filter_len": 9, "n_f": 8}, "n_f", 8),
    ("spectformer", {"init_std": 0.0}, "init_std", 0.0),
    ("spectformer", {"out_bias": True}, "out_bias", "true"),
    ("grassmann", {"rank": 1}, "rank", 1),
    ("grassmann", {"lags": ()}, "lags", "[]"),
    ("grassmann", {"lags": (1, 0)}, "lags", 0),
    ("grassmann", {"lags": (2, 2)}, "lags", 2),
    ("grassmann", {"out_bias": True}, "out_bias", True),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=str)
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        attnzoo.create(name, D, H, **options)
    assert str(caught.value).startswith(f"{field}: ") and str(value) in str(caught.value)


def test_grassmann_gradients_stay_small_where_tokens_repeat() -> None:
    """Beside equal tokens the direction of a plane changes without bound; text is full of them."""
    torch.manual_seed(0)
    mixer = attnzoo.create("grassmann", 32, 4, rank=8)
    word = torch.randn(1, 4, 32).repeat(1, 6, 1)
    for noise in (0.0, 1e-7, 1e-5, 1e-3):
        x = (word + noise * torch.randn_like(word)).requires_grad_()
        mixer(x).square().sum().backward()
        assert x.grad.norm() < 100, noise
