"""Batches by sample counter: which samples a step sees is a function of the step, not of an iterator."""

from __future__ import annotations

import hashlib
import itertools
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from attnzoo import signals
from attnzoo.data import Corpus, targets
from attnzoo.data import collate as stack

Batch = dict[str, Tensor | None]


class CounterBatches(Sampler[list[int]]):
    """Sample counters of one rank's micro-batches, step after step.

    Step ``s`` takes the samples from ``offset + s * batch_size``, cut into ``accumulate * world``
    micro-batches; so neither ranks nor accumulation nor workers change which samples a step sees.

    Args:
        first, last: the steps to serve, ``last`` excluded; None goes on for ever.
        batch_size: samples per optimiser step, over all ranks and micro-batches.
        accumulate, rank, world: how a step is cut.
        offset: not 0 after steps of another batch size.
    """

    def __init__(
        self,
        first: int,
        last: int | None,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        offset: int = 0,
    ) -> None:
        parts = accumulate * world
        if batch_size % parts:
            raise ValueError(
                f"data.batch_size: must be a multiple of accumulate x ranks = {parts}, got {batch_size}"
            )
        self.first, self.last, self.batch_size = first, last, batch_size
        self.size = batch_size // parts  # of one micro-batch of one rank
        self.accumulate, self.rank, self.world, self.offset = accumulate, rank, world, offset

    def __iter__(self) -> Iterator[list[int]]:
        steps = itertools.count(self.first) if self.last is None else range(self.first, self.last)
        for step in steps:
            for micro in range(self.accumulate):
                yield list(self._counters(step, micro))

    def _counters(self, step: int, micro: int) -> range:
        start = self.offset + step * self.batch_size + (micro * self.world + self.rank) * self.size
        return range(start, start + self.size)

    def at(self, n: int) -> range:
        """The sample counters of this rank's micro-batch ``n``, which counts from 0 at step ``first``."""
        return self._counters(self.first + n // self.accumulate, n % self.accumulate)


class Loader(DataLoader):
    """Micro-batches, which knows why none comes.

    Args:
        batches: which samples; further arguments are DataLoader's.
    """

    def __init__(self, dataset: Dataset, batches: CounterBatches, **more: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **more)
        self.batches, self.served, self._source = batches, 0, None

    def __iter__(self) -> Iterator[Batch]:
        self.served, self._source = 0, None
        with signals.held():
            self._source = super().__iter__()
        for batch in self._source:
            self.served += 1
            yield batch

    def end(self) -> None:
        """End the worker processes; those that hang are killed."""
        if self.num_workers and self._source is not None:
            self._source._shutdown_workers()
            for worker in self._source._workers:
                worker.kill()

    def explain(self, error: BaseException) -> str | None:
        """In one line, why the worker processes give no batch; None where ``error`` says something else."""
        text = str(error)
        if not self.num_workers or "DataLoader" not in text:
            return None
        lost, after = self.batches.at(self.served), self.batches.at(self.served - 1)
        where = f"before samples {lost[0]} to {lost[-1]}"
        where += f"; sample {after[-1]} was the last read" if self.served else "; no sample was read"
        if text.startswith("Caught "):  # and then the stack of the worker
            number = re.search(r"DataLoader worker process (\d+)", text)
            kind, _, reason = text.strip().splitlines()[-1].partition(": ")
            reason = reason if kind.rpartition(".")[2] == "ValueError" else f"{kind}: {reason}"
            return f"data worker {number[1] if number else '?'}: {reason}; {where}"
        hint = "data.num_workers=0 reads in the run's own process"
        if self._source is None:  # the others were still being started
            return f"a data worker died at its start; {hint}"
        workers = self._source._workers
        dead = [(i, worker) for i, worker in enumerate(workers) if not worker.is_alive() and worker.exitcode]
        if dead:
            i, worker = dead[0]
            how = f"was killed by {signal.Signals(-worker.exitcode).name}" if worker.exitcode < 0 else "ended"
            memory = "; perhaps for memory" if worker.exitcode == -signal.SIGKILL else ""
            return f"data worker {i} of {len(workers)} (process {worker.pid}) {how} {where}{memory}; {hint}"
        i = self._source._task_info[self._source._rcvd_idx][0]
        return (
            f"data worker {i} of {len(workers)} (process {workers[i].pid}) hangs: no batch for "
            f"{self.timeout:g} s {where}; raise data.worker_timeout if it is only slow; {hint}"
        )


def train_loader(
    corpus: Corpus, batches: CounterBatches, workers: int = 0, worker_timeout: float = 0
) -> Loader:
    """Micro-batches of ``corpus`` in the order of ``batches``.

    Args:
        workers: processes that read ahead.
        worker_timeout: seconds to wait for one of them; 0 waits for ever.
    """
    return Loader(
        corpus.train_dataset(0, sys.maxsize),  # item n is sample n
        batches,
        collate_fn=collate,
        num_workers=workers,
        timeout=worker_timeout if workers else 0,
        persistent_workers=workers > 0,
        worker_init_fn=_worker,
        pin_memory=torch.cuda.is_available(),
    )


def _worker(number: int) -> None:
    signals.ignore()


def collate(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """Inputs, targets and documents of some samples of a corpus.

    Shape: ``tokens``, ``targets`` and ``segment_ids`` are (B, T); ``target_bytes`` (B,) is the text of the
    targets. ``segment_ids`` is None where every row is one document: mixers need no mask then.
    """
    stacked = stack(samples)
    tokens, labels, segments = targets(stacked)
    whole = bool((segments == segments[:, :1]).all() and (segments > 0).all())
    return {
        "tokens": tokens.contiguous(),
        "targets": labels,
        "segment_ids": None if whole else segments.contiguous(),
        "target_bytes": stacked["target_bytes"],
    }


def batch_fingerprint(batches: Sequence[Batch]) -> str:
    """Hash of the input tokens, to find a batch again."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["tokens"].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
