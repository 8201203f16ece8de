"""What construction refuses, with the field, the rule and the value; and the compositions that must work."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.context import Collector, Context

D, H, T = 32, 4, 9

REFUSED: list[tuple[str, dict[str, Any], str, object]] = [
    # (variant, options, field that the message opens with, value that it quotes)
    ("mha", {"num_heads": 0}, "num_heads", 0),
    ("mha", {"num_heads": 3}, "dim", D),
    ("mha", {"head_dim": 5}, "head_dim", 5),
    ("mha", {"head_dim": 0, "pos": "none"}, "head_dim", 0),
    ("mha", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("mha", {"pos": "alibi"}, "pos", "alibi"),
    ("mha", {"rope_theta": 0.0}, "rope_theta", 0.0),
    ("mha", {"qkv_bias": "yes"}, "qkv_bias", "yes"),
    ("mha", {"output_gate": "tokenwise"}, "output_gate", "tokenwise"),
    ("mqa", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("gqa", {"num_kv_heads": 0}, "num_kv_heads", 0),
    ("gqa", {"num_kv_heads": 3}, "num_kv_heads", 3),
    ("gqa", {"num_kv_heads": 8}, "num_kv_heads", 8),
    ("mla", {"qk_rope_head_dim": 3}, "qk_rope_head_dim", 3),
    ("mla", {"qk_rope_head_dim": 0}, "qk_rope_head_dim", 0),
    ("mla", {"qk_rope_head_dim": 4, "pos": "none"}, "qk_rope_head_dim", 4),
    ("mla", {"kv_lora_rank": H * 16}, "kv_lora_rank", H * 16),
    ("mla", {"kv_lora_rank": 0}, "kv_lora_rank", 0),
    ("mla", {"q_lora_rank": -1}, "q_lora_rank", -1),
    ("mla", {"v_head_dim": 0}, "v_head_dim", 0),
    ("mla", {"head_dim": 8}, "head_dim", 8),
    ("mla", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("kha", {"targets": []}, "targets", []),
    ("kha", {"targets": ["q", "x"]}, "targets", "x"),
    ("kha", {"targets": ["v", "v"]}, "targets", "v"),
    ("kha", {"kind": "affine"}, "kind", "affine"),
    ("dcmha", {"num_kv_heads": 2}, "num_kv_heads", 2),
    ("dcmha", {"pre_compose": False, "post_compose": False}, "pre_compose", "false"),
    ("dcmha", {"query_wise": False, "key_wise": False, "static_proj": False}, "static_proj", "false"),
    ("dcmha", {"rank": 0}, "rank", 0),
    ("dcmha", {"hidden_mult": 0}, "hidden_mult", 0),
    ("moh", {"shared_heads": 2, "active_heads": 1}, "active_heads", 1),
    ("moh", {"shared_heads": 2, "active_heads": 5}, "active_heads", 5),
    ("moh", {"shared_heads": 5}, "shared_heads", 5),
    ("moh", {"shared_heads": 0, "active_heads": 0}, "active_heads", 0),
    ("moh", {"shared_heads": 2, "active_heads": 2}, "active_heads", 2),
    ("moh", {"shared_heads": 3, "active_heads": 4, "router": "qnorm"}, "router", 1),
    ("moh", {"aux_weight": -0.5}, "aux_weight", -0.5),
    ("sliding_window", {"window": 0}, "window", 0),
    ("sliding_window", {"window": None}, "window", "null"),
    ("sliding_window", {"n_sink": -1}, "n_sink", -1),
    ("mha", {"n_sink": 2}, "n_sink", 2),
    ("linear", {"feature_map": "identity"}, "normalize", "identity"),
    ("linear", {"feature_map": "hadamard", "normalize": True}, "normalize", "hadamard"),
    ("linear", {"feature_map": "dpfp", "nu": 0}, "nu", 0),
    ("linear", {"feature_map": "taylor"}, "feature_map", "taylor"),
    ("linear", {"num_kv_heads": 3}, "num_kv_heads", 3),
    ("linear", {"chunk_size": 0}, "chunk_size", 0),
    ("gated_deltanet", {"head_dim": 6, "expand_v": 1.3}, "expand_v", 1.3),
    ("gated_deltanet", {"num_v_heads": 6}, "num_v_heads", 6),
    ("gated_deltanet", {"num_v_heads": 2}, "num_v_heads", 2),
    ("gated_deltanet", {"conv_kernel": 0}, "conv_kernel", 0),
    # options of another variant, or of none
    ("mha", {"kv_lora_rank": 8}, "option", "kv_lora_rank"),
    ("linear", {"window": 4}, "window", 4),
    ("gated_deltanet", {"n_sink": 2}, "n_sink", 2),
    ("gqa", {"moh.shared_heads": 1}, "option", "moh.shared_heads"),
    ("gqa", {"add": "moh", "moh.rank": 1}, "option", "moh.rank"),
    # compositions without a meaning
    ("mla", {"add": ("kha",), "kind": "mlp"}, "kind", "mlp"),
    ("mla", {"add": ("kha",), "kind": "gate"}, "kind", "gate"),
    ("kha", {"add": ("mla",)}, "kind", "mlp"),
    ("mla", {"add": ("gqa",)}, "num_kv_heads", 1),
    ("mqa", {"add": ("mla",)}, "num_kv_heads", 1),
    ("mha", {"add": ("mqa",)}, "num_kv_heads", 1),
    ("dcmha", {"add": ("mqa",)}, "num_kv_heads", 1),
    ("mla", {"add": ("moh",), "router": "qnorm"}, "router", "qnorm"),
    ("gated_deltanet", {"add": ("moh",), "router": "qnorm", "num_v_heads": 8}, "router", "qnorm"),
    ("gated_deltanet", {"add": ("linear",)}, "add", "gated_deltanet"),
    ("linear", {"add": ("gated_deltanet",), "normalize": False}, "add", "gated_deltanet"),
    ("linear", {"add": ("dcmha",)}, "add", "dcmha"),
    ("gated_deltanet", {"add": ("sliding_window",)}, "add", "sliding_window"),
    ("gqa", {"add": ("linear",)}, "add", "linear"),
    ("gqa", {"add": ("gqa",)}, "add", "gqa"),
    ("gqa", {"add": ("moh", "moh")}, "add", "moh"),
    ("gqa", {"add": ("mho",)}, "variant", "mho"),
]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("kha", {"num_kv_heads": 2, "window": 256}),
    ("kha", {"num_kv_heads": 2, "window": 4}),
    ("mla", {"add": ("moh",)}),
    ("mla", {"add": "moh", "moh.shared_heads": 2, "active_heads": 3}),
    ("mla", {"add": ["moh"], "moh": {"shared_heads": 2, "gate_form": "paper"}}),
    ("mla", {"window": 4, "n_sink": 2}),
    ("mla", {"add": ("kha", "dcmha"), "kind": "linear", "qk_norm": False}),
    ("mla", {"output_gate": "elementwise", "v_head_dim": 6}),
    ("mla", {"kv_lora_rank": H * 16, "allow_expand": True}),
    ("gqa", {"output_gate": "headwise"}),
    ("gqa", {"add": ("kha", "moh"), "num_kv_heads": 2, "window": 4, "router": "qnorm"}),
    ("mqa", {"add": ("sliding_window",), "window": 3}),
    ("sliding_window", {"add": ("dcmha",), "window": 3, "n_sink": 1}),
    ("dcmha", {"num_kv_heads": 2, "expand_kv": True}),
    ("moh", {"shared_heads": 2, "active_heads": 2, "allow_dead": True}),
    ("moh", {"shared_heads": 2, "active_heads": 2, "allow_dead": True, "router": "qnorm"}),
    ("moh", {"num_heads": 1}),
    ("linear", {"num_kv_heads": 2}),
    ("linear", {"add": ("kha", "moh"), "num_kv_heads": 1, "output_gate": "headwise", "normalize": False}),
    ("gated_deltanet", {"add": ("moh",)}),
    ("gated_deltanet", {"add": ("moh", "kha"), "num_v_heads": 8}),
    ("gated_deltanet", {"output_gate": "headwise", "use_gate": False}),
]


def named(cases: list) -> list[str]:
    return [f"{case[0]}-{'-'.join(f'{k}={v}' for k, v in case[1].items())}" for case in cases]


def build(name: str, options: dict[str, Any]) -> Mixer:
    return attnzoo.create(name, D, **{"num_heads": H, **options})


@pytest.mark.parametrize("name, options, field, value", REFUSED, ids=named(REFUSED))
def test_refused(name: str, options: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        build(name, options)
    message = str(caught.value)
    assert re.fullmatch(rf"{field}(\[\d\])?: .{{15,}}", message), message
    assert str(value) in message


def run(mixer: Mixer, x: Tensor, sizes: list[int]) -> Tensor:
    cache = mixer.new_cache(len(x), x.shape[1])
    return torch.cat([mixer(part, cache=cache) for part in x.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name, options", ACCEPTED, ids=named(ACCEPTED))
def test_accepted(name: str, options: dict[str, Any]) -> None:
    mixer = build(name, options).double().eval()
    with torch.no_grad():
        for param in mixer.parameters():
            param.add_(torch.randn_like(param) * 0.2)
        x = torch.randn(2, T, D, dtype=torch.float64)
        y = mixer(x)
        assert y.shape == x.shape and y.isfinite().all()
        for sizes in ([T - 1, 1], [1] * T, [3, 1, 4, 1]):
            torch.testing.assert_close(run(mixer, x, sizes), y, rtol=1e-9, atol=1e-9)
    again = attnzoo.create(name, D, mixer.num_heads, **mixer.options).double().eval()
    again.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(again(x), y, rtol=1e-12, atol=1e-12)  # options read from a mixer rebuild it


def test_added_stages_are_there() -> None:
    mixer = build("mla", {"add": ["moh"], "moh": {"shared_heads": 1, "active_heads": 2}})
    collector = Collector()
    mixer(torch.randn(1, T, D), Context(collector=collector))
    gate = collector.stats["moh/gate"][0]
    assert gate.shape == (1, T, H) and ((gate > 0).sum(-1) == 2).all()
    assert "moh/balance" in collector.losses


@pytest.mark.parametrize("router", ["linear", "qnorm"])
def test_ties_among_routed_heads_choose_some(router: str) -> None:
    mixer, collector = build("moh", {"shared_heads": 1, "active_heads": 3, "router": router}), Collector()
    with torch.no_grad():
        for param in mixer.parameters():
            param.zero_()
    y = mixer(torch.randn(1, T, D), Context(collector=collector))
    assert y.isfinite().all() and ((collector.stats["moh/gate"][0] > 0).sum(-1) == 3).all()
