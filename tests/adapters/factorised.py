"""Golden files of variants whose projections are narrow, shared or factored."""

from __future__ import annotations

from attnzoo.attention.factorised.lama import Affinity, ContextVector
from attnzoo.attention.factorised.mhe import SharedHead
from attnzoo.attention.factorised.tensorllm import Tucker
from attnzoo.attention.latent.cca import QKConv, ShiftedValue, SphereNorm
from golden import Options, linear, matrix, plain


def _cca(ours: Options) -> None:
    ours["unit_norm"] = ours.pop("qk_norm")


OPTIONS = {"cca": _cca, "ccgqa": _cca}

VARIATIONS = {
    f"y_{kind}_{pos}": ({"mhe_kind": kind, "pos": pos}, ())
    for kind in ("add", "mul")
    for pos in ("rope", "none")
}

WEIGHTS = {
    ShiftedValue: {"qkv_proj.weight": linear("W_q", "W_k", "W_va", "W_vb")},
    QKConv: {
        "conv1": lambda given, stage: given["conv1_w"][:, 0],
        "conv2": matrix("conv2_w"),
        "bias1": plain("conv1_b"),
        "bias2": plain("conv2_b"),
    },
    SphereNorm: {"tau": plain("tau")},
    SharedHead: {
        "qkv_proj.weight": linear("W_q", "W_k", "W_v"),
        **{name: matrix(name) for name in ("e_q", "e_k", "e_v")},
    },
    Tucker: {
        **{name: matrix(name) for name in ("U1", "U2", "U3")},
        # the core's axes are R1, R2, R3, H there
        "core": lambda given, stage: given["C"].permute(2, 0, 3, 1),
    },
    ContextVector: {
        "p_proj.weight": linear("P"),
        "q_proj.weight": linear("Q"),
        "v_proj.weight": linear("W_v"),
    },
    Affinity: {"log_lambda": lambda given, stage: given["lambda"].log()},
}
