"""What a micro-batch holds in memory and moves through it: counted, by running the model without storage.

Blocks run forward and backward on fake tensors, so that nothing is computed and any length takes no memory,
and every tensor that appears, is kept by autograd and disappears again is counted. Blocks that are alike are
run once. For a GPU the code takes the path that it takes there (kernels, fused attention), on fake tensors of
a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from attnzoo import Context, create_model
from attnzoo.model import LanguageModel
from attnzoo.model.undrawn import Undrawn
from attnzoo.ops.last_queries import takes
from attnzoo.parallel.context import Span, check_spans
from attnzoo.parallel.plan import split_heads
from attnzoo.parallel.shard import entangled
from attnzoo.plan.probes import Exchanges, QuietRanks, QuietShare, Tally
from attnzoo.plan.watch import Profile, Watch, key_of
from attnzoo.train.objective import objective_of
from attnzoo.train.optim import parameter_groups
from attnzoo.train.rehearsal import check_forward, kinds
from attnzoo.train.settings import OptimSettings

FLASH = 256  # the widest heads of flash attention


@dataclass(frozen=True)
class Traced:
    """A model's blocks in order and its two ends: embedding, last norm, head and loss.

    Args:
        tables: bytes that the layers of a forward share, such as masks.
        shapes: by name of the rank's parameters, before they are spread over others.
        by_muon: names of those that Muon would train, where it is the optimiser.
        entangled: whether FSDP gathers all blocks at once, see `attnzoo.parallel.shard`.
    """

    blocks: tuple[Profile, ...]
    ends: Profile
    tables: float
    shapes: Mapping[str, torch.Size]
    by_muon: frozenset[str]
    entangled: bool

    def scaled(self, two: Traced, rows: int) -> Traced:
        """For ``rows`` samples, from this one for one sample and ``two`` for two: all grows evenly."""
        blocks = tuple(_scaled(a, b, rows) for a, b in zip(self.blocks, two.blocks, strict=True))
        tables = self.tables + (rows - 1) * (two.tables - self.tables)
        return replace(self, blocks=blocks, ends=_scaled(self.ends, two.ends, rows), tables=tables)


def _scaled(one: Profile, two: Profile, rows: int) -> Profile:
    grow = lambda a, b: a + (rows - 1) * (b - a)  # noqa: E731
    ahead, back = (Exchanges(*map(grow, *pair)) for pair in ((one.ahead, two.ahead), (one.back, two.back)))
    flat = [f.name for f in fields(Profile) if f.name not in ("ahead", "back")]
    return Profile(**{n: grow(getattr(one, n), getattr(two, n)) for n in flat}, ahead=ahead, back=back)


class Subject:
    """A model without storage, or one rank's part of it, to be run at any shape.

    Args:
        options: arguments of `create_model`. tensor: ranks that share the heads.
        bf16: under autocast; else fp32.
        gpu: the path of a GPU; else that of this CPU.

    Raises:
        ValueError: the model is not trained by the next token, or its heads cannot be shared so.
    """

    def __init__(
        self, options: Mapping[str, Any], tensor: int = 1, bf16: bool = True, gpu: bool = True
    ) -> None:
        self.mode, self.tally, self.bf16, self.gpu = FakeTensorMode(), Tally(), bf16, gpu
        with self.mode, Undrawn():
            self.model = create_model(**options)
            objective_of(self.model)
            if self.model.objective is not None:
                raise ValueError(
                    "model.layout: plans are for next-token training, got layers of block diffusion; "
                    "measure a run of a few steps instead"
                )
            if tensor > 1:
                split_heads(self.model, QuietShare(0, tensor, tally=self.tally))
        for param in self.model.parameters():
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for mixer in self.model.mixers if gpu else ():
            mixer.choices = dict.fromkeys(("cpu", "cuda"), mixer.choices["cuda"])
        self.shapes = {name: p.shape for name, p in self.model.named_parameters()}
        self.by_muon = _by_muon(self.model)

    def trace(self, rows: int, length: int, context: int = 1) -> Traced:
        """Profiles of a micro-batch of ``rows`` samples of ``length`` tokens, which ``context`` ranks share;
        on the last of them, which sees most keys.

        Raises:
            ValueError: a layer looks at its data, or its sequences cannot be shared so.
        """
        check_spans(self.model, context, length)
        span = Span(context - 1, context, QuietRanks(context, self.tally)) if context > 1 else None
        keys = kinds(self.model, length)
        with self._path():
            try:
                return _Tracer(self, keys).run(rows, length, span)
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
                raise ValueError(
                    f"model.layout: {self.model.config['layout']!r} looks at its data while it runs, so its "
                    "memory cannot be counted without data; measure a run of a few steps instead"
                ) from None

    def check(self, rows: int, length: int, aux_weights: Collection[str]) -> None:
        """What the trainer checks by a forward pass, with its messages; see `check_forward`."""
        alike = kinds(self.model, length)
        with self._path():
            check_forward(self.model, rows, length, alike, aux_weights)

    @contextmanager
    def _path(self) -> Iterator[None]:
        with self.mode, ExitStack() as stack:
            if self.gpu:
                stack.enter_context(AsGpu())
            stack.enter_context(torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext())
            yield


class AsGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.is_cpu.__get__:
            return False
        if func == Tensor.is_cuda.__get__:
            return True
        if func is takes:
            return args[0].element_size() == 2 and args[0].shape[-1] <= FLASH
        return func(*args, **(kwargs or {}))


class _Tracer:
    """Runs a model part by part. ``keys``: equal for blocks that are alike."""

    def __init__(self, subject: Subject, keys: Sequence[Hashable]) -> None:
        self.subject, self.model, self.tally = subject, subject.model, subject.tally
        self.parameters = {key_of(p) for p in self.model.parameters()}
        self.keys = {id(block): key for block, key in zip(self.model.blocks, keys, strict=True)}
        self.blocks: list[Profile] = []
        self.known: dict[Hashable, Profile] = {}
        self.first: set[Hashable] = set()
        self.linked = any(mixer.gives or mixer.needs for mixer in self.model.mixers)
        self.seen: set[int] = set()
        self.refs: list[StorageWeakRef] = []
        self.line: Any = None

    def run(self, rows: int, length: int, span: Span | None) -> Traced:
        tokens = targets = torch.zeros(rows, length, dtype=torch.long)
        watch = Watch(self.parameters)
        self.model.run_block = lambda *args: self._block(watch, *args)
        with watch, self._kept(watch):
            logits = self.model(tokens, Context(span=span))
            targets = targets if span is None else span.cut(targets)
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            del logits
        tables = sum(self._tables().values())
        ends = watch.profile()
        if not self.linked:
            with watch, torch.autocast("cpu", enabled=False):
                loss.backward()
            ends = watch.profile(back=True)
        subject = self.subject
        return Traced(
            tuple(self.blocks), ends, tables, subject.shapes, subject.by_muon, entangled(self.model)
        )

    def _block(
        self, outer: Watch, block: nn.Module, h: Tensor, ctx: Context, line: Any, cache: None
    ) -> Tensor:
        self.line, key = line, self.keys[id(block)]
        with outer.paused():
            if key in self.known:
                self.blocks.append(self.known[key])
                return h.detach().requires_grad_()
            watch = Watch(self.parameters)
            entry = h if self.linked else h.detach().requires_grad_()
            with watch, self._kept(watch):
                out = block(entry, ctx, line, cache)
            size = entry.untyped_storage().nbytes()
            profile, ahead = watch.profile(size, set(self._tables())), self.tally.take()
            back = ahead
            if not self.linked:
                with watch, torch.autocast("cpu", enabled=False):
                    out.backward(torch.empty_like(out))
                profile, back = watch.profile(size, set(self._tables()), back=True), self.tally.take()
                out = out.detach().requires_grad_()
            profile = replace(profile, ahead=ahead, back=back)
            if key in self.first:
                self.known[key] = profile
            self.first.add(key)  # the first of a kind also makes tables that all layers read
            self.blocks.append(profile)
            return out

    def _tables(self) -> dict[int, int]:
        """Storages that the layers of this forward share, with their bytes."""
        memo = [self.line.memo, *(v for v in vars(self.line).values() if isinstance(v, (Tensor, tuple)))]
        tensors = [z for z in tree_leaves(memo) if isinstance(z, Tensor)]
        return {key_of(z): z.untyped_storage().nbytes() for z in tensors}

    @contextmanager
    def _kept(self, watch: Watch) -> Iterator[None]:
        """Tells the watch what autograd keeps, each storage once in the whole model."""

        def pack(z: Tensor) -> Tensor:
            key = key_of(z)
            if key not in self.parameters and key not in self.seen:
                self.seen.add(key)
                self.refs.append(StorageWeakRef(z.untyped_storage()))  # or its address might be used again
                watch.kept[key] = z.untyped_storage().nbytes()
            return z

        with saved_tensors_hooks(pack, lambda z: z):
            yield


def _by_muon(model: LanguageModel) -> frozenset[str]:
    groups = parameter_groups(model, OptimSettings(name="muon"))
    chosen = {id(p) for group in groups if group["kind"] == "muon" for p in group["params"]}
    return frozenset(name for name, p in model.named_parameters() if id(p) in chosen)
