"""Log-linear attention: a state for each power of two of the past, each read with a weight from the token.

Log-Linear Attention, arXiv 2506.04761.

    lvl(t, j) = bit_length(t xor j), positions counted in the document
    o_t = sum over j <= t of lambda_t^lvl(t,j) (q_t . k_j) exp(G_t - G_j) v_j             base mamba2
    lambda_t = softplus(Lambda * (x_t W_lambda + b)) >= 0          per head and level, Lambda from 1
    base gated_deltanet: each level is multiplied by the token's transition, level 0 gets beta k v^T; the read
        has no 1 / sqrt(d_k)

Cached: one state (H d_k d_v) in fp32 per level, ceil(log2 max_seq_len) + 1 of them, and the convolution tails
of the base. Longer documents than max_seq_len are refused. Our choice: b is there where base=mamba2 has a
bias of its projection (``qkv_bias``), of which it is a part in the released code; starts are the base's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Choices, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrence.gated_deltanet import gated_deltanet
from attnzoo.attention.recurrence.levels import chunk_of, level_scan
from attnzoo.attention.recurrence.mamba2 import mamba2
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.gates import wide
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class LevelScan(Stage):
    """The recurrence with a state per level, ``(levels, H, d_k, d_v)``.

    Args:
        delta: the delta rule, else a scalar decay. bias: of W_lambda.
    """

    def __init__(self, draft: Draft, delta: bool, chunk_size: int, bias: bool) -> None:
        super().__init__()
        if chunk_size < 1 or chunk_size & (chunk_size - 1):
            raise ValueError(
                f"chunk_size: levels need a power of two, got {chunk_size}; take "
                f"{1 << max(chunk_size, 1).bit_length()}"
            )
        self.shape = (draft.o_heads, draft.head_dim, draft.v_head_dim)
        self.dim, self.delta, self.max_len = draft.dim, delta, draft.site.max_len
        self.groups = draft.num_heads  # of queries and keys, which states share
        self.levels = (self.max_len - 1).bit_length() + 1
        self.chunk_size = min(chunk_size, 1 << (self.levels - 1))  # no longer than a document can be
        heads = draft.o_heads
        self.weights = draft.linear("levels", draft.dim, heads * self.levels, bias)
        self.Lambda = flag(nn.Parameter(torch.ones(heads, self.levels)), decay=False, reinit=False)

    def split(self, share: Share) -> None:
        heads = self.shape[0]
        share.rows(self.weights, (heads, self.levels))
        share.cut(self, "Lambda", (heads, 1))
        self.shape, self.groups = (share.count(heads), *self.shape[1:]), share.count(self.groups)

    def memory(self) -> dict[str, Slot]:
        return {"levels": Slot("state", (self.levels, *self.shape))}

    def choose(self, asked: str) -> Choices:
        """See `Scan.choose`."""
        if asked not in ("auto", "reference"):
            raise ValueError(f"impl: {asked!r} has no kernel that reads by levels; use auto or reference")
        return same("reference", "chunked scan by levels in torch matmuls")

    def forward(self, terms: Terms, call: Call) -> Tensor:
        call.line.place(self.max_len, "max_seq_len")
        raw = wide(self.weights(call.x)).unflatten(-1, (self.shape[0], self.levels))
        lam = F.softplus(self.Lambda.to(raw.dtype) * raw)
        states = call.mem.state("levels")
        q, k, v, g, beta = terms[:5]
        o, states = level_scan(q, k, v, g, beta, lam, call.line, self.chunk_size, states)
        if states is not None:
            call.mem.put("levels", states)
        return o

    def work(self, length: int) -> Iterable[Work]:
        heads, K, V = self.shape
        yield Work("gates", "level weights", 2 * length * self.dim * heads * self.levels, per_head=True)
        C = chunk_of(self.chunk_size, length)
        N = -(-length // C)
        levels = sum(i.bit_count() for i in range(N))
        rest = length - (N - 1) * C
        found = [(min(C, rest) if i == N - 1 else C, i.bit_count()) for i in range(N)]
        method = heads * sum(self._method(n, states, K, V) for n, states in found)
        # scores are made before the gates tell the states of a group apart
        method -= (heads - self.groups) * sum(2 * K * self._scored(n) for n, _ in found)
        runs = N * (2 * C * C * (K + V) + 2 * C * K * V) + 2 * C * levels * K * V
        if self.delta:
            inverse = 2 * C * (C * C - 4) // 3 if C > 1 else 0
            runs += N * (2 * C * C * K * 3 + 2 * C**3 + inverse + 2 * C * K * K) + 2 * levels * K * K * V
        reason = "later tokens of a chunk"
        reason += ", scores that states share" if self.groups < heads else ""
        yield Work("mixing", "scan by levels", method, heads * runs, reason, per_head=True)

    def _scored(self, n: int) -> int:
        """Pairs of n tokens that have a score of queries and keys, or of keys with keys."""
        return n * n if self.delta else n * (n + 1) // 2

    def _method(self, n: int, states: int, K: int, V: int) -> int:
        """FLOPs of n tokens that find ``states`` levels: visible pairs, their own state, the reads."""
        pairs = n * (n + 1) // 2
        plain = 2 * pairs * (K + V) + 2 * n * K * V + 2 * n * states * K * V
        if not self.delta:
            return plain
        # two triangular systems' worth of products for P, ends and reads of the transition
        system = 2 * (pairs - n) * K + 4 * pairs * K + n * (n * n - 1) // 3
        return plain + system + (2 * n * K * K + 2 * states * K * K * V if states else 0)


BASES = {
    "mamba2": ("expand", "state_size", "n_groups", "dt_limit", "conv_kernel"),
    "gated_deltanet": (
        "num_v_heads",
        "expand_v",
        "use_gate",
        "use_short_conv",
        "allow_neg_eigval",
        "conv_kernel",
    ),
}


@register(
    Card(
        name="log_linear",
        title="Log-linear attention",
        paper="Log-Linear Attention",
        arxiv="2506.04761",
        family="recurrence",
        summary="A state for each power of two of the past, each read with a weight from the token.",
        cached="ceil(log2 max_seq_len) + 1 states (H d_k d_v) and convolution tails",
        claims=(
            Claim(
                "slightly better perplexity than Mamba-2",
                "val_bpb",
                "lower",
                "mamba2",
                "0.7 to 0.8B / 50B tokens",
            ),
            Claim("the same over Gated DeltaNet, on that base", where="0.7 to 0.8B / 50B tokens"),
            Claim(
                "better associative recall than its base", "accuracy:mqar", "higher", "mamba2", "synthetic"
            ),
        ),
        small={"chunk_size": 4, "base": "gated_deltanet", "max_seq_len": 256},
    ),
    frames=("recurrent",),
    fixed={"num_kv_heads": "the base says how heads are grouped: n_groups or num_v_heads"},
)
def log_linear(
    draft: Draft,
    *,
    base: Literal["mamba2", "gated_deltanet"] = "mamba2",
    expand: float | None = None,
    state_size: int | None = None,
    n_groups: int | None = None,
    dt_limit: tuple[float, ...] | None = None,
    num_v_heads: int | None = None,
    expand_v: float | None = None,
    use_gate: bool | None = None,
    use_short_conv: bool | None = None,
    allow_neg_eigval: bool | None = None,
    conv_kernel: int = 4,
) -> None:
    """Sets the base's stages and a scan by levels.

    Args:
        base: projection, gates and read-out.
        expand, state_size, n_groups, dt_limit: of base=mamba2; null = its default.
        num_v_heads, expand_v, use_gate, use_short_conv, allow_neg_eigval: of base=gated_deltanet.
        conv_kernel: taps.
        chunk_size (of the frame): a power of two. max_seq_len (of the frame): longest document.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the base where all level weights are 1.
    """
    given = {
        "expand": expand,
        "state_size": state_size,
        "n_groups": n_groups,
        "dt_limit": dt_limit,
        "num_v_heads": num_v_heads,
        "expand_v": expand_v,
        "use_gate": use_gate,
        "use_short_conv": use_short_conv,
        "allow_neg_eigval": allow_neg_eigval,
        "conv_kernel": conv_kernel,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() - set(BASES[base]):
        other = next(other for other, names in BASES.items() if name in names)
        raise ValueError(f"{name}: is an option of base={other}, got {given[name]} with base={base}")
    {"mamba2": mamba2, "gated_deltanet": gated_deltanet}[base](draft, **given)
    delta, host = base == "gated_deltanet", draft.host

    def complete(done: Draft) -> None:
        done.put("scan", LevelScan(done, delta, host["chunk_size"], host["qkv_bias"] and not delta))

    draft.last(complete)
