"""kv_shift and kvt: identities, loops over their equations; and what the sharing family refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_sharing import accepts, attend, build, each_row, heads_of, refuses
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.attention.score import Single
from oracles import causal, rotate, softmax_rows
from tiny import D, H, T, d, same, tokens, with_weights_of


@pytest.mark.parametrize("sides", ["kv", "k", "v"])
def test_kv_shift_mixes_with_the_token_before(sides: str) -> None:
    mixer = build("kv_shift", num_kv_heads=2, shift_k="k" in sides, shift_v="v" in sides)
    blocks, mix = heads_of(mixer.project.qkv_proj.weight, H + 4), dict(mixer.refine[0].named_parameters())

    def shifted(z: Tensor, name: str, g: int) -> Tensor:
        if f"{name}1" not in mix:
            return z
        return torch.stack(
            [mix[f"{name}1"][g] * z[t] + (mix[f"{name}2"][g] * z[t - 1] if t else 0) for t in range(len(z))]
        )

    def one(x: Tensor) -> Tensor:
        k = [shifted(x @ blocks[H + g], "alpha", g) for g in (0, 0, 1, 1)]
        v = [shifted(x @ blocks[H + 2 + g], "beta", g) for g in (0, 0, 1, 1)]
        return attend([x @ W for W in blocks[:H]], k, v)

    each_row(mixer, one)
    assert len(mix) == 2 * len(sides)


def test_kv_shift_starts_between_its_own_and_the_last_token() -> None:
    weights = dict(attnzoo.create("kv_shift", 64, 32).refine[0].named_parameters())
    for name in ("alpha", "beta"):
        assert torch.equal(weights[f"{name}1"] + weights[f"{name}2"], torch.ones(32))
        assert 0.2 < weights[f"{name}1"].std() < 0.4
    mixer = attnzoo.create("kv_shift", D, H, num_kv_heads=2, shift_init="identity").double()
    same(with_weights_of(mixer, build("gqa", num_kv_heads=2))(x := tokens()), mixer(x))


def test_kv_shift_is_an_induction_head() -> None:
    """One layer, keys of the token before: a repeated token reads what followed it the first time."""
    mixer = build("kv_shift", 8, 1, pos="none", shift_init="identity")
    eye, stage = torch.eye(8).double(), mixer.refine[0]
    mixer.project.qkv_proj.weight.copy_(torch.cat([400 * eye, eye, eye]))
    mixer.out.out_proj.weight.copy_(eye)
    for name, value in (("alpha1", 0.0), ("alpha2", 1.0), ("beta1", 1.0), ("beta2", 0.0)):
        getattr(stage, name).fill_(value)
    text = torch.tensor([3, 1, 4, 0, 5, 2, 6, 4])
    y = mixer(eye[text][None])
    assert y[0, -1].argmax() == 0 and y[0, -1, 0] > 0.99  # 4 was followed by 0


def test_kv_shift_under_a_scan_and_a_ring() -> None:
    for name, options in (("linear", {"num_kv_heads": 2}), ("gated_deltanet", {}), ("mqa", {"window": 3})):
        mixer, x = build(name, add=("kv_shift",), **options), tokens()
        cache = mixer.new_cache(2, T)
        same(torch.cat([mixer(part, cache=cache) for part in x.split([4, 1, 1, 3], 1)], 1), mixer(x))
        assert float((build(name, add=("kv_shift",), **options)(x) - mixer(x)).abs().max()) > 0


# kvt


def code(pos: int, half: int) -> Tensor:
    """``(p/2,)``, sine and cosine in turn."""
    angles = [pos * 10000.0 ** (-2 * m / half) for m in range(half // 2)]
    return torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)], dtype=torch.float64)


@pytest.mark.parametrize("pos", ["rope", "none"])
@pytest.mark.parametrize("size", [4, 12])
def test_kvt_key_position_bias_is_the_published_map(size: int, pos: str) -> None:
    """The whole P(i, j) = [P_i ; P_j] and a constant, of which the softmax keeps the key's part only."""
    mixer = build("kvt", kv_variant="kv_pos", pos_dim=size, pos=pos)
    a, blocks, half = mixer.position.a, heads_of(mixer.project.kv_proj.weight, 2 * H), size // 2
    theta = 1e4 if pos == "rope" else None

    def one(x: Tensor) -> Tensor:
        outs = []
        for h in range(H):
            k = rotate(x @ blocks[h], theta)
            s = k @ k.T / d**0.5
            for i in range(len(x)):
                for j in range(i + 1):
                    both = torch.cat([code(i, half), code(j, half)])
                    s[i, j] = (a[h] * (s[i, j] + both)).sum() + 0.7 if i != j else s[i, j]
                both = torch.cat([code(i, half), code(i, half)])
                s[i, i] = (a[h] * (s[i, i] + both)).sum() + 0.7
            outs.append(softmax_rows(s, causal(len(x))) @ (x @ blocks[H + h]))
        return torch.cat(outs, dim=1)

    each_row(mixer, one)


class Scores(Single):
    """The plain read, which keeps the scores before the mask."""

    def forward(self, q: Tensor, keys: Any, attend: Any, call: Any) -> Tensor:
        self.s = q @ keys.k.mT
        return attend(q, keys)


@pytest.mark.parametrize("pos", ["rope", "none"])
def test_kvt_scores_are_symmetric_with_rope_too(pos: str) -> None:
    mixer = build("kvt", pos=pos)
    mixer.read = Scores()
    mixer(x := tokens())
    same(mixer.read.s, mixer.read.s.mT)
    mha = build("mha", pos=pos)
    k, v = mixer.project.kv_proj.weight.chunk(2)
    mha.project.qkv_proj.weight.copy_(torch.cat([k, k, v]))
    mha.out.load_state_dict(mixer.out.state_dict())
    same(mha(x), mixer(x))
    assert mixer.cost(32).params == 3 * D * H * d


@pytest.mark.parametrize("pos", ["rope", "none"])
def test_kvt_tokens_start_out_reading_themselves(pos: str) -> None:
    mixer = build("kvt", pos=pos)
    mixer.read = Scores()
    mixer.project.kv_proj.weight[:D].copy_(torch.eye(D))
    # keys are the tokens' parts, all of one length
    mixer(torch.nn.functional.normalize(tokens().unflatten(-1, (H, d)), dim=-1).flatten(-2))
    s = mixer.read.s
    assert (s.diagonal(dim1=2, dim2=3) >= s.amax(-1) - 1e-12).all() and (s.amin(-1) < s.amax(-1)).all()


def test_kvt_without_a_bias_of_places_is_the_plain_one() -> None:
    mixer, plain, x = build("kvt", kv_variant="kv_pos", pos_dim=8), build("kvt"), tokens()
    mixer.position.a[:, :4], mixer.position.a[:, 4:] = 1 / 4, 0.0
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("position")})
    same(mixer(x), plain(x))


def test_kvt_bias_goes_with_positions_and_long_sequences() -> None:
    mixer, x = build("kvt", kv_variant="kv_pos", pos="none"), tokens(2, 90, D)
    reference = with_weights_of(mixer, build("kvt", kv_variant="kv_pos", pos="none", impl="reference"))
    reference.load_state_dict(mixer.state_dict())
    positions = torch.randint(0, 50, (2, 90))
    for ctx in (Context(), Context(positions=positions)):
        leaf = x.clone().requires_grad_()
        y = mixer(leaf, ctx)
        same(y, reference(x, ctx))
        y.sum().backward()
        assert leaf.grad.isfinite().all()
    assert float((mixer(x, Context(positions=positions)) - mixer(x)).abs().max()) > 1e-3
    fresh = attnzoo.create("kvt", D, H, kv_variant="kv_pos").position.a
    torch.testing.assert_close(fresh.sum(1), torch.ones(H))  # gamma


# refusals of the family

SIX = {"num_heads": 6, "head_dim": 4}
REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    ("wgqa", {"num_kv_heads": 3}, "num_kv_heads", 3),
    ("wgqa", {"weight_kind": "matrix"}, "weight_kind", "matrix"),
    ("wgqa", {"weight_init": "zero"}, "weight_init", "zero"),
    ("diffqkv", {"add": ("wgqa",)}, "num_v_heads", 2),
    ("mla", {"add": ("wgqa",)}, "add", "project"),
    ("gated_deltanet", {"add": ("wgqa",)}, "add", "refine"),
    ("gated_deltanet", {"add": ("sqa",)}, "add", "refine"),
    ("sqa", {"num_query_heads": 3, "num_kv_heads": 2}, "num_query_heads", 3),
    ("sqa", {"num_query_heads": 0}, "num_query_heads", 0),
    ("sqa", {"num_query_heads": 5}, "num_query_heads", 5),
    ("sqa", {"num_kv_heads": 8}, "num_kv_heads", 8),
    ("sqa", SIX | {"setting": "xsqa"}, "setting", 6),
    ("sqa", {"setting": "qsqa"}, "setting", "qsqa"),
    ("sqa", {"num_heads": 3}, "dim", D),
    ("fixed_head_size", {"head_dim": 5}, "head_dim", 5),
    ("fixed_head_size", {"head_dim": 320}, "head_dim", 320),
    ("fixed_head_size", {"head_dim": None}, "head_dim", "null"),
    ("mla", {"add": ("fixed_head_size",)}, "head_dim", 64),
    ("diffqkv", {"num_key_heads": 3}, "num_key_heads", 3),
    ("diffqkv", {"num_key_heads": 0}, "num_key_heads", 0),
    ("diffqkv", {"num_value_heads": 3}, "num_value_heads", 3),
    ("diffqkv", SIX | {"num_key_heads": 2, "num_value_heads": 3}, "num_key_heads", 2),
    ("diffqkv", {"aug_dim": -1}, "aug_dim", -1),
    ("diffqkv", {"key_dim": 0}, "key_dim", 0),
    ("diffqkv", {"key_dim": 4}, "key_dim", 4),
    ("diffqkv", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("kv_shift", {"shift_k": False, "shift_v": False}, "shift_k", "false"),
    ("kv_shift", {"shift_init": "zero"}, "shift_init", "zero"),
    ("mla", {"add": ("kv_shift",)}, "add", "kv_shift"),
    ("diffqkv", {"key_dim": 2, "add": ("kv_shift",)}, "add", "kv_shift"),
    ("kvt", {"pos_dim": 10}, "pos_dim", 10),
    ("kvt", {"pos_dim": 0}, "pos_dim", 0),
    ("kvt", {"kv_variant": "qkv"}, "kv_variant", "qkv"),
    ("kvt", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("kvt", {"add": ("mqa",)}, "num_kv_heads", 1),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("wgqa", {"add": ("kha", "moh"), "num_kv_heads": 2, "window": 4, "n_sink": 1, "qk_norm": True}),
    ("wgqa", {"add": ("fixed_head_size",), "weight_kind": "col", "output_gate": "headwise"}),
    ("linear", {"add": ("wgqa",), "weight_kind": "row", "qkv_bias": True}),
    ("sqa", {"add": ("kv_shift", "moh"), "setting": "rsqa", "window": 4, "qk_norm": True, "qkv_bias": True}),
    ("sqa", {"add": ("kha", "wgqa"), "output_gate": "elementwise"}),
    ("linear", {"add": ("sqa",)}),
    ("linear", {"add": ("sqa", "kha"), "num_query_heads": 1, "num_kv_heads": 2}),
    ("fixed_head_size", {"head_dim": 264, "allow_slow": True, "add": ("sqa",)}),
    ("fixed_head_size", {"num_heads": 3, "num_kv_heads": 1, "head_dim": 6}),
    ("diffqkv", {"add": ("moh", "kha"), "kind": "linear", "key_dim": 2, "window": 3, "qk_norm": True}),
    ("diffqkv", {"add": ("kv_shift", "dcmha"), "expand_kv": True, "output_gate": "headwise"}),
    ("kvt", {"add": ("kha", "moh"), "kv_variant": "kv_pos", "window": 3, "n_sink": 2, "qk_norm": True}),
    ("kvt", {"add": ("kv_shift", "dcmha"), "kv_variant": "kv_pos", "qkv_bias": True}),
]


def named(cases: list) -> list[str]:
    return [f"{case[0]}-{'-'.join(f'{k}={v}' for k, v in case[1].items())}" for case in cases]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    refuses(name, options, field, value)


@pytest.mark.parametrize("name, options", ACCEPTED, ids=named(ACCEPTED))
def test_accepted(name: str, options: dict[str, Any]) -> None:
    accepts(name, options)
