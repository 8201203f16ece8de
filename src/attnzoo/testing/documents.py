"""Properties of packing: a document does not know what it was packed with, and padding does not exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from attnzoo.testing.memory import SPLITS, in_pieces
from attnzoo.testing.subject import LENGTH, Subject, gap, inputs, require

# documents of length 1, boundaries off block edges, padding left, right and inside
PACKED = (
    (1,) * 5 + (2,) + (3,) * 8 + (0,) * 3 + (4,) * 4,
    (0, 0) + (7,) * 3 + (0,) + (7,) * 2 + (1,) + (9,) * 11 + (0,),
)
GARBAGE = (float("nan"), float("inf"), 1e4)


def documents(subject: Subject) -> None:
    """Packed documents equal each alone; garbage in padding (NaN too) changes nothing and comes out zero."""
    mixer, x, ids = subject.mixer().eval(), inputs(), torch.tensor(PACKED)
    if not subject.has("packs"):
        _refuses_ids(mixer, x, ids)
        return
    with torch.no_grad():
        for garbage in GARBAGE:
            filled = torch.where((ids == 0)[..., None], torch.full_like(x, garbage), x)
            y = mixer(filled, Context(segment_ids=ids))
            require(
                bool((y[ids == 0] == 0).all()), f"outputs at padding are not zero (padding held {garbage})"
            )
            for b, where in _each_document(ids):
                alone = mixer(x[b : b + 1, where])[0]
                error = gap(y[b, where], alone)
                require(error <= 1e-10, f"a packed document differs by {error:.1e} from itself alone")


def document_gradients(subject: Subject) -> None:
    """Gradients of packed documents, to x and to every parameter, equal those of each document alone."""
    if not (subject.has("packs") and subject.has("trains")):
        return
    mixer, ids, probe = subject.mixer(), torch.tensor(PACKED), inputs(seed=3)
    x = inputs()
    packed = torch.where((ids == 0)[..., None], torch.full_like(x, float("nan")), x).requires_grad_()
    params = list(mixer.parameters())
    loss = (mixer(packed, Context(segment_ids=ids)) * probe).sum()
    got = torch.autograd.grad(loss, [packed, *params], allow_unused=True)
    x.requires_grad_()
    loss = sum((mixer(x[b : b + 1, where])[0] * probe[b, where]).sum() for b, where in _each_document(ids))
    want = torch.autograd.grad(loss, [x, *params], allow_unused=True)
    names = ["x", *(name for name, _ in mixer.named_parameters())]
    noise = 1e-10 * max(float(b.abs().max()) for b in want if b is not None)
    for name, a, b in zip(names, got, want, strict=True):
        if b is None or float(b.abs().max()) <= noise:
            require(
                a is None or float(a.abs().max()) <= noise,
                f"packing gives {name} a gradient that it has not alone",
            )
            continue
        error = gap(a, b)
        require(error <= 1e-9, f"the gradient to {name} of packed documents differs by {error:.1e}")


def document_decode(subject: Subject) -> None:
    """With a cache the ids go on per row: decoding packed, padded rows in pieces equals one forward."""
    if not (subject.has("packs") and subject.has("decodes")):
        return
    mixer, ids = subject.mixer().eval(), torch.tensor(PACKED)
    x = torch.where((ids == 0)[..., None], float("nan"), inputs())
    with torch.no_grad():
        y = mixer(x, Context(segment_ids=ids))
        for split in SPLITS:
            error = gap(in_pieces(mixer, x, split, ids), y)
            require(error <= 1e-9, f"decoding packed rows in pieces of {split} differs by {error:.1e}")


def unequal_prompts(subject: Subject) -> None:
    """Prompts of unequal length, padded on either side, then decoded together equal one by one."""
    if not (subject.has("packs") and subject.has("decodes")):
        return
    mixer, x, sizes = subject.mixer().eval(), inputs(batch=3), (9, 4, 1)
    steps = LENGTH - max(sizes)
    for left in (True, False):
        ids = torch.zeros(3, max(sizes), dtype=torch.long)
        prompt = torch.full((3, max(sizes), x.shape[-1]), float("nan"), dtype=x.dtype)
        for b, size in enumerate(sizes):
            where = slice(max(sizes) - size, None) if left else slice(0, size)
            ids[b, where], prompt[b, where] = 1, x[b, :size]
        with torch.no_grad():
            cache = mixer.new_cache(3, LENGTH)
            mixer(prompt, Context(segment_ids=ids), cache)
            more = [
                torch.stack([x[b, size + s] for b, size in enumerate(sizes)])[:, None] for s in range(steps)
            ]
            together = torch.cat([mixer(step, cache=cache) for step in more], dim=1)
            for b, size in enumerate(sizes):
                alone = mixer(x[b : b + 1, : size + steps])[0, size:]
                error = gap(together[b], alone)
                require(error <= 1e-9, f"a prompt of {size} tokens decoded in a batch differs by {error:.1e}")


def _each_document(ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(row, indices) of every document; padding inside a document does not split it."""
    for b, row in enumerate(ids):
        for ident in row[row > 0].unique():
            yield b, (row == ident).nonzero()[:, 0]


def _refuses_ids(mixer: Mixer, x: Tensor, ids: Tensor) -> None:
    try:
        mixer(x, Context(segment_ids=ids))
    except ValueError:
        return
    raise AssertionError("the card says packs=False, but segment_ids do not raise ValueError")
