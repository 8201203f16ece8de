"""A pre-norm decoder: embedding, blocks of mixer and SwiGLU MLP, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention import timeline
from attnzoo.attention.base import Mixer
from attnzoo.attention.part import part_of
from attnzoo.attention.site import INIT_STD
from attnzoo.attention.slots import Cache
from attnzoo.attention.timeline import Clock
from attnzoo.context import Context
from attnzoo.cost import Cost, add_costs
from attnzoo.model.block import Block, RMSNorm, default_hidden
from attnzoo.model.layout import check_layers, legal_of, parse_layout
from attnzoo.model.prefix import Prefix, per_token
from attnzoo.objective import BlockDiffusion
from attnzoo.ops.fused import linear
from attnzoo.options import unknown
from attnzoo.registry import build


@dataclass
class ModelCache:
    """The layers' caches, on one clock."""

    layers: list[Cache]
    clock: Clock

    @property
    def nbytes(self) -> int:
        """Bytes of what the layers store."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def slots(self) -> dict[str, Tensor]:
        """The layers' tensors, by layer and slot."""
        return {f"{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.slots.items()}

    @property
    def length(self) -> int:
        return self.clock.length


class LanguageModel(nn.Module):
    """See `create_model`.

    Attributes:
        config: plain values; ``create_model(**config)`` builds the same architecture.
        blocks: the layers; ``mixers`` their mixers.
        objective: how all layers must be trained and sampled; None = by the next token.
        run_block: how a block is called; a trainer may wrap it (activation checkpointing).
    """

    def __init__(self, mixers: Sequence[Mixer], config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        dim, eps = config["dim"], config["norm_eps"]
        hidden = config["mlp_hidden"] or default_hidden(dim)
        self.embed = nn.Embedding(config["vocab_size"], dim)
        nn.init.normal_(self.embed.weight, std=INIT_STD)
        self.objective = common_objective(mixers, config)
        own_mask = self.objective is not None and self.objective.mask_token_id is None
        self.mask_embed = nn.Parameter(torch.randn(dim) * INIT_STD) if own_mask else None
        self.prefix = Prefix(config["prefix_tokens"], dim) if config["prefix_tokens"] else None
        self.blocks = nn.ModuleList(Block(mixer, dim, hidden, eps) for mixer in mixers)
        self.norm = RMSNorm(dim, eps)
        self.head = nn.Linear(dim, config["vocab_size"], bias=False)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        if config["tie_head"]:
            self.head.weight = self.embed.weight
        self.run_block: Callable[..., Tensor] = nn.Module.__call__

    @property
    def mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        ctx: Context | None = None,
        cache: ModelCache | None = None,
        keep: slice | None = None,
    ) -> Tensor:
        """``(B, T)`` int64 -> logits ``(B, T, vocab)``, zero at padding; those of ``keep`` alone, if given.

        With ``ctx.span`` the logits are those of the rank's own part, and ``keep`` counts in it.

        Raises:
            ValueError: tokens are not ``(B, T)`` with T >= 1, or a Context field does not fit.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens: must be (B, T) with T >= 1, got {tuple(tokens.shape)}")
        ctx, clock = ctx or Context(), cache.clock if cache else None
        (batch, length), device = tokens.shape, tokens.device
        if ctx.span is not None and self.prefix:
            raise ValueError(
                "prefix_tokens: learned tokens would shift the parts of a span, got "
                f"{self.config['prefix_tokens']}; set it to 0"
            )
        placed = self.prefix and self.prefix.place(ctx, batch, length, device, clock)
        if placed:
            ctx, length = placed.ctx, placed.source.shape[1]
        line = timeline.read(ctx, batch, length, device, clock)
        if ctx.span is not None:
            line, tokens = part_of(line, ctx.span), ctx.span.cut(tokens)
        if placed:
            h = self.prefix(self.embed(tokens), line.compact(placed.source))
        else:
            h = self._embedded(line.compact(tokens))
        for i, block in enumerate(self.blocks):
            h = self.run_block(block, h, ctx, line, cache.layers[i] if cache else None)
            if ctx.collector is not None:
                ctx.collector.settle()
        line.advance()
        if placed:
            h = line.restore(h).gather(1, placed.slots[..., None].expand(-1, -1, h.shape[2]))
            return linear(self.head, self.norm(h)[:, keep or slice(None)])
        if keep is not None:
            return linear(self.head, line.restore(self.norm(h))[:, keep])
        return line.restore(linear(self.head, self.norm(h)))

    def _embedded(self, tokens: Tensor) -> Tensor:
        if self.mask_embed is None:
            return self.embed(tokens)
        hidden = tokens == self.config["vocab_size"]
        return torch.where(hidden[..., None], self.mask_embed, self.embed(tokens.masked_fill(hidden, 0)))

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> ModelCache:
        """Empty memory for decoding, see `Mixer.new_cache`; with room for a document's learned tokens."""
        clock = Clock()
        max_len += self.config["prefix_tokens"]
        layers = [
            m.new_cache(batch_size, max_len, dtype=dtype, device=device, clock=clock) for m in self.mixers
        ]
        return ModelCache(layers, clock)

    def on_step(
        self, step: int, stats: Mapping[str, Mapping[int, Tensor]], generator: torch.Generator
    ) -> None:
        """Tells every layer that an optimiser step was made; see `Stage.on_step`.

        Args:
            stats: as `Collector.steps`: name -> layer -> value.
        """
        for i, mixer in enumerate(self.mixers):
            own = {name: layers[i] for name, layers in stats.items() if i in layers}
            mixer.on_step(step, own, generator)

    def cost(self, seq_len: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """Costs of the whole model; the embedding is a lookup and costs no FLOPs.

        Learned tokens (``prefix_tokens``) are charged to the others; caches hold them as state.
        """
        config, more = self.config, self.config["prefix_tokens"]
        hidden = config["mlp_hidden"] or default_hidden(config["dim"])
        extra = {
            "mlp": 6.0 * config["dim"] * hidden * len(self.blocks) * (seq_len + more) / seq_len,
            "head": 2.0 * config["dim"] * config["vocab_size"],
        }
        params = sum(p.numel() for p in self.parameters())
        costs = [per_token(m.cost(seq_len + more, dtype), seq_len, more) for m in self.mixers]
        return add_costs(costs, extra, params)


def common_objective(mixers: Sequence[Mixer], config: Mapping[str, Any]) -> BlockDiffusion | None:
    """The objective of all layers.

    Raises:
        ValueError: layers differ in it, or it does not fit the model.
    """
    first = mixers[0].objective
    for i, mixer in enumerate(mixers):
        if mixer.objective == first:
            continue
        here, there = ((m.name, m.objective or "the next token") for m in (mixer, mixers[0]))
        raise ValueError(
            f"layout: layer {i} ({here[0]}) is trained by {here[1]}, layer 0 ({there[0]}) by {there[1]}; "
            "a layer that reads one way cannot fill a block in: give all layers the same mask"
        )
    if first is None:
        return None
    if first.mask_token_id is not None and first.mask_token_id >= config["vocab_size"]:
        raise ValueError(
            f"mask_token_id: must be less than vocab_size={config['vocab_size']}, got {first.mask_token_id}; "
            "null gives masked tokens an embedding of their own"
        )
    if config["prefix_tokens"]:
        raise ValueError(
            f"prefix_tokens: would shift the blocks of a document, got {config['prefix_tokens']}; set it to 0"
        )
    return first


def create_model(
    layout: str | Sequence[Any] = "mha",
    vocab_size: int = 256,
    dim: int = 256,
    depth: int = 6,
    num_heads: int = 8,
    *,
    mlp_hidden: int | None = None,
    tie_head: bool = False,
    norm_eps: float = 1e-6,
    max_seq_len: int = 2048,
    prefix_tokens: int = 0,
    impl: str = "auto",
    **options: Any,
) -> LanguageModel:
    """A causal language model.

    Args:
        layout: which mixer stands in which layer, see `parse_layout`.
        vocab_size, dim, depth, num_heads: sizes; every layer has ``num_heads`` query heads.
        mlp_hidden: width of the SwiGLU MLP; default 8/3 of dim.
        tie_head: whether the head shares the embedding's weights.
        norm_eps: of the backbone's norms. max_seq_len: longest sequence, for mixers with a fixed maximum.
        prefix_tokens: learned tokens before every document, see `attnzoo.model.prefix`.
        impl: implementation of all mixers.
        options: of the mixers; in a mixed layout each goes to the layers whose variant has it.

    Raises:
        ValueError: a size below 1, an unknown variant, or an option that no layer has.
    """
    for name, value in (
        ("vocab_size", vocab_size),
        ("depth", depth),
        ("mlp_hidden", 1 if mlp_hidden is None else mlp_hidden),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: must be an integer of at least 1, got {value!r}")
    if not isinstance(prefix_tokens, int) or prefix_tokens < 0:
        raise ValueError(f"prefix_tokens: must be an integer of at least 0, got {prefix_tokens!r}")
    specs = parse_layout(layout, depth)
    legal = [legal_of(spec.name, spec.options, options) for spec in specs]
    add = options.get("add") or ()
    groups = {add} if isinstance(add, str) else set(add)
    for name in options:
        if name.split(".")[0] not in groups and not any(name in names for names in legal):
            raise unknown("option", name, set().union(*legal), "any layer")
    mixers, bank, longest = [], {}, max_seq_len + prefix_tokens
    for i, (spec, names) in enumerate(zip(specs, legal, strict=True)):
        own = {k: v for k, v in options.items() if k in names or k.split(".")[0] in groups} | spec.options
        place = {"impl": impl, "layer_idx": i, "num_layers": depth, "max_seq_len": longest}
        mixers.append(build(spec.name, dim, num_heads, place | own, bank))
    check_layers(mixers)
    config = {
        "layout": layout
        if isinstance(layout, str)
        else [s.name if not s.options else {"name": s.name, **s.options} for s in specs],
        "vocab_size": vocab_size,
        "dim": dim,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_hidden": mlp_hidden,
        "tie_head": tie_head,
        "norm_eps": norm_eps,
        "max_seq_len": max_seq_len,
        "prefix_tokens": prefix_tokens,
        "impl": impl,
        **options,
    }
    return LanguageModel(mixers, config)
