"""How a trainer calls the blocks of a model: their activations made again in the backward pass, compiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.attention.slots import Cache
from attnzoo.attention.timeline import Timeline
from attnzoo.context import Context

GRAPHS = 8  # that one block may need, as torch's own limit: with gradients, without, of another length ...


def prepare_blocks(model: nn.Module, recompute: bool, compiled: bool) -> None:
    """Let ``model`` keep the inputs of its blocks only, and compile each kind of block once, from its next
    forward on.
    """
    if recompute:
        model.run_block = recomputed
    if compiled:
        for block in model.blocks:
            block.compile()
        # as autograd does it here, which goes back outside of autocast
        torch._functorch.config.backward_pass_autocast = "off"
        # blocks alike share their graphs, but all may differ, and torch counts those of all together:
        # past its limit it would run the rest as they are
        config, graphs = torch._dynamo.config, GRAPHS * len(model.blocks)
        config.recompile_limit = max(config.recompile_limit, graphs)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, graphs)


def recomputed(
    block: nn.Module, h: Tensor, ctx: Context, line: Timeline, cache: Cache | None = None
) -> Tensor:
    """A block that keeps its input only.

    Both passes begin with what the layers before remembered on ``line`` and with nothing unsettled: compiled
    code that finds more there is other code, which saves other tensors for the backward pass.
    """
    known = line.memo

    def run(*args: object) -> Tensor:
        line.memo = dict(known)
        if ctx.collector is not None:
            ctx.collector.settle()
        return block(*args)

    return checkpoint(run, h, ctx, line, cache, use_reentrant=False)
