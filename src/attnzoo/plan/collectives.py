"""How long ranks need to exchange bytes: rings inside a node, and rings of equal places across nodes.

A group of n = g m ranks has g in each of m nodes. Gathering B bytes runs in two stages: across nodes every
rank collects the parts of its place in the other nodes, B / g in the end, then inside the node the ranks pass
these on. A reduce-scatter is the same backwards, an all-reduce is both. The stages run one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.plan.hardware import Hardware


@dataclass(frozen=True)
class Group:
    """Ranks that exchange. Args: ``inside``: in each node; ``nodes``."""

    inside: int
    nodes: int

    @property
    def ranks(self) -> int:
        return self.inside * self.nodes


def group(ranks: int, stride: int, world: int, most: int) -> Group:
    """``ranks`` that are ``stride`` apart in the numbering of a world whose nodes have at most ``most``.

    All nodes have as many. Of groups that lie differently the slowest counts: those that do not fill nodes
    evenly are taken as far apart as the worst place of one lets them be.
    """
    node = max(n for n in range(1, min(world, most) + 1) if world % n == 0)
    inside = max(n for n in range(1, ranks + 1) if ranks % n == 0 and (n == 1 or node % (n * stride) == 0))
    return Group(inside, ranks // inside)


def sent(total: float, who: Group) -> tuple[float, float]:
    """Bytes that a rank sends inside its node and to other nodes when ``total`` bytes are gathered."""
    return (who.inside - 1) / who.inside * total, (who.nodes - 1) / who.nodes * total / who.inside


def gather(total: float, who: Group, hardware: Hardware) -> float:
    """Seconds until every rank has all ``total`` bytes; also of a reduce-scatter of as many."""
    inside, outside = sent(total, who)
    share = hardware.bandwidth_efficiency
    steps = (who.inside - 1) * hardware.link_latency + (who.nodes - 1) * hardware.network_latency
    return inside / (hardware.link * share) + outside / (hardware.network * share) + steps


def reduce(total: float, who: Group, hardware: Hardware) -> float:
    """Seconds of an all-reduce of ``total`` bytes: a reduce-scatter and a gathering."""
    return 2 * gather(total, who, hardware)


def send(total: float, who: Group, hardware: Hardware) -> float:
    """Seconds that ``total`` bytes take from a rank to the next one."""
    if who.ranks == 1:
        return 0.0
    outside = who.nodes > 1
    speed, wait = (
        (hardware.network, hardware.network_latency) if outside else (hardware.link, hardware.link_latency)
    )
    return total / (speed * hardware.bandwidth_efficiency) + wait
