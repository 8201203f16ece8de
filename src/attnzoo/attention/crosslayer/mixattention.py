"""MixAttention: most layers read a sliding window, a few all keys, and both kinds reuse earlier layers' keys.

Inference-Friendly Models With MixAttention, arXiv 2409.15012.

    kinds of layers:  full, slide (own keys), full_reuse, slide_reuse (the keys of an earlier layer, rotated)
    slide, slide_reuse:  keys j with i - w < j <= i        full, full_reuse:  keys j <= i
    a reuse by -n reads layer l - n, and where that one reuses, the layer that made its keys
    reference plan, 13 layers: full, then twice
        (slide, slide_reuse, slide, slide_reuse, slide_reuse, full_reuse)

Cached: 2 G d per token in full layers, a ring of w rows of 2 G d in slide layers, nothing in layers that
reuse. Our choice: w counts the token itself (the released code's window counts previous tokens, w = that
+ 1); without a plan the reference one goes on over the depth; a bare slide_reuse reuses -1, a bare full_reuse
the nearest full layer. A windowed layer may read a full one's keys, not the other way round: they would be
evicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attnzoo.attention.crosslayer.borrow import share_keys
from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.mask import Causal, Static
from attnzoo.cards import Claim
from attnzoo.registry import Card, register

KINDS = ("full", "slide", "full_reuse", "slide_reuse")
CYCLE = ("slide", "slide_reuse", "slide", "slide_reuse", "slide_reuse", "full_reuse")


class Layer(NamedTuple):
    """One layer of a plan: its kind, and the distance to the layer it reuses (0 = not said)."""

    kind: str
    reuse: int = 0


def default_plan(depth: int) -> list[str]:
    """The reference pattern over ``depth`` layers."""
    return ["full", *(CYCLE[i % len(CYCLE)] for i in range(depth - 1))]


def expand(plan: Sequence[Any]) -> list[Layer]:
    """The layers of a plan, depth first.

    Args:
        plan: items, each a kind, or a mapping: ``name`` (a kind) with ``reuse`` (below 0), or ``order`` (a
            plan), either with ``repeat``.

    Raises:
        ValueError: an item is none of these.
    """
    layers: list[Layer] = []
    for item in plan:
        item = {"name": item} if isinstance(item, str) else item
        legal = isinstance(item, Mapping) and not item.keys() - {"name", "order", "repeat", "reuse"}
        if not legal or ("name" in item) == ("order" in item):
            raise ValueError(f"plan: an item is a kind, or has name or order, repeat and reuse; got {item!r}")
        repeat, reuse = item.get("repeat", 1), item.get("reuse")
        if not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"plan: repeat must be at least 1, got {repeat!r}")
        if "order" in item:
            if reuse is not None:
                raise ValueError(f"plan: reuse belongs to a layer, got it beside order in {item!r}")
            layers += expand(item["order"]) * repeat
            continue
        if item["name"] not in KINDS:
            raise ValueError(f"plan: must name one of {', '.join(KINDS)}, got {item['name']!r}")
        if reuse is not None and not item["name"].endswith("_reuse"):
            raise ValueError(f"plan: {item['name']} makes its own keys, got reuse={reuse}; name it *_reuse")
        if reuse is not None and (not isinstance(reuse, int) or reuse >= 0):
            raise ValueError(f"plan: reuse counts layers back and must be below 0, got {reuse!r}")
        layers += [Layer(item["name"], reuse or 0)] * repeat
    return layers


def producers(layers: Sequence[Layer]) -> list[int]:
    """The layer that makes the keys of each layer.

    Raises:
        ValueError: a layer that is reused does not exist, or its keys are evicted before they are needed.
    """
    found: list[int] = []
    for i, (kind, reuse) in enumerate(layers):
        if not kind.endswith("_reuse"):
            found.append(i)
            continue
        source = i + (reuse or (_nearest_full(layers, i) if kind == "full_reuse" else -1))
        if source < 0 or (reuse == 0 and source >= i):
            raise ValueError(f"plan: layer {i} ({kind}) has no layer to reuse before it, got reuse={reuse}")
        made = found[source]
        if kind == "full_reuse" and layers[made].kind == "slide":
            raise ValueError(
                f"plan: layer {i} (full_reuse) reads all keys of layer {made}, which keeps a window of them; "
                "let it reuse a full layer"
            )
        found.append(made)
    return found


def _nearest_full(layers: Sequence[Layer], i: int) -> int:
    """Distance to the nearest earlier layer that reads all keys; 0 = there is none."""
    return next((back for back in range(-1, -i - 1, -1) if layers[i + back].kind.startswith("full")), 0)


@register(
    Card(
        name="mixattention",
        title="MixAttention",
        paper="Inference-Friendly Models With MixAttention",
        arxiv="2409.15012",
        family="crosslayer",
        summary="Sliding windows in most layers, and keys reused across layers of a kind.",
        cached="k, v: all of full layers, a window of slide layers, nothing where they are reused",
        claims=(
            Claim("far less memory", "cache_bytes", "lower", "mha", "contexts well beyond the window"),
            Claim("faster decoding", "decode_ms", "lower", "mha", "contexts well beyond the window"),
            Claim("similar quality", where="tasks of short context"),
            Claim(
                "a few full layers with keys made in deep layers are needed", where="tasks of long context"
            ),
        ),
        small={"window": 5},
        layers=7,
    ),
    host={"window": 1024},
)
def mixattention(draft: Draft, *, plan: tuple[Any, ...] | None = None) -> None:
    """Gives the layer its window and its keys by a plan.

    Args:
        plan: one item per layer after expansion, see `expand`; default the reference pattern.

    ``window`` (default 1024) counts the token itself.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with full layers only; cla with full and full_reuse in turn; full layers at windows >= T.
    """
    layer, depth = draft.site.layer, draft.site.depth
    if draft.host["window"] is None:
        raise ValueError("window: slide layers need one, got None; a plan of full layers only ignores it")
    layers = expand(default_plan(depth) if plan is None else plan)
    if len(layers) != depth:
        raise ValueError(f"plan: needs one layer per layer of the model, depth is {depth}, got {len(layers)}")
    made = producers(layers)
    if layers[layer].kind.startswith("full"):
        draft.put("mask", Static(Causal()))
    share_keys(draft, made[layer])
