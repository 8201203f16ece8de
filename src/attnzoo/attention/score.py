"""ScoreAttention: project, refine, position, score, mask, normalise, read, combine, out, after, in order.

The frame owns the plumbing (cache, documents, masks, choice of implementation); a variant is the stages it
changes. A refine stage that cuts channels off queries and keys says how many in ``dropped()``.

Ranks. refine: 10 shift and convolution, 20 maps shared by heads, 30 norms, 40 feature maps, 50 gates.
combine: 10 merge heads, 20 local terms, 30 head norm, 40 gate, 50 router, 60 head mask.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.call import Call, Raw
from attnzoo.attention.slots import Retain
from attnzoo.attention.stages.combine import combined
from attnzoo.attention.timeline import Axis
from attnzoo.cost import Work
from attnzoo.ops.attention import Geo, Keys, attention, computed_pairs
from attnzoo.parallel.tensor import Share


class Early:
    """Marks projections whose k and v exist before the cache: ``qkv(x, call) -> (q, k, v)``.

    ``lends``: the name under which later layers find its `Keys` in `Context.shared`; "" = they do not.
    """

    late = False
    lends = ""

    def maps(self) -> tuple[Tensor | None, Tensor | None]:
        """``(H,)`` which key and which value head each query head reads; None = consecutive groups."""
        return None, None


class Late:
    """Marks projections that cache something smaller and make k and v from it.

    ``rows(x, call) -> (q, q_rot, {name: row})``; ``keys(rows, call) -> (k, v)``. Keys are rotated at read,
    at the positions that the frame keeps, unless ``keys_turned``. Rows named in ``turned`` are rotated before
    the cache instead and appended to k (and ``q_rot`` to q) by ``join`` after refinement, so that refine maps
    touch content only. ``absorbed(q, q_rot, rows, turn) -> (q, Keys, finish)`` reads the rows as they are, q
    turned where nothing is in ``turned``; ``turn(k)`` rotates a key at its place. ``absorbs(T, S)`` says when
    that is cheaper.
    """

    late = True
    lends = ""
    turned: tuple[str, ...] = ()
    keys_turned = False

    def maps(self) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def absorbs(self, new: int, keys: int) -> bool:
        return False

    def heads_share(self, share: Share) -> Share:
        """What of the heads a rank has, where what follows is additive; see `Mixer.heads_share`."""
        return share

    def cached(self, rows: dict[str, Tensor], call: Call) -> tuple[dict[str, Tensor], Axis, bool]:
        """All rows so far, with their axis and whether the last of them are this forward's tokens."""
        rows = {name: call.mem.rows(name, row) for name, row in rows.items()}
        return rows, call.mem.axis(), call.mem.aligned


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
    """Read stage: one joint read of all keys.

    A read that does other work than one dot product and one weighted sum per visible pair says so by
    ``counts = True`` and lists it in `Stage.work`. One that reads more than ``keys`` says ``whole = True``:
    its queries are then not absorbed into latents. ``plain = False`` where its reads want more than outputs,
    which no fused path gives.
    """

    counts = False
    whole = False
    plain = True
    alike = True

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        return attend(q, keys)


class ScoreAttention(Mixer):
    """Attention by scores over keys; see the module.

    Args (slots): project, refine, position, score, mask, normalise, read, combine, out, after. ``score`` and
    ``normalise`` are None for the scaled dot product and the softmax, which fused kernels serve.
    ``sizes``: heads that have scores, and the widths of their keys and values.
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
        after: list[Stage],
        scale: float,
        sizes: tuple[int, int, int],
    ) -> None:
        super().__init__(after)
        self.project, self.position, self.score, self.mask = project, position, score, mask
        self.normalise, self.read, self.out = normalise, read, out
        self.refine = nn.ModuleList(sorted(refine, key=lambda s: s.rank))
        self.combine = nn.ModuleList(sorted(combine, key=lambda s: s.rank))
        self.scale, self.sizes = scale, sizes

    def heads(self, call: Call) -> Tensor:
        """``(B, T, H, d_v)``."""
        if self.score is not None:
            self.score.begin(call)
        q, keys, finish = self._late(call) if self.project.late else self._early(call)
        mask, query = self.mask(q, keys, call), call.query
        if not mask.causal:
            query, keys = _without_padding(query, keys, call)

        def attend(q: Tensor, *sets, also: tuple[str, ...] = ()):
            return attention(
                q,
                *sets,
                mask=mask,
                query=query,
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
        rows, maps = call.mem.rows, self.project.maps()
        keys = Keys(rows("k", k), rows("v", v), call.mem.axis(), call.mem.aligned, *maps)
        return *self.position.at_read(q, self._lent(keys, call), call), _as_is

    def _late(self, call: Call):
        project = self.project
        q, q_rot, rows = project.rows(call.x, call)
        for name in project.turned:
            q_rot, rows[name] = self.position(q_rot, rows[name], call)
        rows, axis, aligned = project.cached(rows, call)
        turn_q = lambda z: z if project.turned else self.position.turn(z, call.line.pos, call)  # noqa: E731
        rotates = self.position.rotates
        turn_k = lambda z: self.position.turn(z, call.mem.places(), call) if rotates else z  # noqa: E731
        plain = not self.refine and self.score is None and not self.read.whole and not self.position.appended
        if plain and project.absorbs(q.shape[2], axis.order.shape[1]):
            call.raw = Raw(q, None, None)
            q, keys, finish = project.absorbed(turn_q(q), q_rot, rows, turn_k)
            return q, keys._replace(axis=axis, aligned=aligned), finish
        q, k, v = self._refined(q, *project.keys(rows, call), call)
        call.raw = Raw(q, k, v)
        if project.turned:
            q, k = project.join(q, q_rot, k, rows)
        else:
            q, k = turn_q(q), k if project.keys_turned else turn_k(k)
        keys = self._lent(Keys(k, v, axis, aligned, *project.maps()), call)
        return *self.position.at_read(q, keys, call), _as_is

    def _lent(self, keys: Keys, call: Call) -> Keys:
        """The keys so far, as positions left them; also to later layers that read them."""
        if self.project.lends:
            call.shared[self.project.lends] = keys
        return keys

    def _refined(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        for stage in self.refine:
            q, k, v = stage(q, k, v, call)
        return q, k, v

    def chain(self) -> Iterable[Stage]:
        single = (self.project, *self.refine, self.position, self.score, self.mask, self.normalise, self.read)
        return (s for s in (*single, *self.combine, self.out) if s is not None)

    def heads_share(self, share: Share) -> Share:
        adds_up = self.project.late and all(stage.additive for stage in self.combine)
        return self.project.heads_share(share) if adds_up else share

    def split(self, share: Share) -> None:
        super().split(share)
        self.sizes = (self.sizes[0] // share.ranks, *self.sizes[1:])

    def retain(self) -> Retain | None:
        return self.mask.retain()

    def work(self, length: int) -> Iterable[Work]:
        if self.read.counts:
            return
        mask, (heads, width, v_width) = self.mask.mask, self.sizes
        width -= sum(stage.dropped() for stage in self.refine if hasattr(stage, "dropped"))
        per_pair, appended = 2 * heads * (width + v_width), 2 * heads * self.position.appended
        visible, computed = mask.pairs(length), computed_pairs(mask, length, self.impl)
        why = "hidden keys of a tile"
        yield Work("mixing", "attention", per_pair * visible, per_pair * computed, why, per_head=True)
        if appended:
            yield Work("mixing", "bias", 0, appended * computed, "channels that carry the bias")
        if self.score is not None:
            extra = self.score.pair_flops()
            yield Work("mixing", "score", extra * visible, extra * computed, why)


def _without_padding(query: Axis, keys: Keys, call: Call) -> tuple[Axis, Keys]:
    """Padding sees itself alone: a mask that shows later tokens would show it as the end of a document."""
    valid = call.line.valid
    if valid is None or keys.axis.doc is not call.line.doc:  # a cache holds no padding
        return query, keys
    doc = torch.where(valid, query.doc, -1)
    return query._replace(doc=doc), keys._replace(axis=keys.axis._replace(doc=doc))


def _as_is(o: Tensor) -> Tensor:
    return o
