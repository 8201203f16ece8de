"""Every property of the contract, on every registered variant, at its defaults and where its mechanism
shows.
"""

from __future__ import annotations

import pytest

import attnzoo
from attnzoo.testing import PROPERTIES, Subject

CASES = {key: subject for name in attnzoo.list_variants() for key, subject in Subject.cases(name).items()}
# compositions that must work, each with options under which its stages show
COMPOSED = [
    ("kha", {"num_kv_heads": 2, "window": 4, "n_sink": 1, "kind": "mlp"}),
    ("mla", {"add": ("moh",), "window": 6}),
    ("gqa", {"num_kv_heads": 2, "output_gate": "headwise", "qk_norm": True}),
    ("mla", {"add": ("kha",), "kind": "linear", "q_lora_rank": 12}),
    ("dcmha", {"window": 5, "add": ("moh",), "static_proj": False}),
    ("gated_deltanet", {"add": ("moh", "kha"), "num_v_heads": 8, "chunk_size": 5, "qk_norm": True}),
    (
        "linear",
        {"num_kv_heads": 2, "feature_map": "hedgehog", "normalize": False, "output_gate": "elementwise"},
    ),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prop", PROPERTIES)
def test_variant(prop: str, case: str) -> None:
    PROPERTIES[prop](CASES[case])


@pytest.mark.parametrize("name, options", [pytest.param(n, o, id=f"{n}-{'-'.join(o)}") for n, o in COMPOSED])
@pytest.mark.parametrize("prop", PROPERTIES)
def test_composition(prop: str, name: str, options: dict) -> None:
    PROPERTIES[prop](Subject.of(name, **options))
