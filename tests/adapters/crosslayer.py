"""Names of what `attnzoo.attention.crosslayer` adds."""

from __future__ import annotations

from attnzoo.attention.crosslayer.borrow import BorrowedKV
from golden import Options, linear, plain


def _mixattention(ours: Options) -> None:
    """Kinds with the producers that they name, as a plan with distances."""
    kinds, made = ours.pop("plan_kinds"), ours.pop("producers")
    ours["plan"] = [
        {"name": kind, "reuse": made[i] - i} if kind.endswith("_reuse") else kind
        for i, kind in enumerate(kinds)
    ]


OPTIONS = {"mixattention": _mixattention}
WEIGHTS = {BorrowedKV: {"q_proj.weight": linear("W_q"), "q_proj.bias": plain("b_q")}}
# their layers depend on each other: tests/zoo/test_crosslayer.py and test_shared_weights.py read them
LAYERED = {"cla": True, "mixattention": True, "headshare": True}
