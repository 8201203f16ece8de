"""`attnzoo plan`: memory and step time of a configuration on machines that are not there."""

from __future__ import annotations

import json
from dataclasses import asdict

from attnzoo.cli.overrides import order
from attnzoo.cli.tree import compose, config_folder, opened, plain_errors
from attnzoo.cli.zoo import table
from attnzoo.plan import choose, read_hardware
from attnzoo.plan.estimate import Choice
from attnzoo.plan.request import VOCABULARY, Request, batch_of, fixed_of, job_of, read_request, vocabulary
from attnzoo.plan.rules import check_job
from attnzoo.plan.setup import Job
from attnzoo.plan.show import HEAD, as_row, as_values, without_empty
from attnzoo.sweep.grid import plain
from attnzoo.train.prepare import read_groups, with_start

USAGE = """\
attnzoo plan [key=value]... [--json]     memory of a GPU and time of a step, for each number of GPUs

key=value         a configuration as attnzoo train takes it: model=7b attention=mla data.seq_len=32768
gpus=8,64         numbers of GPUs; 8,64,256,1024
hardware=h100     an entry of configs/hardware: a100, b200, h100, h200, mi300x; hardware.FIELD=... changes it,
                  such as hardware.efficiency=0.5
batch_tokens=N    tokens of a step, 4194304; or give data.batch_size
vocab_size=N      50304; or give a tokenizer
overlap=0.5       share of the exchange of weights and gradients that runs beside computing

Layouts are searched for what is not given: launcher.tensor_parallel, launcher.context_parallel,
launcher.strategy, trainer.accumulate, trainer.checkpoint_activations. docs/plan.md says what is modelled.
"""


def plan(arguments: list[str]) -> int:
    """Print the best layout for each number of GPUs; returns 1 where none fits, else 0."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    request = read_request(a for a in arguments if a != "--json")
    for argument in request.overrides:
        if argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
            raise ValueError(f"plan: takes key=value and --json, got {argument!r}; see attnzoo plan --help")
    with plain_errors(), opened():
        config = plain(compose(["run_dir=.", *order(request.overrides)]))
    trainer, _, _ = read_groups(config)
    config = with_start(config)
    hardware = read_hardware(config_folder() / "hardware", request.hardware or "h100", request.changes)
    names = any(key.partition(".")[0] == "tokenizer" for key in request.given)
    job = job_of(config, request.vocab_size or (vocabulary(config) if names else VOCABULARY))
    batch, fixed = batch_of(request, config), fixed_of(request, config)
    check_job(job, batch, fixed, trainer.aux_weights)
    choices = [choose(job, n, batch, hardware, request.overlap, fixed) for n in request.gpus]
    if "--json" in arguments:
        about = {
            "params": job.cost.params,
            "seq_len": job.seq_len,
            "batch": batch,
            "overlap": request.overlap,
            "hardware": asdict(hardware),
        }
        print(json.dumps(about | {"plans": [as_values(choice) for choice in choices]}, indent=2))
    else:
        _print(request, job, batch, hardware, choices)
    return 0 if any(choice.best for choice in choices) else 1


def _print(request: Request, job: Job, batch: int, hardware, choices: list[Choice]) -> None:
    tokens = batch * job.seq_len
    print(
        f"{job.options['layout']}: {job.cost.params / 1e9:.2f}B parameters, vocabulary "
        f"{job.options['vocab_size']}, {batch} samples of {job.seq_len} = {tokens:,} tokens in a step, "
        f"{'bf16' if job.bf16 else 'fp32'}, {job.optimiser}"
    )
    print(
        f"{hardware.name}: products at {hardware.efficiency:.0%} of {hardware.peak_flops / 1e12:.0f} TFLOP/s "
        f"and {hardware.bandwidth_efficiency:.0%} of all bandwidths, both assumed; {request.overlap:.0%} of "
        f"the exchange hidden, in brackets all and none; {hardware.source}\n"
    )
    rows = [HEAD, *(as_row(choice.best) for choice in choices if choice.best)]
    if len(rows) > 1:
        print(table(without_empty(rows)), end="\n\n")
    for choice in choices:
        reasons = "; ".join(f"{number} by {reason}" for reason, number in choice.left_out.items())
        missing = "" if choice.best else "nothing fits; "
        if missing or reasons:
            print(f"{choice.gpus} GPUs: {missing}left out: {reasons or 'nothing'}")
