"""The contract of a mixer and of the stages it is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.attention import timeline
from attnzoo.attention.call import Call
from attnzoo.attention.part import PartMemory
from attnzoo.attention.site import Site
from attnzoo.attention.slots import Cache, Retain, Slot, build_cache
from attnzoo.attention.timeline import Clock
from attnzoo.context import Context
from attnzoo.cost import Cost, Work, tally
from attnzoo.objective import BlockDiffusion
from attnzoo.parallel.tensor import CannotSplit, Share


class Stage(nn.Module):
    """One step of a mixer. It does one thing and knows no other stage.

    ``rank`` sorts the stages of a chain (refine, combine, after); `score` lists the usual numbers. ``exact``
    is False where `work` bounds a count that depends on the data. ``sides``: which of q, k, v a refine stage
    changes. ``additive``: the output of a sum is the sum of outputs.

    Where ranks share heads: ``alike``: it does the same to every head, by weights that all heads share or
    none. ``unsplit``: why it has no plan, where `split` is not its own.
    """

    rank = 0
    exact = True
    sides = "qkv"
    additive = False
    alike = False
    unsplit = "no plan tells its heads apart"

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # a plan does not know what a subclass changes, so each has its own or none
        for name in {"split", "alike"} - vars(cls).keys():
            setattr(cls, name, vars(Stage)[name])

    def split(self, share: Share) -> None:
        """Keeps the heads of one rank: weights, counts, shapes.

        Raises:
            CannotSplit: with the reason; the stage is then of no use.
        """
        if not self.alike:
            raise CannotSplit(self.unsplit)
        share.keep(self)

    def members(self) -> Iterable[Stage]:
        """The stages it is made of, itself included."""
        return (self,)

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """Runs once after every optimiser step, never in a forward: what changes outside the gradient.

        Args:
            step: optimiser steps done. stats: what the layer reported by `Call.step`, averaged over
                micro-batches and ranks. generator: the same draws on every rank.
        """

    def memory(self) -> dict[str, Slot]:
        """What the stage keeps across calls, by slot name."""
        return {}

    def work(self, length: int) -> Iterable[Work]:
        """Matmul-like work over a sequence of ``length`` tokens."""
        return ()

    def apart(self) -> str | None:
        """Why it cannot work where each rank holds a part of the sequence; None = it can."""
        return None

    def elementwise(self) -> dict[str, float]:
        """Work worth listing that is not matmul-like: name -> operations per token."""
        return {}

    def active(self) -> float:
        """The share of heads that the stage keeps on."""
        return 1.0


class Choice(NamedTuple):
    """impl: "reference", "sdpa", "flex", "triton" or "xformers"; reason: why that one."""

    impl: str
    reason: str


Choices = dict[str, Choice]  # by device type


def same(impl: str, reason: str) -> Choices:
    """One choice for every device."""
    return {"cpu": Choice(impl, reason), "cuda": Choice(impl, reason)}


class Mixer(nn.Module):
    """A token mixer: ``(B, T, D) -> (B, T, D)``; the contract that every variant meets.

    Attributes:
        name: registry name; ``options``: all options it was made with; ``dim``, ``num_heads``; ``site``.
        choices: the implementation and its reason by device type; ``impl``, ``impl_reason``: those of the
            device that the parameters are on.
        gives, needs: what it leaves in `Context.shared` for later layers and reads there from earlier ones,
            each with what both sides must agree on.
        objective: how it must be trained and sampled, where that is not by the next token.
        single_residual: whether a block has one residual around mixer and MLP together, none between them.
        after: stages on the output, each called as ``stage(y, call)``.
        share: the rank's share of the heads, where ranks share them; see `attnzoo.parallel.tensor`.
    """

    name: str = ""
    objective: BlockDiffusion | None = None
    single_residual: bool = False
    options: dict[str, object]
    dim: int
    num_heads: int
    site: Site
    choices: Choices = same("reference", "the only implementation")
    gives: Mapping[str, object] = {}
    needs: Mapping[str, object] = {}
    share: Share | None = None

    def __init__(self, after: Iterable[Stage] = ()) -> None:
        super().__init__()
        self.after = nn.ModuleList(sorted(after, key=lambda s: s.rank))

    def chosen(self, device: torch.device) -> Choice:
        """The implementation that runs on ``device``."""
        return self.choices["cpu" if device.type in ("cpu", "meta") else "cuda"]

    @property
    def impl(self) -> str:
        return self.chosen(next(self.parameters()).device).impl

    @property
    def impl_reason(self) -> str:
        return self.chosen(next(self.parameters()).device).reason

    def forward(self, x: Tensor, ctx: Context | None = None, cache: Cache | None = None) -> Tensor:
        """Mixes tokens.

        Args:
            x: ``(B, T, D)``.
            ctx: documents, positions, losses; see `Context`.
            cache: from `new_cache`; the tokens of ``x`` follow those it holds.

        Returns:
            ``(B, T, D)``, zero at padding.

        Raises:
            ValueError: ``x`` is not ``(B, T, D)`` with T >= 1, or a Context field does not fit.
        """
        ctx = ctx or Context()
        if x.dim() != 3 or x.shape[-1] != self.dim or x.shape[1] == 0:
            raise ValueError(f"x: must be (B, T, {self.dim}) with T >= 1, got {tuple(x.shape)}")
        if cache is not None and cache.batch != x.shape[0]:
            raise ValueError(f"cache: made for batch {cache.batch}, got x with batch {x.shape[0]}")
        if ctx.span is not None and ctx.timeline is None:
            raise ValueError("span: is a model's, which cuts sequences into parts; run the mixer in a model")
        line = ctx.timeline or timeline.read(ctx, *x.shape[:2], x.device, cache.clock if cache else None)
        asked = self.options.get("impl")
        impl = asked if asked in ("reference", "triton") else "auto"
        call = Call(self.site, x, ctx, line, cache, impl)
        if ctx.span is not None:
            call.mem = PartMemory(line, ctx.span, x, self.memory(), self.retain())
        y = self._mixed(call)
        for stage in self.after:
            y = stage(y, call)
        y = call.mem.close(y)
        if ctx.timeline is None:
            line.advance()
            y = line.restore(y)
        return y

    def _mixed(self, call: Call) -> Tensor:
        """What the heads add to the stream, ``(B, T, D)``."""
        share, x = self.share, call.x
        if share is None:
            return self.out(self.heads(call), call)
        call.x, call.share = share.enter(x), share
        y = share.leave(self.out(self.heads(call), call))
        call.x, call.share = x, None
        return y

    def heads(self, call: Call) -> Tensor:
        """Per-head outputs before the output projection; ``(B, T, H, d_v)``."""
        raise NotImplementedError

    def split(self, share: Share) -> None:
        """Keeps one rank's heads, and its part of the weights up to the output projection.

        Raises:
            CannotSplit: naming the stage that cannot, and why; the mixer is then of no use.
        """
        heads = self.heads_share(share)
        for stage in (part for whole in self.chain() for part in whole.members()):
            try:
                stage.split(heads)
            except CannotSplit as error:
                raise CannotSplit(f"{type(stage).__name__}: {error}") from None
        if self.num_heads % (heads.ways or heads.ranks) == 0:
            self.num_heads = heads.count(self.num_heads)
        self.share = share

    def heads_share(self, share: Share) -> Share:
        """What of the heads a rank has, where it is not as many as others have."""
        return share

    def stages(self) -> Iterator[Stage]:
        """The stages in order, with those that stages are made of."""
        for stage in (*self.chain(), *self.after):
            yield from stage.members()

    def chain(self) -> Iterable[Stage]:
        """The stages up to the output projection."""
        raise NotImplementedError

    def memory(self) -> dict[str, Slot]:
        """The slots of all stages."""
        slots: dict[str, Slot] = {}
        for stage in self.stages():
            own = stage.memory()
            assert not own.keys() & slots.keys(), f"two stages keep {sorted(own.keys() & slots.keys())}"
            slots |= own
        return slots

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        """See `Stage.on_step`."""
        for stage in self.stages():
            stage.on_step(step, stats, generator)

    def retain(self) -> Retain | None:
        """What the mask can still need of the past; None = everything."""
        return None

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        clock: Clock | None = None,
    ) -> Cache:
        """Empty memory for decoding: what the paper stores, and nothing more.

        Args:
            batch_size: rows.
            max_len: tokens per row that growing memory has room for.
            dtype: of cached rows and tails (default: the parameters'); scan states stay fp32, or fp64 in a
                double module.
            clock: shared by the layers of a model.
        """
        like = next(self.parameters())
        double = like.dtype == torch.float64
        return build_cache(
            self.memory(),
            self.retain(),
            batch_size,
            max_len,
            dtype or like.dtype,
            device or like.device,
            double,
            clock,
        )

    def cost(self, seq_len: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """Costs at sequences of ``seq_len`` tokens with caches of ``dtype``; see `Cost`."""
        if seq_len < 1:
            raise ValueError(f"seq_len: must be at least 1, got {seq_len}")
        stages = list(self.stages())
        work = [w for stage in stages for w in stage.work(seq_len)] + list(self.work(seq_len))
        elementwise = {k: v for stage in stages for k, v in stage.elementwise().items()}
        slots, retain = self.memory(), self.retain()
        state_size = 8 if next(self.parameters()).dtype == torch.float64 else 4
        rows = sum(s.size for s in slots.values() if s.kind == "rows") * dtype.itemsize
        grows = sum(s.size * s.item(dtype, state_size) / s.per for s in slots.values() if s.kind == "blocks")
        fixed = sum(
            s.size * s.item(dtype, state_size) for s in slots.values() if s.kind not in ("rows", "blocks")
        )
        if retain is None:
            grows += rows
        else:
            fixed += rows * retain.size
        return Cost(
            params=sum(p.numel() for p in self.parameters()),
            cache_bytes_per_token=grows,
            state_bytes=fixed,
            elementwise=elementwise,
            weight_flops=sum(m.weight_flops() for m in self.modules() if hasattr(m, "weight_flops")),
            exact=all(s.exact for s in stages),
            **tally(work, seq_len, math.prod(s.active() for s in stages)),
        )

    def work(self, length: int) -> Iterable[Work]:
        """Work of the mixing itself, which no stage owns."""
        return ()

    def extra_repr(self) -> str:
        return f"{self.name}, impl={self.impl}"
