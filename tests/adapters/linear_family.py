"""Golden files of kernelised linear attention: options, weights and checks."""

from __future__ import annotations

from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.linear.flatten import Focus, KeyTable
from attnzoo.attention.linear.linformer import Landmarks, TwoPass
from attnzoo.attention.linear.mhla_linear import BlockMix
from attnzoo.attention.linear.pavlovian import Conditioning
from attnzoo.attention.stages.combine import LocalConv
from golden import Options, Symbols, matrix, plain

POSITIONS = {"none": "none", "numerator": "rope", "rope_num": "rope", "learned": "none"}


def _rope(ours: Options) -> None:
    if "rope" in ours:
        ours["pos"] = POSITIONS[ours.pop("rope")]


def _flatten(ours: Options) -> None:
    if "pos" in ours:
        ours["learned_pos"] = ours["pos"] == "learned"
        ours["pos"] = POSITIONS[ours["pos"]]


def _linformer(ours: Options) -> None:
    _rope(ours)
    ours["out_bias"] = True  # the source's output projection has one


OPTIONS = {"mala": _rope, "rala": _rope, "flatten": _flatten, "linformer": _linformer}


def _per_head(given: Symbols, stage: Focus) -> Tensor:
    return given["s"].reshape(stage.s.shape)


def _table(given: Symbols, stage: Stage) -> Tensor:
    return given["pos_table"].reshape(stage.table.shape)


SLOTS = {"slots.E": matrix("E"), "slots.F": matrix("F")}
WEIGHTS = {
    LocalConv: {"taps": plain("dwc|lepe"), "bias": plain("dwc_bias|lepe_bias")},
    Focus: {"s": _per_head},
    KeyTable: {"table": _table},
    TwoPass: SLOTS,
    Landmarks: SLOTS,
    BlockMix: {"M": matrix("M")},
    Conditioning: {"a": plain("a"), "l": plain("l")},
}
