"""Context parallelism, ours and torch's, under the same tests: two processes compute what one does.

torch's `context_parallel` has operators for CUDA alone. On a CPU it is lent the CPU's, so that its order of
the tokens (parts of equal work, where the length allows), its ring of keys merged by log-sum-exp and its
backward pass run here too: an oracle without a line of ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

import attnzoo
from attnzoo import Context
from attnzoo.model.backbone import LanguageModel
from attnzoo.parallel.context import connect
from children import start_ranks

RANKS, ROWS = 2, 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
DTYPES = {"cpu": (torch.float32, torch.float16), "cuda": (torch.float16,)}  # CUDA's flash kernel has no fp32
OPTIONS: dict[str, dict[str, Any]] = {"mha": {}, "gqa": {"num_kv_heads": 2}}
LENGTHS = (12, 14)  # torch gives two ranks parts of equal work in the first, in the second contiguous ones
ROUNDINGS = 8  # from one residual to the next: norm, projection, rotation, score, weight, read, output, sum

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PINNED = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.M)[1]
PUBLIC = "torch.distributed.tensor.experimental:context_parallel"
RING = "torch.distributed.tensor.experimental._context_parallel._attention:"
PRIVATE = [
    RING + name for name in ("custom_ops", "_templated_ring_attention", "_templated_ring_attention_backward")
]


class Case(NamedTuple):
    variant: str
    length: int
    dtype: torch.dtype


class Batch(NamedTuple):
    """tokens, places: ``(B, T)``; probe: ``(B, T, vocab)``, the gradient of the logits."""

    tokens: Tensor
    places: Tensor
    probe: Tensor


def cases(device: str) -> list[Case]:
    return [Case(v, n, dtype) for dtype in DTYPES[device] for v in OPTIONS for n in LENGTHS]


def build(case: Case, device: str) -> LanguageModel:
    """With a row of the embedding for every token of the batch, whose gradient is then that of the input.

    The weights are numbers of fp16 in every dtype: their rounding would pass for that of the sums.
    """
    torch.manual_seed(0)
    vocab, options = ROWS * case.length, OPTIONS[case.variant]
    model = attnzoo.create_model(case.variant, vocab, 32, 2, 4, impl="sdpa", **options)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) / 32**0.5)
    return model.half().to(device, case.dtype)


def build_batch(case: Case, device: str) -> Batch:
    tokens = torch.arange(ROWS * case.length, device=device).view(ROWS, case.length)
    places = torch.arange(case.length, device=device).repeat(ROWS, 1)
    probe = torch.randn(*tokens.shape, tokens.numel(), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, places, probe.half().to(device, case.dtype))


@contextmanager
def alone(batch: Batch) -> Iterator[tuple[Batch, Context]]:
    """What a process reads of a batch, and the targets of its own tokens."""
    yield batch, Context(positions=batch.places)


@contextmanager
def by_ours(batch: Batch) -> Iterator[tuple[Batch, Context]]:
    span = connect(dist.get_rank(), RANKS)
    yield Batch(batch.tokens, *map(span.cut, batch[1:])), Context(positions=batch.places, span=span)


@contextmanager
def by_torch(batch: Batch) -> Iterator[tuple[Batch, Context]]:
    """Keys are gathered: its default way of rotating them."""
    mesh = dist.init_device_mesh(batch.tokens.device.type, (RANKS,))
    cut = resolve_name(PUBLIC)(mesh, buffers=list(batch), buffer_seq_dims=[1] * len(batch))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), cut:
        yield batch, Context(positions=batch.places)


WAYS = {"alone": alone, "ours": by_ours, "torch": by_torch}


def outcome(case: Case, device: str, way: str = "alone") -> dict[str, Tensor]:
    """Logits and all gradients; of processes that share sequences, what each adds to them."""
    model, batch = build(case, device), build_batch(case, device)
    logits = torch.zeros_like(batch.probe)
    with WAYS[way](batch) as (own, ctx):
        found = model(own.tokens, ctx)
        (found * own.probe).sum().backward()
        logits.scatter_(1, own.places[..., None].expand_as(found), found.detach())
    grads = {name: param.grad for name, param in model.named_parameters()}
    return {name: value.double() for name, value in {"logits": logits, **grads}.items()}


def lend_operators() -> None:
    """Give torch's ring the CPU's attention."""
    registered, *rings = map(resolve_name, PRIVATE)
    ops = torch.ops.aten
    forward = ops._scaled_dot_product_flash_attention_for_cpu.default
    backward = ops._scaled_dot_product_flash_attention_for_cpu_backward.default
    registered[forward] = partial(on_parts, rings[0])
    registered[backward] = partial(on_parts, partial(rings[1], grad_out_name="grad_out"))


@torch.no_grad()
def on_parts(
    ring: Callable[..., tuple[Tensor, ...]], op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[DTensor, ...]:
    """An operator of attention on tensors ``(B, H, T, ...)`` of which each rank has a part of T."""
    named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    mesh, dim = named["query"].device_mesh, 2
    found = ring(mesh.get_group(), dim, op, **tree_map_only(DTensor, DTensor.to_local, named))
    return tuple(DTensor.from_local(z, mesh, [Shard(dim)], run_check=False) for z in found)


def one_rank(device: str, way: str, path: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif way == "torch":
        lend_operators()
    dist.init_process_group(BACKENDS[device])
    found = [outcome(case, device, way) for case in cases(device)]
    for parts in found:
        for value in parts.values():
            dist.all_reduce(value)
    if dist.get_rank() == 0:
        torch.save(found, path)
    dist.destroy_process_group()


def require(names: list[str]) -> None:
    """Skips where another torch than the pinned one lacks one of ``names``."""
    try:
        for name in names:
            resolve_name(name)
    except (ImportError, AttributeError) as error:
        assert not torch.__version__.startswith(PINNED), error
        pytest.skip(f"torch {torch.__version__} lacks what {PINNED} has: {error}")


@pytest.mark.multi
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} GPUs"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("way", ["ours", "torch"])
def test_processes_that_share_sequences_compute_what_one_does(way: str, device: str, tmp_path: Path) -> None:
    """Up to twice the error of one process in that dtype, as each of two parts rounds, and of a band."""
    if way == "torch":
        require([PUBLIC, *(PRIVATE if device == "cpu" else [])])
    path = tmp_path / "found.pt"
    ended = [child.wait() for child in start_ranks(one_rank, device, way, str(path), ranks=RANKS)]
    assert not any(end.returncode for end in ended), "\n".join(end.stderr[-3000:] for end in ended)
    for case, shared in zip(cases(device), torch.load(path, map_location="cpu"), strict=True):
        exact, same = outcome(case._replace(dtype=torch.float64), "cpu"), outcome(case, device)
        assert shared.keys() == exact.keys()
        for name, value in exact.items():
            error, rounding = (float((z[name].cpu() - value).abs().max()) for z in (shared, same))
            band = ROUNDINGS * torch.finfo(case.dtype).eps * float(value.abs().max())
            assert error <= 2 * (rounding + band), f"{case}: {name} is off by {error:.1e}"


def test_only_another_torch_may_lack_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", PINNED)
    with pytest.raises(AssertionError, match="moved_away"):
        require([RING + "moved_away"])
    monkeypatch.setattr(torch, "__version__", "99.0")
    with pytest.raises(pytest.skip.Exception, match="moved_away"):
        require([RING + "moved_away"])
