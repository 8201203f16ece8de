"""Context parallelism: each rank holds a contiguous part of every sequence.

It is chunked prefill over ranks: what a cache would hold of earlier tokens comes from the ranks to the left.
Rank r reads tokens ``r T / ranks`` to ``(r + 1) T / ranks``; its layers see the rows of ranks 0 to r, and the
last tokens and the states of its left neighbour (`attnzoo.attention.part`). Whatever decodes by
`rows`, `tail` and `state` runs so, with the same outputs and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from attnzoo.attention.base import Mixer
from attnzoo.parallel.exchange import Group
from attnzoo.registry import lacking

READS = {
    "causal": "its tokens read later ones",
    "prefix_consistent": "what its tokens read depends on the whole sequence",
    "decodes": "it cannot go on from earlier tokens",
}


class Link(Protocol):
    """One forward's exchanges of one layer; see `attnzoo.parallel.exchange.Exchange`."""

    def gather(self, z: Tensor, dim: int) -> Tensor: ...
    def extend(self, z: Tensor, n: int, dim: int) -> Tensor: ...
    def receive(self, like: Tensor) -> Tensor: ...
    def send(self, value: Tensor) -> None: ...
    def total(self, z: Tensor) -> Tensor: ...
    def tie(self, y: Tensor) -> Tensor: ...


class Channel(Protocol):
    """How ranks reach each other: `attnzoo.parallel.exchange.Group`, or `Successive` inside one process."""

    def open(self) -> Link: ...


@dataclass(frozen=True)
class Span:
    """One rank's part of every sequence.

    Args:
        rank: which part, in the order of the tokens. ranks: parts. channel: to the other ranks.
    """

    rank: int
    ranks: int
    channel: Channel

    def cut(self, z: Tensor, dim: int = 1) -> Tensor:
        """The rank's own tokens of ``z``.

        Raises:
            ValueError: they cannot be dealt out evenly.
        """
        length = z.shape[dim]
        if length % self.ranks:
            raise ValueError(
                f"span: tokens must be a multiple of its {self.ranks} ranks, got {length}; "
                "make the sequences longer or shorter"
            )
        return z.narrow(dim, self.rank * (length // self.ranks), length // self.ranks)


def connect(rank: int, ranks: int, group: ProcessGroup | None = None) -> Span:
    """The span of rank ``rank`` of the ``ranks`` processes of ``group``, which hold parts in this order."""
    return Span(rank, ranks, Group(group))


def spans(mixer: Mixer) -> str | None:
    """Why a mixer cannot work on parts of sequences; None = it can."""
    for trait, why in READS.items():
        if lacking(mixer, trait):
            return why
    blocks = sorted(name for name, slot in mixer.memory().items() if slot.kind == "blocks")
    if blocks:
        return (
            f"it keeps summaries of blocks ({', '.join(blocks)}), which may begin and end on different ranks"
        )
    if mixer.impl == "xformers":
        return "xformers reads packed documents only from their first token on (use impl=sdpa)"
    return next((why for why in (stage.apart() for stage in mixer.stages()) if why is not None), None)


def check_spans(model: nn.Module, ranks: int, seq_len: int) -> None:
    """Whether a model can be trained on ``ranks`` parts of sequences of ``seq_len`` tokens.

    Raises:
        ValueError: it cannot; the message names what is in the way.
    """
    if ranks == 1:
        return
    found = [(i, mixer.name, spans(mixer)) for i, mixer in enumerate(model.mixers)]
    reasons = [f"layer {i} ({name}): {why}" for i, name, why in found if why is not None]
    if reasons:
        raise ValueError(
            f"launcher.context_parallel: {'; '.join(reasons)}; got {ranks}, "
            "set it to 1 or replace these layers"
        )
    if model.config["prefix_tokens"]:
        raise ValueError(
            "model.prefix_tokens: learned tokens would shift the parts that ranks hold, got "
            f"{model.config['prefix_tokens']} with launcher.context_parallel={ranks}; set one of them to "
            "its default"
        )
    if seq_len % ranks:
        raise ValueError(
            f"data.seq_len: must be a multiple of launcher.context_parallel={ranks}, got {seq_len}; "
            f"take {seq_len // ranks * ranks or ranks}"
        )
