"""Time of an optimiser step by part; seconds.

A rank computes products at ``efficiency`` of the peak and moves what other operations read and write at
``bandwidth_efficiency`` of the memory's; the backward pass is twice the forward, and recomputed blocks run
once more. The rank that is last in its sequences sets the pace. What ranks exchange is counted by running the
model (`attnzoo.plan.trace`), and how long it takes is `attnzoo.plan.collectives`'. Sums over heads, rows and
states are waited for; gathering parameters and reducing gradients hides behind computing, as far as
``overlap`` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from attnzoo.cost import Cost
from attnzoo.plan.collectives import Group, gather, group, reduce, send
from attnzoo.plan.hardware import Hardware
from attnzoo.plan.memory import FP32, local_numel, units
from attnzoo.plan.probes import Exchanges
from attnzoo.plan.setup import Job, Setup
from attnzoo.plan.trace import Profile, Traced

# reads and writes of a number in an update: parameter, gradient and moments, and clipping before it
TOUCHES = {"adamw": 7 + 3, "muon": 5 + 3}
BUCKET = 25 * 2**20  # bytes of DDP's all-reduces
NEWTON_SCHULZ = 5  # steps of Muon


@dataclass(frozen=True)
class Times:
    """Seconds of a step by part.

    Args:
        products: matrix products, attention, scans. elementwise: all other operations on activations.
        host: what the host needs to start operations beyond that, or as well where it waits for them.
        optimiser: the update. tensor, context: exchanges of heads and of sequences. wave: ranks wait for the
            states of those to the left.
        data: parameters and gradients, what is not hidden. hidden: what is.
    """

    products: float
    elementwise: float
    host: float
    optimiser: float
    tensor: float
    context: float
    wave: float
    data: float
    hidden: float

    @property
    def step(self) -> float:
        return sum(getattr(self, name) for name in PARTS)

    @property
    def bounds(self) -> tuple[float, float]:
        """The step where all that can be hidden is, and where nothing is."""
        working = self.products + self.elementwise + self.host + self.wave
        both = self.data + self.hidden
        base = self.step - self.data
        return base + max(0.0, both - working), base + both

    @property
    def bound_by(self) -> str:
        """The largest part."""
        return max(PARTS, key=lambda name: getattr(self, name))


PARTS = tuple(f.name for f in fields(Times) if f.name != "hidden")


def times(job: Job, setup: Setup, hardware: Hardware, overlap: float) -> Times:
    """The time of a step on the slowest rank.

    Args:
        overlap: share of the exchange of parameters and gradients that runs beside computing, as far as there
        is
            enough of that: 0 to 1.
    """
    traced, micro, moved = job.traced(setup), setup.accumulate, hardware.bandwidth_efficiency
    again = 1 if setup.recompute else 0
    blocks, ends = list(traced.blocks), traced.ends
    products = micro * _flops(job, setup) / (_peak(job, hardware) * hardware.efficiency)
    traffic = sum((1 + again) * p.traffic + p.back_traffic for p in blocks) + ends.traffic + ends.back_traffic
    calls = sum((1 + again) * p.calls + p.back_calls for p in blocks) + ends.calls + ends.back_calls
    elementwise = micro * traffic / (hardware.memory_bandwidth * moved)
    launches = micro * calls * hardware.launch
    host = max(0.0, launches - products - elementwise) if hardware.asynchronous else launches
    working = products + elementwise + host
    wave = working * _wave(blocks, setup)
    both = _data(traced, setup, hardware)
    hidden = min(overlap * both, working + wave)
    tensor, context = _shared(blocks, setup, hardware, again)
    return Times(
        products=products,
        elementwise=elementwise,
        host=host,
        optimiser=_update(job, setup, traced, hardware),
        tensor=micro * tensor,
        context=micro * context,
        wave=wave,
        data=both - hidden,
        hidden=hidden,
    )


def _peak(job: Job, hardware: Hardware) -> float:
    return hardware.peak_flops if job.bf16 else hardware.fp32_flops


def _flops(job: Job, setup: Setup) -> float:
    """Of a micro-batch on the last rank of its sequences, backward and recomputation included."""
    cost, passes = job.cost, 4 if setup.recompute else 3
    tokens = setup.rows * job.seq_len / setup.context
    mixing = _mixing(cost)
    even = cost.executed_flops - mixing - cost.split["head"]
    layers = even + mixing * imbalance(job, setup.context)
    weights = passes * cost.weight_flops
    return tokens * (passes * layers / setup.tensor + 3 * cost.split["head"]) + weights


def _mixing(cost: Cost) -> float:
    """Executed FLOPs per token of the mixing alone: all that is executed beyond need is there."""
    return cost.executed_flops - sum(flops for part, flops in cost.split.items() if part != "mixing")


def imbalance(job: Job, context: int) -> float:
    """How much more the last of ``context`` ranks mixes than the mean: 2 - 1 / context where each token reads
    all before it, 1 where a state or a window stands for them.
    """
    if context == 1:
        return 1.0
    whole, before = job.seq_len, job.seq_len - job.seq_len // context
    total, left = (length * _mixing(job.cost_at(length)) for length in (whole, before))
    return (total - left) * context / total if total else 1.0


def _wave(blocks: list[Profile], setup: Setup) -> float:
    """Waiting for states, as a share of the work: a rank is a layer behind its left neighbour, and layers
    that gather rows bring all to the same layer again.
    """
    runs, inside = 0, False
    for profile in blocks:
        passes = profile.ahead.passed > 0
        runs += passes and not inside
        inside = passes and not profile.ahead.gathered
    return runs * (setup.context - 1) / len(blocks)


def _shared(blocks: list[Profile], setup: Setup, hardware: Hardware, again: int) -> tuple[float, float]:
    """Of a micro-batch: sums over heads, and rows and states of sequences."""
    heads = group(setup.tensor, 1, setup.gpus, hardware.per_node)
    parts = group(setup.context, setup.tensor, setup.gpus, hardware.per_node)
    tensor = context = 0.0
    for profile in blocks:
        for exchanges, times_ in ((profile.ahead, 1 + again), (profile.back, 1)):
            tensor += times_ * _calls(reduce, exchanges.added, exchanges.added_calls, heads, hardware)
            context += times_ * _rows(exchanges, parts, hardware)
    return tensor, context


def _rows(exchanges: Exchanges, parts: Group, hardware: Hardware) -> float:
    gathered = _calls(gather, exchanges.gathered, exchanges.gathered_calls, parts, hardware)
    return gathered + _calls(send, exchanges.passed, exchanges.passed_calls, parts, hardware)


def _calls(how, total: float, calls: float, who: Group, hardware: Hardware) -> float:
    return calls * how(total / calls, who, hardware) if calls and who.ranks > 1 else 0.0


def _data(traced: Traced, setup: Setup, hardware: Hardware) -> float:
    """FSDP, in each micro-batch: blocks are gathered in the forward and again in the backward, the rest once,
    and the gradients of each are reduced. DDP: one all-reduce of all gradients in a step, in buckets.
    """
    blocks, rest = units(traced)
    if setup.strategy == "fsdp":
        who = group(setup.shards, setup.tensor, setup.gpus, hardware.per_node)
        if who.ranks == 1:
            return 0.0
        one = 3 * sum(gather(FP32 * size, who, hardware) for size in blocks)
        return setup.accumulate * (one + 2 * gather(FP32 * rest, who, hardware))
    total = FP32 * (sum(blocks) + rest)
    return _calls(
        reduce, total, -(-total // BUCKET), group(setup.gpus, 1, setup.gpus, hardware.per_node), hardware
    )


def _update(job: Job, setup: Setup, traced: Traced, hardware: Hardware) -> float:
    """Clipping and the optimiser; Muon's products are of whole matrices."""
    moved, flops = 0.0, 0.0
    for name, shape in traced.shapes.items():
        kind = "muon" if job.optimiser == "muon" and name in traced.by_muon else "adamw"
        moved += FP32 * TOUCHES[kind] * local_numel(shape, setup.shards)
        if kind == "muon":
            short, long = sorted(shape)
            flops += NEWTON_SCHULZ * (4 * short**2 * long + 2 * short**3)
    seconds = moved / (hardware.memory_bandwidth * hardware.bandwidth_efficiency)
    return seconds + flops / (hardware.peak_flops * hardware.efficiency)
