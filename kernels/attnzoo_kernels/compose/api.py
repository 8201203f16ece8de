"""The front of attention that is mixed across heads."""

from __future__ import annotations

from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.checks import check_floats, check_same_dtype, check_shape
from attnzoo_kernels.compose.reference import Mix, compose_reference
from attnzoo_kernels.span import Span

MOST_HEADS = 16
MOST_RANK = 4


def compose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    *,
    pre: Mix | None,
    post: Mix | None,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Attention with scores mixed across heads before the softmax and weights after it.

    Dynamically composable heads, arXiv 2405.08553; with static matrices alone, talking heads, 2003.02436.

        s = scale q . k,  p = softmax over visible keys of pre(s),  o = post(p) v

    Args:
        q: (B,H,T,d); k: (B,H,S,d); v: (B,H,S,d_v).
        span: visible keys of every query. The result does not depend on k and maps of keys that nobody sees,
            even if they are NaN; their v must be finite, and for gradients all of them.
        pre, post: how the H scores, and the H weights, of a pair are mixed; None = not at all.
        scale: factor of the scores.
        impl: "triton" (up to 16 heads and maps of rank 4), "reference" or "auto": kernels on a GPU where they
            can run, the reference elsewhere.

    Returns:
        o (B,H,T,d_v) in q's dtype; 0 in rows that see nothing. Mixing and softmax are in fp32 (fp64 for
        fp64). Memory is linear in T and S; first derivatives by q, k, v and all of both mixes.

    Raises:
        ValueError: a shape, dtype or device is wrong, or impl="triton" cannot run these operands.
    """
    given = _validate(q, k, v, span, pre, post)
    if launch.choose("compose", impl, *given, refusal=_refusal(q, pre, post)) == "reference":
        return compose_reference(q, k, v, span, pre, post, scale)
    from attnzoo_kernels.compose.ops import compose_kernels, worst

    launch.self_check("compose", q.device, worst)
    return compose_kernels(q, k, v, span, pre, post, scale)


def _refusal(q: Tensor, pre: Mix | None, post: Mix | None) -> str | None:
    if q.shape[1] > MOST_HEADS:
        return f"the kernels take up to {MOST_HEADS} heads, got {q.shape[1]}; use impl='reference'"
    if q.shape[0] * q.shape[1] > launch.MOST_PROGRAMS:
        rows = q.shape[0] * q.shape[1]
        return f"the kernels take B H up to {launch.MOST_PROGRAMS}, got {rows}; use impl='reference'"
    keys = [mix.key for mix in (pre, post) if mix is not None and mix.key is not None]
    rank = max([key.shape[1] // 2 for key in keys], default=0)
    if rank > MOST_RANK:
        return f"the kernels take key maps up to rank {MOST_RANK}, got {rank}; use impl='reference'"
    return None


def _validate(q: Tensor, k: Tensor, v: Tensor, span: Span, pre: Mix | None, post: Mix | None) -> list[Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: needs 4 axes (B, H, T or S, d), got {tuple(x.shape)}; add the missing")
    check_same_dtype({"q": q, "k": k, "v": v}, "q")
    B, H, T, d = q.shape
    S = k.shape[2]
    check_shape("q", q, (B, H, T, d))
    check_shape("k", k, (B, H, S, d))
    check_shape("v", v, (B, H, S, v.shape[-1]))
    maps = {}
    for name, mix in (("pre", pre), ("post", post)):
        if mix is None:
            continue
        if not isinstance(mix, Mix):
            raise ValueError(f"{name}: needs a Mix or None, got {type(mix).__name__}; name its parts")
        check_shape(f"{name}.static", mix.static, (H, H))
        for side, x, length in (("query", mix.query, T), ("key", mix.key, S)):
            if x is not None:
                _check_rows(f"{name}.{side}", x, B, length, H)
        maps |= {f"{name}.{part}": x for part, x in mix._asdict().items()}
    check_floats({"q": q, "k": k, "v": v} | maps, "q")
    span.check(B, T, S, q.device)
    return [x for x in (q, k, v, *maps.values()) if x is not None]


def _check_rows(name: str, x: Tensor, B: int, length: int, H: int) -> None:
    if x.dim() != 4 or x.shape[1] % 2 == 0:
        raise ValueError(
            f"{name}: needs shape ({B}, 2 I + 1, {length}, {H}), got {tuple(x.shape)}; stack w1, w2 and g"
        )
    check_shape(name, x, (B, x.shape[1], length, H))
