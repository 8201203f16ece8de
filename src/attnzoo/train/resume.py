"""What a resumed run has in common with its checkpoint, where its samples go on, and what is left to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from attnzoo.train.checkpoint import differences, find_checkpoint
from attnzoo.train.folder import lacks_summary
from attnzoo.train.metrics import Progress
from attnzoo.train.optim import check_named_state
from attnzoo.train.store import FOLDER

if TYPE_CHECKING:
    from attnzoo.train.prepare import Run

# options that choose how a model computes, not what
FREE_ON_RESUME = ("impl",)


def check_same(run: Run) -> None:
    """A resumed run must see the same samples with the same model, unless ``ckpt_force``."""
    there = run.resume["model_config"] | run.resume["identity"]
    here = dict(run.model.config) | identity(run)
    changed = differences(
        *({k: v for k, v in side.items() if k not in FREE_ON_RESUME} for side in (there, here))
    )
    saved, tokenizer = run.resume["tokenizer"], run.corpus.tokenizer
    if saved["fingerprint"] != tokenizer.fingerprint:
        changed.insert(
            0,
            f"tokenizer is one of {saved['vocab_size']} tokens ({saved['fingerprint'][:8]}) there and of "
            f"{tokenizer.vocab_size} ({tokenizer.fingerprint[:8]}) here",
        )
    if changed and not run.config.get("ckpt_force"):
        raise ValueError(
            f"ckpt_path: a resumed run must not change: {'; '.join(changed)}; use init_from, or "
            "ckpt_force=true to go on all the same"
        )
    if changed and pl.utilities.rank_zero_only.rank == 0:
        print(f"ckpt_force: going on although {'; '.join(changed)}", flush=True)


def sample_offset(batch_size: int, resume: Mapping[str, Any] | None) -> int:
    """Where samples are counted from, so that none is repeated or left out after steps of another size."""
    if resume is None:
        return 0
    step = resume["progress"]["step"]
    position = resume.get("position", {"sample": step * resume["identity"]["data.batch_size"]})
    return position["sample"] - step * batch_size


def to_close(start: str, resume: Mapping[str, Any], *length: float | None) -> Path | None:
    """The run folder of the checkpoint ``start``, if it was trained to this length and lacks its summary."""
    file = find_checkpoint(start)
    home = file.parent.parent
    known = file.parent.name == FOLDER and (home / "config.yaml").exists()
    return home if known and lacks_summary(home, resume, *length) else None


def check_resume(run: Run) -> None:
    """The optimiser must be of the same kind, and something must be left to do: steps, or the summary."""
    check_named_state(run.model, run.optim, run.resume["optimizer"])
    done, pack = Progress(**run.resume["progress"]), run.corpus.pack
    if seen := run.plan.first_sample(done.step) % pack:
        raise ValueError(
            f"data.pack: the checkpoint is at sample {seen} of a pack of {pack}; use init_from, which starts "
            "with the first sample"
        )
    own = find_checkpoint(run.config["ckpt_path"]).parent.resolve() == (run.folder / FOLDER).resolve()
    same = differences(run.resume["identity"], identity(run)) == []
    if own and same and lacks_summary(run.folder, run.resume, run.plan.total_steps, run.trainer.max_seconds):
        return
    for field, before, limit in (
        ("max_steps", done.step, run.plan.total_steps),
        ("max_time", done.seconds, run.trainer.max_seconds),
    ):
        if limit is not None and before >= limit:
            raise ValueError(f"trainer.{field}: the checkpoint is at {before:g}, got {limit:g}; raise it")


def identity(run: Run) -> dict[str, Any]:
    """What decides which samples a step sees."""
    found = {
        "data": run.corpus.fingerprint,
        "seed": run.plan.seed,
        "data.batch_size": run.plan.batch_size,
        "data.seq_len": run.plan.seq_len,
    }
    # only where they are not the default: earlier checkpoints lack them
    if run.corpus.pack > 1:
        found["data.pack"] = run.corpus.pack
    if run.config["data"].get("isolate"):
        found["data.isolate"] = True
    return found
