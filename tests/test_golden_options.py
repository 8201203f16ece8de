"""Independent outputs of what is an option here, not a variant: gates, softmax, static composition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import attnzoo
from golden import load_spec_weights
from test_golden import Watched, close

FILES = Path(__file__).parent / "golden" / "more"


def read(name: str) -> dict[str, Any]:
    return torch.load(FILES / f"{name}.pt", weights_only=True)


def test_softmax_its_weights_and_its_normaliser() -> None:
    file = read("softmax")
    mixer = attnzoo.create("gqa", 32, 4, num_kv_heads=2, head_dim=8).double()
    load_spec_weights(mixer, file["weights"])
    close(mixer(file["x"]), file["y"])
    mixer.read = Watched()
    close(mixer(file["x"]), file["y"])
    p, expected = mixer.read.p, file["extra"]
    close(p, expected["P"])
    close(-(p * p.clamp(min=1e-300).log()).sum(-1), expected["entropy"])

    class WithLse(Watched):
        def forward(self, q, keys, attend, call):
            o, more = attend(q, keys, also=("lse",))
            self.lse = more["lse"]
            return o

    mixer.read = WithLse()
    mixer(file["x"])
    close(mixer.read.lse, expected["lse"])


def test_output_gate() -> None:
    file = read("gated_attention")
    options = {"num_kv_heads": 2, "qk_norm": True, "output_gate": "elementwise"}
    for impl in ("auto", "reference"):
        mixer = attnzoo.create("gqa", 32, 4, impl=impl, **options).double()
        close(load_spec_weights(mixer, file["weights"])(file["x"]), file["y"])


def test_talking_heads_are_composition_by_fixed_maps() -> None:
    file = read("talking_heads")
    mixer = attnzoo.create("dcmha", 32, 4, query_wise=False, key_wise=False, qk_norm=False).double()
    weights = {k: v for k, v in file["weights"].items() if not k.startswith("P_")}
    eye = torch.eye(4).double()
    maps = {"W_b_pre": file["weights"]["P_l"] - eye, "W_b_post": file["weights"]["P_w"] - eye}
    close(load_spec_weights(mixer, weights | maps)(file["x"]), file["y"])
