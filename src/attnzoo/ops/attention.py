"""Attention over a key axis: the fused paths, and the chunked reference for everything they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.attention.stages.mask import Causal, Mask
from attnzoo.attention.timeline import Axis
from attnzoo.ops import adapters
from attnzoo.ops.kept import fits, kept_attention
from attnzoo.ops.last_queries import last_queries
from attnzoo.ops.seen import softmax
from attnzoo_kernels.attention import attention as softmax_kernel
from attnzoo_kernels.latent_decode import latent_decode
from attnzoo_kernels.launch import choose
from attnzoo_kernels.rows import LEAST_RECOMPUTED, chunk_rows

LEAST_KEPT = 64  # tokens from which keeping the weights pays on a CPU
BAND_ROWS = 128  # query rows per call of the fused path in a window


class Keys(NamedTuple):
    """One set of keys.

    Args:
        k: ``(B, G_k, S, d)``; v: ``(B, G_v, S, d_v)``.
        axis: order and document of each key; None = ``0..S-1`` of one document.
        aligned: key ``S - T + i`` is query ``i``'s own token, in every row.
        k_map, v_map: ``(H,)`` which key and value head each query head reads; None = consecutive groups.
        rest: ``(B, 1 or G, S, d_r)``, for latents: k is v, and the whole key is v followed by it; of the two,
            the one with a single head serves all heads of the other. Kernels read the latent once; what needs
            whole keys has them joined first.
    """

    k: Tensor
    v: Tensor
    axis: Axis | None = None
    aligned: bool = True
    k_map: Tensor | None = None
    v_map: Tensor | None = None
    rest: Tensor | None = None


class Geo(NamedTuple):
    """One chunk of query rows ``rows`` against keys ``cols``, as score and normalise stages see it.

    Args:
        keys: the chunk's keys, expanded to the query heads.
        visible: ``(B or 1, 1, t, S)`` bool.
        rows: slice of the query axis; cols: ``(S,)`` indices of the key axis, or None = all.
    """

    keys: Keys
    visible: Tensor
    rows: slice
    cols: Tensor | slice | None


class Score(Protocol):
    def __call__(self, q: Tensor, geo: Geo) -> Tensor: ...


class Dot:
    """Scaled dot product, the default score."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, q: Tensor, geo: Geo) -> Tensor:
        return grouped_matmul(q * self.scale, geo.keys.k.mT)


def attention(
    q: Tensor,
    *sets: Keys | tuple[Keys, Mask],
    mask: Mask | None = None,
    query: Axis | None = None,
    scale: float | None = None,
    score: Score | None = None,
    normalise: Callable[[Tensor, Tensor], Tensor] | None = None,
    weights: Callable[[Tensor, Geo], Tensor] | None = None,
    impl: str = "sdpa",
    kernels: bool = False,
    once: Callable | None = None,
    also: tuple[str, ...] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """One joint normalisation over one or several sets of keys.

    Args:
        q: ``(B, H, T, d)``.
        sets: `Keys`, or ``(Keys, Mask)`` where a set has a mask of its own.
        mask: for sets without one; default causal.
        query: order and document of the queries; None = the last T places of one document.
        scale: default ``d ** -0.5``.
        score, normalise, weights: replace the dot product and the softmax, and map the weights after it.
        impl: "reference", or "sdpa", "flex" and "xformers", which know only the dot product and the softmax,
            or "triton", which also knows stages with an ``op``. What reads several sets or asks for ``also``
            goes to the reference; keys in a ring leave xformers and triton for SDPA or the reference.
        kernels: let our kernels decode cached latents on a GPU, whatever ``impl`` is.
        once: memoises masks for other layers of the same forward.
        also: "p" (weights over the concatenated keys) and "lse" to return beside the output, by the
            reference.

    Returns:
        ``(B, H, T, d_v)``, or that and a dict.
    """
    mask = mask or Causal()
    once = once or (lambda key, make: make())
    pairs = [s if isinstance(s, tuple) and not isinstance(s, Keys) else (s, mask) for s in sets]
    if query is None:
        span = pairs[0][0].k.shape[2]
        query = Axis(torch.arange(span - q.shape[2], span, device=q.device)[None], None)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = score is None and normalise is None and weights is None and not also
    if kernels and plain and len(pairs) == 1 and _decodes_latents(q, *pairs[0]):
        keys, own = pairs[0]
        span = adapters.span_of(own, query, keys.v.shape[2])
        rope = None if keys.rest is None else keys.rest[:, 0]
        return latent_decode(q, keys.v[:, 0], rope, span, scale=scale, impl="triton")
    pairs = [(_with_axis(whole(keys)), m) for keys, m in pairs]
    if impl != "reference" and len(pairs) == 1 and not also:
        keys, own = pairs[0]
        if impl == "triton" and keys.aligned and adapters.band_of(own) is not None:
            return _kernels(q, *_paired(q, keys), own, query, scale, score, normalise)
        if impl == "flex" and plain:
            return adapters.flex(q, *_paired(q, keys), own, query, keys.axis, scale, once)
        if impl == "xformers" and plain and keys.aligned:
            return adapters.xformers(q, *_paired(q, keys), own, query, scale)
        if plain:
            return _fused(q, keys, own, query, scale, once)
    keys, visible, sole = _joint(q, pairs, query, once)
    return _chunked(q, keys, visible, sole, score or Dot(scale), normalise or softmax, weights, also)


def _kernels(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, query: Axis, scale: float, score, normalise
) -> Tensor:
    """The op of the score or normalise stage, or the softmax of our own kernel."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    span, impl = adapters.span_of(mask, query, k.shape[2]), "auto" if q.is_cuda else "triton"
    if score is not None:
        return score.op(q, k, v, span, impl)
    if normalise is not None:
        return normalise.op(q, k, v, span, scale, impl)
    return softmax_kernel(q, k, v, span, scale=scale, impl=impl)


def _decodes_latents(q: Tensor, keys: Keys, mask: Mask) -> bool:
    """One new token over cached latents, without gradients, where our kernels may run."""
    one = keys.k is keys.v and keys.aligned and q.shape[2] == 1 and not torch.is_grad_enabled()
    heads = keys.k.shape[1] if keys.rest is None else max(keys.k.shape[1], keys.rest.shape[1])
    if not one or heads > 1 or adapters.band_of(mask) is None:
        return False
    return choose("latent_decode", "auto", q, keys.v) == "triton"


def whole(keys: Keys) -> Keys:
    """Latents and what follows them joined to whole keys."""
    if keys.rest is None:
        return keys
    heads = max(keys.k.shape[1], keys.rest.shape[1])
    k, rest, v = (z.expand(-1, heads, -1, -1) for z in (keys.k, keys.rest, keys.v))
    return keys._replace(k=torch.cat([k, rest], dim=-1), v=v, rest=None)


def _with_axis(keys: Keys) -> Keys:
    if keys.axis is not None:
        return keys
    return keys._replace(axis=Axis(torch.arange(keys.k.shape[2], device=keys.k.device)[None], None))


def visible_table(mask: Mask, query: Axis, key: Axis, once: Callable) -> Tensor:
    """``(B or 1, 1, T, S)`` bool, computed once per forward for all layers with the same mask."""
    if key.tag is None:
        return mask.visible(query, key)[:, None]
    return once(("visible", mask, key.tag), lambda: mask.visible(query, key)[:, None])


def _fused(q: Tensor, keys: Keys, mask: Mask, query: Axis, scale: float, once: Callable) -> Tensor:
    T, S = q.shape[2], keys.k.shape[2]
    one_document = keys.axis.doc is None
    if T == S and keys.aligned and mask.causal and not _is_banded(mask, T, S) and _keeps(q, keys):
        plain = one_document and mask == Causal()
        hidden = None if plain else ~visible_table(mask, query, keys.axis, once)
        return kept_attention(q, *_paired(q, keys), scale, hidden)
    if one_document and keys.aligned and mask == Causal():
        if T == S:
            return _sdpa(q, keys, scale, None, causal=T > 1)
        if T == 1:
            return _sdpa(q, keys, scale, None)
        if q.is_cuda and (o := last_queries(*_alike(q, keys), scale)) is not None:
            return o[..., : keys.v.shape[-1]].to(keys.v.dtype)
    if keys.aligned and _is_banded(mask, T, S) and (one_document or not mask.sinks()):
        return _banded(q, keys, mask, query, scale, once)
    return _sdpa(q, keys, scale, visible_table(mask, query, keys.axis, once))


def _banded(q: Tensor, keys: Keys, mask: Mask, query: Axis, scale: float, once: Callable) -> Tensor:
    """A run of queries against the keys it can see: linear in T for a window."""
    outs = []
    for rows, cols in spans(mask, q.shape[2], keys, BAND_ROWS):
        part = select(keys, cols)
        make = lambda rows=rows, part=part: mask.visible(_rows(query, rows), part.axis)[:, None]  # noqa: E731
        seen = once(("band", mask, rows.start, q.shape[2], keys.k.shape[2]), make)
        outs.append(_sdpa(q[:, :, rows], part, scale, seen))
    return torch.cat(outs, dim=2)


def _sdpa(q: Tensor, keys: Keys, scale: float, seen: Tensor | None, causal: bool = False) -> Tensor:
    q, k, v = _alike(q, keys)
    grouped = k.shape[1] != q.shape[1]
    slow = _slow_in_bf16(q, v)
    q, k, v = (z.to(torch.float32 if slow else v.dtype) for z in (q, k, v))
    with torch.autocast("cpu", enabled=False) if slow else nullcontext():
        o = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scale, enable_gqa=grouped)
    return o[..., : keys.v.shape[-1]].to(keys.v.dtype)


def _alike(q: Tensor, keys: Keys) -> tuple[Tensor, ...]:
    """Queries, keys and values, as many heads of the last two, all as wide as the widest."""
    (k, v), width = _paired(q, keys), max(q.shape[-1], keys.v.shape[-1])
    return tuple(F.pad(z, (0, width - z.shape[-1])) if z.shape[-1] < width else z for z in (q, k, v))


def _keeps(q: Tensor, keys: Keys) -> bool:
    """Whether `kept_attention` is the faster way: training short sequences on a CPU."""
    if not q.is_cpu or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return q.shape[2] >= LEAST_KEPT and fits(q, keys.v) and (keys.v.element_size() >= 4 or not _amx())


def _paired(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads each."""
    if keys.k_map is None and keys.v_map is None and keys.k.shape[1] == keys.v.shape[1]:
        return keys.k, keys.v
    return _expand(keys.k, keys.k_map, q.shape[1]), _expand(keys.v, keys.v_map, q.shape[1])


def _slow_in_bf16(q: Tensor, v: Tensor) -> bool:
    """Whether torch's CPU kernel trains slower in bf16 than in fp32: without AMX, on heads below 64 wide."""
    return v.dtype == torch.bfloat16 and v.is_cpu and q.requires_grad and v.shape[-1] < 64 and not _amx()


@lru_cache
def _amx() -> bool:
    probe = getattr(torch.cpu, "get_capabilities", dict)
    return bool(probe().get("amx_bf16", False))


def spans(mask: Mask, T: int, keys: Keys, step: int) -> list[tuple[slice, slice | Tensor | None]]:
    """Runs of query rows and the keys that each can need (None = all)."""
    S, runs = keys.k.shape[2], []
    for first in range(0, T, step):
        rows = slice(first, min(first + step, T))
        runs.append((rows, _cols(mask, rows, S - T, keys) if keys.aligned else None))
    return runs


def _cols(mask: Mask, rows: slice, shift: int, keys: Keys) -> slice | Tensor:
    reach, stop = mask.reach(), rows.stop + shift if mask.causal else keys.k.shape[2]
    start = 0 if reach is None else max(0, rows.start + shift - reach)
    sinks = mask.sinks()
    if not sinks or start <= sinks:
        return slice(0 if sinks else start, stop)
    if keys.axis.doc is not None:  # the first tokens of a document may stand anywhere
        return slice(0, stop)
    wide = [torch.arange(sinks), torch.arange(start, stop)]
    return torch.cat(wide).to(keys.k.device)


def select(keys: Keys, cols: slice | Tensor | None) -> Keys:
    """The keys ``cols`` of the key axis."""
    if cols is None:
        return keys
    axis = Axis(keys.axis.order[:, cols], None if keys.axis.doc is None else keys.axis.doc[:, cols])
    return keys._replace(k=keys.k[:, :, cols], v=keys.v[:, :, cols], axis=axis)


def _rows(axis: Axis, rows: slice) -> Axis:
    return Axis(axis.order[:, rows], None if axis.doc is None else axis.doc[:, rows])


def _joint(q: Tensor, pairs: list, query: Axis, once: Callable) -> tuple[Keys, Callable, Mask | None]:
    """The sets side by side, and what a run of rows sees of chosen columns."""
    if len(pairs) == 1:
        keys, mask = pairs[0]
        return keys, lambda rows, part: mask.visible(_rows(query, rows), part.axis)[:, None], mask
    H, tables = q.shape[1], [visible_table(m, query, keys.axis, once) for keys, m in pairs]
    batch = max(t.shape[0] for t in tables)
    table = torch.cat([t.expand(batch, *t.shape[1:]) for t in tables], dim=-1)
    k = torch.cat([_expand(keys.k, keys.k_map, H) for keys, _ in pairs], dim=2)
    v = torch.cat([_expand(keys.v, keys.v_map, H) for keys, _ in pairs], dim=2)
    joint = _with_axis(Keys(k, v, aligned=False))
    return joint, lambda rows, part: table[:, :, rows], None


def _chunked(
    q: Tensor,
    keys: Keys,
    visible: Callable,
    mask: Mask | None,
    score: Score,
    normalise: Callable,
    weights: Callable | None,
    also: tuple[str, ...],
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Query rows in chunks, so that scores never exist for all of T at once."""
    T, S, outs, extra = q.shape[2], keys.k.shape[2], [], {name: [] for name in also}
    step = chunk_rows(S)
    runs = (
        spans(mask, T, keys, step)
        if mask
        else [(slice(a, min(a + step, T)), None) for a in range(0, T, step)]
    )
    keys = keys._replace(
        k=keys.k if keys.k_map is None else keys.k[:, keys.k_map],
        v=keys.v if keys.v_map is None else keys.v[:, keys.v_map],
    )

    def run(rows: slice, cols: slice | Tensor | None) -> tuple[Tensor, ...]:
        part = select(keys, cols)
        geo = Geo(part, visible(rows, part), rows, cols)
        s = score(q[:, :, rows], geo)
        p = normalise(s, geo.visible)
        if weights is not None:
            p = weights(p, geo)
        own = {"lse": lambda: s.masked_fill(~geo.visible, float("-inf")).logsumexp(-1)}
        own["p"] = lambda: _spread(p, cols, S)
        return grouped_matmul(p.to(part.v.dtype), part.v), *(own[name]() for name in also)

    recompute = torch.is_grad_enabled() and T >= LEAST_RECOMPUTED
    # the longest rows first: what they free then fits the rest, and the allocator's heap does not creep up
    for rows, cols in reversed(runs):
        o, *more = checkpoint(run, rows, cols, use_reentrant=False) if recompute else run(rows, cols)
        outs.append(o)
        for name, value in zip(also, more, strict=True):
            extra[name].append(value)
    o = torch.cat(outs[::-1], dim=2)
    return (o, {name: torch.cat(parts[::-1], dim=2) for name, parts in extra.items()}) if also else o


def computed_pairs(mask: Mask, T: int, impl: str) -> int:
    """Query-key pairs that `attention` computes for one document of ``T`` tokens without a cache."""
    keys = _with_axis(
        Keys(*(torch.empty(1, 1, T, 1, device="meta"),) * 2, axis=Axis(torch.arange(T)[None], None))
    )
    if impl == "sdpa" and not _is_banded(mask, T, T):
        return mask.pairs(T) if mask == Causal() else T * T
    total = 0
    for rows, cols in spans(mask, T, keys, BAND_ROWS if impl == "sdpa" else chunk_rows(T)):
        width = T if cols is None else len(range(T)[cols]) if isinstance(cols, slice) else cols.numel()
        total += (rows.stop - rows.start) * width
    return total


def _is_banded(mask: Mask, T: int, S: int) -> bool:
    reach = mask.reach()
    return reach is not None and T > BAND_ROWS and 2 * (reach + BAND_ROWS) < S


def _spread(p: Tensor, cols: slice | Tensor | None, S: int) -> Tensor:
    if cols is None:
        return p
    full = p.new_zeros(*p.shape[:-1], S)
    full[..., cols] = p
    return full


def _expand(z: Tensor, index: Tensor | None, heads: int) -> Tensor:
    """``(B, G, S, d)`` to one head per query head, consecutive query heads sharing."""
    if index is not None:
        return z[:, index]
    if z.shape[1] == heads:
        return z
    return z.repeat_interleave(heads // z.shape[1], dim=1)


def grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``(B, H, t, m) @ (B, G, m, n)`` with consecutive heads sharing ``b``: ``(B, H, t, n)``, no copy of
    ``b``.
    """
    B, H, t, m = a.shape
    G = b.shape[1]
    if G == H:
        return a @ b
    return (a.reshape(B, G, H // G * t, m) @ b).reshape(B, H, t, b.shape[-1])
