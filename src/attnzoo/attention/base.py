"""The contract of a mixer and of the stages it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.attention import timeline
from attnzoo.attention.memory import Cache, Clock, Memory, Retain, Slot, build_cache
from attnzoo.attention.timeline import Axis, Timeline
from attnzoo.context import Context
from attnzoo.cost import Cost, Work, tally
from attnzoo.objective import BlockDiffusion

INIT_STD = 0.02


class Plain:
    """The default weight provider: one `nn.Linear` per name."""

    def linear(
        self,
        name: str,
        d_in: int,
        d_out: int,
        bias: bool = False,
        std: float = INIT_STD,
        parts: Sequence[int] | None = None,
    ) -> nn.Module:
        """A linear map, weights N(0, std²), zero bias.

        Args:
            name: which matrix of the layer it is.
            parts: widths of the matrices that lie side by side in it (default: it is one); a provider that
                shares or makes weights may treat each on its own. What it returns may have
                ``weight_flops()``, the FLOPs of making the weights once per forward.
        """
        layer = nn.Linear(d_in, d_out, bias=bias)
        nn.init.normal_(layer.weight, std=std)
        if bias:
            nn.init.zeros_(layer.bias)
        return layer


class Site(NamedTuple):
    """Where a mixer stands: ``layer`` of ``depth``, the longest sequence, who makes its weights, and the
    modules that the layers of its model share.
    """

    layer: int = 0
    depth: int = 1
    max_len: int = 2048
    weights: Plain = Plain()
    bank: dict[str, nn.Module] | None = None

    def shared(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The module that all layers of the model know by ``name``, made by the first that asks.

        Register it on a stage: each layer then has it among its parameters, a model counts it once.
        """
        bank = {} if self.bank is None else self.bank
        if name not in bank:
            bank[name] = make()
        return bank[name]

    @property
    def out_std(self) -> float:
        """Standard deviation of output projections: the stream keeps its scale over depth."""
        return INIT_STD / math.sqrt(2 * self.depth)


def flag(
    param: nn.Parameter, *, decay: bool = True, lr_scale: float = 1.0, reinit: bool = True
) -> nn.Parameter:
    """Writes on a parameter what it asks of the optimiser and of initialisation passes."""
    param.no_weight_decay, param.lr_scale, param.no_reinit = not decay, lr_scale, not reinit
    return param


class Raw(NamedTuple):
    """Queries, keys and values ``(B, heads, T, d)`` before position; an absorbed read makes no k and v."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None


class Call:
    """One forward of one layer: the last argument of every stage.

    Attributes:
        x: ``(B, T, D)`` input, padding at the right and zero.
        residual: ``(B, T, D)`` the un-normalised stream (``x`` where the caller gave none).
        line: documents and positions of this forward; ``mem``: the layer's memory; ``shared``: the Context's
            dict.
        impl: what ops beside scores are asked for: "auto", "reference" or "triton".
        raw: q, k, v before position, once the projection has run.
        notes: what a stage hands to a later one of the same forward, by name.
    """

    def __init__(
        self, site: Site, x: Tensor, ctx: Context, line: Timeline, cache: Cache | None, impl: str = "auto"
    ) -> None:
        self.site, self.line, self.ctx, self.impl = site, line, ctx, impl
        self.shared = ctx.shared
        own = ctx.timeline is None
        self.x = line.compact(x) if own else x
        self.mem = Memory(line, cache)
        self.raw: Raw | None = None
        self.notes: dict[str, Any] = {}

    @property
    def residual(self) -> Tensor:
        if self.ctx.residual is None:
            return self.x
        return self.line.compact(self.ctx.residual) if self.ctx.timeline is None else self.ctx.residual

    @property
    def query(self) -> Axis:
        """Order and document of this forward's tokens."""
        return Axis(self.line.order, self.line.doc)

    @property
    def collects(self) -> bool:
        return self.ctx.collector is not None

    def aux(self, name: str, loss: Tensor, weight: float) -> None:
        """Reports an auxiliary loss (a scalar, not yet weighted) of this layer."""
        if self.ctx.collector is not None:
            self.ctx.collector.loss(name, self.site.layer, loss, weight)

    def stat(self, name: str, value: Tensor) -> None:
        """Reports a diagnostic; ``(B, T, ...)`` values come out in the caller's order, zero at padding."""
        if self.ctx.collector is not None:
            per_token = value.shape[:2] == self.x.shape[:2]
            self.ctx.collector.stat(name, self.site.layer, self.line.restore(value) if per_token else value)

    def step(self, name: str, value: Tensor) -> None:
        """Reports a statistic of this forward that `Stage.on_step` gets after the optimiser's step."""
        if self.ctx.collector is not None:
            self.ctx.collector.step(name, self.site.layer, value)

    def mean_over_tokens(self, z: Tensor) -> Tensor:
        """Mean of ``z`` ``(B, T, ...)`` over the tokens that are not padding."""
        valid = self.line.valid
        if valid is None:
            return z.flatten(0, 1).mean(0)
        weight = valid.to(z.dtype).reshape(*valid.shape, *(1,) * (z.dim() - 2))
        return (z * weight).flatten(0, 1).sum(0) / weight.sum().clamp(min=1)


class Stage(nn.Module):
    """One step of a mixer. It does one thing and knows no other stage.

    ``rank`` sorts the stages of a chain (refine, combine, after); `score` lists the usual numbers. ``exact``
    is False where `work` bounds a count that depends on the data. ``sides``: which of q, k, v a refine stage
    changes.
    """

    rank = 0
    exact = True
    sides = "qkv"

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
        line = ctx.timeline or timeline.read(ctx, *x.shape[:2], x.device, cache.clock if cache else None)
        asked = self.options.get("impl")
        impl = asked if asked in ("reference", "triton") else "auto"
        call = Call(self.site, x, ctx, line, cache, impl)
        y = self.out(self.heads(call), call)
        for stage in self.after:
            y = stage(y, call)
        if ctx.timeline is None:
            line.advance()
            y = line.restore(y)
        return y

    def heads(self, call: Call) -> Tensor:
        """Per-head outputs before the output projection; ``(B, T, H, d_v)``."""
        raise NotImplementedError

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
