"""Processes that share heads train what one process does, in fp64: alone, and with FSDP2 over other ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from attnzoo.parallel.plan import split_heads
from attnzoo.parallel.tensor import Share, assemble, norm_weight, put_shards, shards_of, sync_gradients
from children import start_ranks
from test_parallel_tensor import MUST, model_loss, small_model

OPTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2, "qkv_bias": True, "out_bias": True},
    "kha": {"num_kv_heads": 1},
    "moh": {"shared_heads": 2},
}
STEPS, RATE, CLIP = 2, 0.5, 0.05


def batches() -> Tensor:
    """Tokens of every step; half of a batch is one data rank's."""
    return torch.randint(31, (STEPS, 4, 10), generator=torch.Generator().manual_seed(1))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model: nn.Module, share: Share, data: int, data_rank: int) -> dict[str, Tensor]:
    """Clipped gradient descent, in which differences stay as small as they are; losses, norms and weights."""
    found: dict[str, Tensor] = {}
    for step, tokens in enumerate(batches()):
        own = tokens.chunk(data)[data_rank]
        loss = model_loss(model, own)
        loss.backward()
        sync_gradients(model, share)
        squares = torch.stack([
            (norm_weight(p, share.ranks) * local(p.grad).square()).sum() for p in model.parameters()
        ])  # fmt: skip
        total, loss = squares.sum(), loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(total)
            dist.all_reduce(loss)
            loss /= data * share.ranks
        found[f"loss {step}"], found[f"norm {step}"] = loss, total.sqrt()
        for name, p in model.named_parameters():
            if step == 0:
                found[f"gradient of {name}"] = assemble(gathered(p.grad), getattr(p, "shards", None), share)
            with torch.no_grad():
                local(p).sub_(local(p.grad) * RATE * (CLIP / total.sqrt()).clamp(max=1))
            p.grad = None
    for name, p in model.named_parameters():
        found[name] = assemble(gathered(p.detach()), getattr(p, "shards", None), share)
    return {name: value.clone() for name, value in found.items()}


def rank_of_several(folder: str, names: tuple[str, ...], tensor: int, sharded: bool) -> None:
    """A rank's process: all models in turn; rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = world // tensor
    mesh = dist.device_mesh.init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    share = Share(rank % tensor, tensor, mesh["tensor"].get_group())
    for name in names:
        model = small_model(name, **OPTIONS.get(name, {}))
        split_heads(model, share)
        model.run_block = partial(checkpoint, use_reentrant=False)  # forwards run twice, with their sums
        if sharded:
            marks = shards_of(model)
            for part in (*model.blocks, model):
                fully_shard(part, mesh=mesh["data"])
            put_shards(model, marks)
        found = train(model, share, data, rank // tensor)
        torch.save(found, Path(folder) / f"{name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def check(folder: Path, names: tuple[str, ...], ranks: int, tensor: int, sharded: bool) -> None:
    children = start_ranks(rank_of_several, str(folder), names, tensor, sharded, ranks=ranks)
    ended = [child.wait() for child in children]
    assert all(end.returncode == 0 for end in ended), "\n".join(end.stderr[-3000:] for end in ended)
    for name in names:
        alone = train(small_model(name, **OPTIONS.get(name, {})), Share(0, 1), 1, 0)
        for rank in range(ranks):
            found = torch.load(folder / f"{name}.{rank}.pt")
            assert found.keys() == alone.keys()
            for what, value in alone.items():
                gap, size = (found[what] - value).abs().max(), value.abs().max()
                assert gap <= 1e-9 * size.clamp(min=1e-3), f"{name}, rank {rank}: {what} differs by {gap:.1e}"


@pytest.mark.multi
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    check(tmp_path, MUST, ranks=2, tensor=2, sharded=False)


@pytest.mark.multi
@pytest.mark.slow
def test_with_sharded_weights(tmp_path: Path) -> None:
    """Parts of parts: rows of key heads that ranks share lie anywhere in what FSDP2 leaves a rank."""
    check(tmp_path, ("gqa", "kha", "mla", "tpla", "mamba2", "hgrn2"), ranks=4, tensor=2, sharded=True)
