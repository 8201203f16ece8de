"""Keys and values of an earlier layer: what producer and consumer agree on, and the consumer's projection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Late
from attnzoo.attention.site import Site
from attnzoo.attention.slots import Retain
from attnzoo.attention.stages.mask import Static, band
from attnzoo.attention.stages.project import QKV
from attnzoo.attention.timeline import Axis
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.parallel.tensor import CannotSplit, Share


@dataclass(frozen=True)
class KVSpec:
    """What a consumer must know of the keys it reads.

    Args:
        k, v: (heads, width) of keys and values.
        pos: what turned the keys; theta: its base, 0 where it has none.
        keeps: (first, last) keys of a document that are kept, or needed; None = all.
    """

    k: tuple[int, int]
    v: tuple[int, int]
    pos: str
    theta: float
    keeps: tuple[int, int] | None

    def accepts(self, offered: object) -> bool:
        """Whether keys as ``offered`` serve: the same ones, and none evicted that are needed."""
        if not isinstance(offered, KVSpec):
            return False
        same = (self.k, self.v, self.pos, self.theta) == (offered.k, offered.v, offered.pos, offered.theta)
        if offered.keeps is None or not same:
            return same
        return self.keeps is not None and all(a <= b for a, b in zip(self.keeps, offered.keeps, strict=True))


class BorrowedKV(Late, Stage):
    """Queries of its own on the keys and values that an earlier layer left in `Context.shared`.

    They come turned, and with the places of the producer's cache: nothing is cached here.

    Args:
        heads, width: of the queries. source: name of the entry. k_map, v_map: see `Early.maps`.
    """

    keys_turned = True

    def __init__(
        self,
        site: Site,
        dim: int,
        heads: int,
        width: int,
        bias: bool,
        source: str,
        k_map: Tensor | None = None,
        v_map: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.width, self.source = dim, heads, width, source
        self.layer = site.layer
        self.q_proj = site.weights.linear("q", dim, heads * width, bias, parts=[heads * width])
        self.register_buffer("k_map", k_map)
        self.register_buffer("v_map", v_map)

    def maps(self) -> tuple[Tensor | None, Tensor | None]:
        return self.k_map, self.v_map

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, None, dict[str, Tensor]]:
        """x ``(B, T, D)`` -> q ``(B, H, T, d)``."""
        return self.q_proj(x).unflatten(-1, (self.heads, self.width)).transpose(1, 2), None, {}

    def cached(self, rows: dict[str, Tensor], call: Call) -> tuple[dict[str, Tensor], Axis, bool]:
        keys: Keys | None = call.shared.get(self.source)
        if keys is None:
            raise ValueError(
                f"shared: layer {self.layer} reads {self.source!r}, the keys of an earlier layer, which "
                "are not in the Context; run both layers in one model, or pass both the same Context"
            )
        return {"k": keys.k, "v": keys.v}, keys.axis, keys.aligned

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        return rows["k"], rows["v"]

    def split(self, share: Share) -> None:
        if self.k_map is not None:
            raise CannotSplit("tables say which of another layer's keys a head reads")
        share.rows(self.q_proj, (self.heads, self.width))
        self.heads = share.count(self.heads)

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_q", 2 * length * self.dim * self.heads * self.width, per_head=True)


def share_keys(draft: Draft, source: int) -> None:
    """Lets the drafted layer read the keys of layer ``source``; where that is itself, it leaves them.

    Raises:
        ValueError: when the draft settles, where another variant's projection or key maps have no place in a
            layer without keys of its own.
    """
    name, lends = f"kv.{source}", source == draft.site.layer
    if draft.lends or draft.borrows:
        raise ValueError(
            f"add: {draft.current} says whose keys a layer reads, another variant of the composition already "
            "does; leave one of them out"
        )
    if lends:
        draft.lends = name
    else:
        draft.borrows = True

    def settled(done: Draft) -> None:
        project = done.slots.get("project")
        if getattr(project, "late", False):
            raise ValueError(
                f"add: {done.owner['project']} makes keys at read from a latent of its own layer, "
                f"{done.current} reads another layer's keys; leave one of them out"
            )
        table = done.gives if lends else done.needs
        table[name] = _spec(done)
        if lends:
            return
        done.slots["refine"] = [stage for stage in done.slots["refine"] if "q" in stage.sides]
        for stage in done.slots["refine"]:
            if stage.sides != "q":
                raise ValueError(
                    f"add: {type(stage).__name__} maps queries and keys together, {done.current} borrows "
                    "keys that are already mapped and turned; leave one of them out"
                )
        maps = (None, None)
        if isinstance(project, QKV) and project.plain_queries:
            maps = project.maps()
            del done.slots["project"], done.owner["project"]
        bias = done.host["qkv_bias"]
        done.put("project", BorrowedKV(done.site, done.dim, *done.shapes()["q"], bias, name, *maps))

    # after the hooks of all variants, which may still change shapes and stages
    draft.very_last(settled)


def _spec(draft: Draft) -> KVSpec:
    host, shapes = draft.host, draft.shapes()
    mask = draft.slots.get("mask") or Static(band(host["window"], host["n_sink"]))
    keeps: Retain | None = mask.retain()
    pos = draft.owner.get("position", host["pos"])
    theta = host["rope_theta"] if pos == "rope" else 0.0
    return KVSpec(shapes["k"], shapes["v"], pos, theta, None if keeps is None else tuple(keeps))
