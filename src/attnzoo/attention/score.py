"""ScoreAttention: project -> refine -> position -> score -> mask -> normalise -> combine -> out.

The frame owns the plumbing (cache, documents, masks, choice of implementation); a variant is the stages it
changes.

Ranks. refine: 10 shift and convolution, 20 maps shared by heads, 30 norms, 40 feature maps, 50 gates.
combine: 10 merge heads, 20 local terms, 30 head norm, 40 gate, 50 router, 60 head mask.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from attnzoo.attention.base import Call, Mixer, Raw, Stage
from attnzoo.attention.memory import Retain
from attnzoo.attention.stages.combine import combined
from attnzoo.cost import Work
from attnzoo.ops.attention import Geo, Keys, attention, computed_pairs


class Early:
    """Marks projections whose k and v exist before the cache: ``qkv(x, call) -> (q, k, v)``."""

    late = False


class Late:
    """Marks projections that cache something smaller and make k and v from it.

    ``rows(x, call) -> (q, q_rot, {name: row})``; ``keys(rows, call) -> (k, v)``. Rows named in ``turned``
    are rotated before the cache and appended to k (and ``q_rot`` to q) after refinement, so that refine maps
    touch content only. ``absorbed(q, q_rot, rows) -> (q, Keys, finish)`` reads the rows as they are;
    ``absorbs(T, S)`` says when that is cheaper.
    """

    late = True
    turned: tuple[str, ...] = ()

    def absorbs(self, new: int, keys: int) -> bool:
        return False


class ScoreStage(Stage):
    """A score of its own: called with q ``(B, H, t, d)`` and a `Geo`, it returns ``(B, H, t, S)``.

    One with a kernel has ``op(q, k, v, span, impl)``, the whole attention, and ``refusal()``: one line where
    its options have none, else None.
    """

    def begin(self, call: Call) -> None:
        """Runs before the keys are read, with all of x."""

    def weights(self, p: Tensor, geo: Geo) -> Tensor:
        """Maps the normalised weights."""
        return p

    def pair_flops(self) -> int:
        """FLOPs per query-key pair beyond the dot product."""
        return 0


class Single(Stage):
    """Read stage: one joint read of all keys."""

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        return attend(q, keys)


class ScoreAttention(Mixer):
    """Attention by scores over keys; see the module.

    Args (slots): project, refine, position, score, mask, normalise, read, combine, out. ``score`` and
    ``normalise`` are None for the scaled dot product and the softmax, which fused kernels serve.
    """

    def __init__(
        self,
        *,
        project: Stage,
        refine: list[Stage],
        position: Stage,
        score: Stage | None,
        mask: Stage,
        normalise: Stage | None,
        read: Stage,
        combine: list[Stage],
        out: Stage,
        scale: float,
        head_widths: tuple[int, int],
    ) -> None:
        super().__init__()
        self.project, self.position, self.score, self.mask = project, position, score, mask
        self.normalise, self.read, self.out = normalise, read, out
        self.refine = nn.ModuleList(sorted(refine, key=lambda s: s.rank))
        self.combine = nn.ModuleList(sorted(combine, key=lambda s: s.rank))
        self.scale, self.head_widths = scale, head_widths

    def heads(self, call: Call) -> Tensor:
        """``(B, T, H, d_v)``."""
        if self.score is not None:
            self.score.begin(call)
        q, keys, finish = self._late(call) if self.project.late else self._early(call)
        mask = self.mask(q, keys, call)

        def attend(q: Tensor, *sets, also: tuple[str, ...] = ()):
            return attention(
                q,
                *sets,
                mask=mask,
                query=call.query,
                scale=self.scale,
                score=self.score,
                normalise=self.normalise,
                weights=None if self.score is None else self.score.weights,
                impl=self.chosen(q.device).impl,
                kernels=self.options["impl"] in ("auto", "triton"),
                once=call.line.once,
                also=also,
            )

        o = finish(self.read(q, keys, attend, call).transpose(1, 2))
        return combined(self.combine, o, call)

    def _early(self, call: Call):
        q, k, v = self._refined(*self.project.qkv(call.x, call), call)
        call.raw = Raw(q, k, v)
        q, k = self.position(q, k, call)
        rows = call.mem.rows
        return q, Keys(rows("k", k), rows("v", v), call.mem.axis(), call.mem.aligned), _as_is

    def _late(self, call: Call):
        q, q_rot, rows = self.project.rows(call.x, call)
        for name in self.project.turned:
            q_rot, rows[name] = self.position(q_rot, rows[name], call)
        rows = {name: call.mem.rows(name, row) for name, row in rows.items()}
        axis, aligned = call.mem.axis(), call.mem.aligned
        if not self.refine and self.score is None and self.project.absorbs(q.shape[2], axis.order.shape[1]):
            call.raw = Raw(q, None, None)
            q, keys, finish = self.project.absorbed(q, q_rot, rows)
            return q, keys._replace(axis=axis, aligned=aligned), finish
        q, k, v = self._refined(q, *self.project.keys(rows, call), call)
        call.raw = Raw(q, k, v)
        q, k = self.project.join(q, q_rot, k, rows)
        return q, Keys(k, v, axis, aligned), _as_is

    def _refined(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        for stage in self.refine:
            q, k, v = stage(q, k, v, call)
        return q, k, v

    def stages(self) -> Iterable[Stage]:
        single = (self.project, *self.refine, self.position, self.score, self.mask, self.normalise, self.read)
        return (s for s in (*single, *self.combine, self.out) if s is not None)

    def retain(self) -> Retain | None:
        return self.mask.retain()

    def work(self, length: int) -> Iterable[Work]:
        mask, (width, v_width) = self.mask.mask, self.head_widths
        per_pair = 2 * self.num_heads * (width + v_width)
        visible, computed = mask.pairs(length), computed_pairs(mask, length, self.impl)
        why = "hidden keys of a tile"
        yield Work("mixing", "attention", per_pair * visible, per_pair * computed, why, per_head=True)
        if self.score is not None:
            extra = self.score.pair_flops()
            yield Work("mixing", "score", extra * visible, extra * computed, why)


def _as_is(o: Tensor) -> Tensor:
    return o
