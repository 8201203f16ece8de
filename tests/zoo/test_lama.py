"""Rank-one scores from the mean of a prefix against their equations, pair by pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.score import Single
from attnzoo.context import Context
from golden import load_spec_weights, spec_options
from oracles import attend, causal, out, split
from test_refusals import named, run
from tiny import D, H, T, build, same, tokens

GOLDEN = Path(__file__).parents[1] / "golden"

REFUSED = [
    ("lama", {"pos": "rope"}, "pos", "rope"),
    ("lama", {"qk_norm": True}, "qk_norm", "True"),
    ("lama", {"head_dim": 4}, "head_dim", 4),
    ("lama", {"v_head_dim": 0}, "v_head_dim", 0),
    ("lama", {"activation": "relu"}, "activation", "relu"),
    ("lama", {"add": ("dcmha",)}, "qk_norm", "dcmha"),
]


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: .{{15,}}") as caught:
        attnzoo.create(name, D, H, **options)
    assert str(value) in str(caught.value)


class Watched(Single):
    """The plain read, which keeps the weights."""

    def forward(self, q: Tensor, keys: Any, attend: Any, call: Any) -> Tensor:
        o, more = attend(q, keys, also=("p",))
        self.p = more["p"]
        return o


def test_lama_weights_are_the_pooler_on_every_prefix() -> None:
    file = torch.load(GOLDEN / "lama.op.pt", weights_only=True)
    x = file["x"]
    mixer = attnzoo.create("lama", x.shape[-1], **spec_options("lama", file["spec_options"])).double()
    weights = file["weights"] | {"W_v": torch.eye(32).double(), "W_o": torch.eye(32).double()}
    load_spec_weights(mixer, weights)
    mixer.read, mixer.score.eps = Watched(), 0.0  # the source's norm has no eps
    mixer(x)
    torch.testing.assert_close(mixer.read.p, file["extra"]["p"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"context": "self"},
        {"activation": "none", "v_head_dim": 3},
        {"head_l2norm": False},
        {"qkv_bias": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_lama_scores(options: dict[str, Any], groups: int) -> None:
    mixer, x = build("lama", num_kv_heads=groups, **options), tokens(1, T, D)
    f, lambdas = mixer.project, mixer.score.log_lambda
    for p in (lambdas, *(p for name, p in f.named_parameters() if "bias" in name)):
        p.normal_()
    outs, rows = [], x[0]
    for i in range(T):
        context = rows[i] if options.get("context") == "self" else rows[: i + 1].mean(0)
        a = torch.zeros(i + 1, H).double()
        for j in range(i + 1):
            for h in range(H):
                a[j, h] = f.p_proj(context)[h] * f.q_proj(rows[j])[h * groups // H]
            a[j] = a[j].tanh() if options.get("activation") != "none" else a[j]
            a[j] = a[j] / (a[j].pow(2).sum().sqrt() + 1e-6) if options.get("head_l2norm", True) else a[j]
        p = (a * lambdas.exp()).softmax(0)
        v = f.v_proj(rows[: i + 1]).unflatten(-1, (groups, -1)).repeat_interleave(H // groups, dim=1)
        outs.append(torch.einsum("jh,jhv->hv", p, v).flatten())
    same(mixer(x)[0], torch.stack(outs) @ mixer.out.out_proj.weight.T)
    same(run(mixer, x, [1, 4, 1, 3]), mixer(x))


def test_lama_context_is_a_prefix_mean_not_the_mean_of_the_sequence() -> None:
    mixer, x = build("lama"), tokens()
    other = torch.cat([x[:, :5], 7 * tokens(2, T - 5, D)], dim=1)
    assert torch.equal(mixer(x)[:, :5], mixer(other)[:, :5])
    packed = mixer(x, Context(segment_ids=torch.tensor([[1] * 5 + [2] * (T - 5)] * 2)))
    same(packed[:, 5:], mixer(x[:, 5:]))


def test_lama_without_lambda_is_the_mean_so_far() -> None:
    mixer, x = build("lama"), tokens()
    mixer.score.log_lambda.fill_(-800.0)
    v = mixer.project.v_proj(x).cumsum(1) / torch.arange(1, T + 1)[:, None]
    same(mixer(x), v @ mixer.out.out_proj.weight.T)


def test_lama_of_the_token_itself_is_attention_of_width_one() -> None:
    plain = {"activation": "none", "head_l2norm": False, "logit_scale": "fixed1"}
    mixer, x = build("lama", context="self", **plain), tokens()
    f = mixer.project
    w = {"W_q": f.p_proj.weight.T, "W_k": f.q_proj.weight.T, "W_v": f.v_proj.weight.T}
    w["W_o"] = mixer.out.out_proj.weight.T
    for row, y in zip(x, mixer(x), strict=True):
        q, k, v = (split(row @ w[f"W_{n}"], H) for n in "qkv")
        same(y, out(attend(q, k, v, causal(T)), w))
