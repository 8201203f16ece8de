"""Writes docs/parallel.md: how ranks share a run, and which variants they can share how.

python scripts/parallel_table.py            # from the plans that the mixers supply
python scripts/parallel_table.py --check    # exit 1 where docs/parallel.md is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import attnzoo
from attnzoo.parallel.context import spans
from attnzoo.parallel.plan import splits

PAGE = Path(__file__).parents[1] / "docs" / "parallel.md"
SHAPE = {"vocab_size": 64, "dim": 64, "depth": 3, "num_heads": 4}
HEAD = """# Several ranks, one run

Written by `scripts/parallel_table.py`. Whatever ranks share, a run sees the same samples in the same order,
has the same losses and writes the same checkpoint as one process (`tests/test_train_parallel.py`, in fp64),
and a checkpoint of one layout goes on in another.

| ask for | a rank holds | what travels in a step |
|---|---|---|
| `launcher.strategy=ddp` (several ranks by default) | the model, some samples | gradients |
| `launcher.strategy=fsdp` | a part of every parameter, some samples | each block's weights before its \
forward and its backward pass; gradients |
| `launcher.tensor_parallel=N` | 1/N of the heads and of the MLPs | two sums of activations per layer \
forward, two backward |
| `launcher.context_parallel=N` | 1/N of every sequence | keys and values of the tokens to the left; states \
and tails of convolutions from the left neighbour |

They combine: ranks are numbered as (data, context, tensor), tensor fastest, and FSDP2 spreads parameters over
the ranks that do not share heads. `trainer.checkpoint_activations=true` goes with all of them.

- What cannot be shared is refused before data is read, with the reason; see the table.
- Layers that share weights or hand tensors on (`cla`, `rwkv7`, ...) are one unit of FSDP2, not one per block.
- Embedding, norms and head are whole on every rank that shares heads. Where there are fewer key heads than
  ranks, several ranks hold the same one.
- A loss of balance (`moh`) is one of a micro-batch: other micro-batches, other value, as with
  `trainer.accumulate`. Ranks that share heads or sequences share the micro-batch and have its value.
- Sequences are cut into contiguous parts, so under a causal softmax the last rank has most keys to read;
  `attnzoo plan` counts that. States are handed on from rank to rank within a layer, while the ranks to the
  left are in the next one.
- Muon needs whole matrices: with FSDP2 they are gathered, with `tensor_parallel` it is refused.
- `callbacks.checkpoint.sharded=true` lets every rank write its part, into one folder, which any layout reads.
  When it starts or goes on, every process still has the whole model in its own CPU memory for a moment.
- At the end of a run with FSDP2 or shared heads or sequences no text is sampled and decoding is not timed.

## Which variants

`yes`, or what is in the way.

| variant | heads (`tensor_parallel`) | sequences (`context_parallel`) |
|---|---|---|
"""


def reason_of_sequences(name: str) -> str | None:
    with torch.device("meta"):
        mixers = attnzoo.create_model(name, **SHAPE).mixers
    return next((why for why in map(spans, mixers) if why), None)


def page() -> str:
    lines = []
    for name in attnzoo.list_variants():
        both = (splits(name), reason_of_sequences(name))
        lines.append(f"| `{name}` | {' | '.join(why or 'yes' for why in both)} |")
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = page()
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
