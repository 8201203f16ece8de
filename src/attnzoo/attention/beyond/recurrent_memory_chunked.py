"""Three reads by the same queries: the whole past, the own chunk, and a bank of summaries of past chunks.

Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling, arXiv
2507.00453.

    chunks of c tokens, counted inside the document; once chunk n is complete, with its mean m of x:
        g = sigmoid([m ; m_(n-1)] W_g + b_g),  m_n = g * tanh(m W_m) + (1 - g) * m_(n-1)
    o^glob = causal attention,  o^loc = causal attention inside the own chunk
    o^mem  = softmax(q (M W_mk)^T / sqrt(d)) (M W_mv),  M = the last S summaries of chunks before the own one
    o_h = sum_i w_i,h o^i_h,  w_h = softmax(f_h) over the enabled reads

Cached: k, v (of the own chunk only, without the global read) and the states M (S D) and the sum of the
unfinished chunk (D). Our choice, for want of released code: all equations; o^mem is 0 while M is empty; it is
read by queries without position, since summaries have none; W_mk and W_mv have as many heads as k and v; the
memory begins anew in each document and is not carried from batch to batch; chunk and memory are small by
default.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attnzoo.attention.beyond.chunks import Chunks, OwnChunk, Summaries, chunk_means, find_chunks, goes_on
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Single
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Mask, Static, band
from attnzoo.attention.timeline import Axis
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys, computed_pairs
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import Card, register


class MemoryReads(Single):
    """The reads, each an attention of its own, mixed by one weight per head; see the module.

    Args:
        masks: of the global read (None = without it) and of the own chunk.
        slots: S, 0 = without memory. heads, widths: of queries, keys and values.
        detach: gradients stop at the chunk before.
        impl: of the attentions, for the cost.
    """

    counts = True
    whole = True

    def __init__(
        self,
        draft: Draft,
        masks: tuple[Mask | None, OwnChunk],
        slots: int,
        detach: bool,
        impl: str,
    ) -> None:
        super().__init__()
        self.masks, self.size, self.slots, self.detach = masks, masks[1].size, slots, detach
        self.dim, self.impl = draft.dim, impl
        shapes = draft.shapes()
        self.heads = (draft.score_heads or draft.num_heads, shapes["k"][0], shapes["v"][0])
        self.queries = draft.num_heads
        self.widths = (draft.head_dim, draft.qk_width, draft.v_head_dim)
        self.appended = getattr(draft.slots.get("position"), "appended", 0)
        self.mem_sizes = [self.heads[1] * self.widths[0], self.heads[2] * self.widths[2]]
        if slots:
            self.gate = draft.linear("mem_gate", 2 * self.dim, self.dim, bias=True)
            self.write = draft.linear("mem_write", self.dim, self.dim)
            self.mem_kv = draft.linear("mem_kv", self.dim, sum(self.mem_sizes))
        paths = (masks[0] is not None) + 1 + (slots > 0)
        self.mix = flag(nn.Parameter(torch.zeros(paths, self.heads[0])), decay=False) if paths > 1 else None

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        outs = [attend(q, (keys, mask)) for mask in self.masks if mask is not None]
        if self.slots:
            outs.append(self._memory(attend, keys, call))
        if self.mix is None:
            return outs[0]
        weight = self.mix.softmax(0).to(outs[0].dtype)[:, None, :, None, None]  # (P, 1, H, 1, 1)
        return sum(w * o for w, o in zip(weight, outs, strict=True))

    def split(self, share: Share) -> None:
        heads, d_k, d_v = self.heads[0], self.widths[0], self.widths[2]
        if heads != self.queries:
            raise CannotSplit("a head has several scores")
        if self.slots:
            share.rows(self.mem_kv, (self.heads[1], d_k), (self.heads[2], d_v))
        if self.mix is not None:
            share.cut(self, "mix", (heads, 1), dim=1)
        self.heads = tuple(share.count(n) for n in self.heads)
        self.queries, self.mem_sizes = self.heads[0], [self.heads[1] * d_k, self.heads[2] * d_v]
        share.keep(self)

    def _memory(self, attend, keys: Keys, call: Call) -> Tensor:
        B, _, D = call.x.shape
        chunks = call.line.once(("chunks", self.size), lambda: find_chunks(self.size, call))
        means = chunk_means(chunks, self.size, call)
        bank, number, doc = self._cached(call)  # a state of its own, read after the means have put theirs
        summaries = self._summaries(means, chunks, bank, call)
        # a key of zeros, seen where there is no summary yet: its value is what an empty memory reads
        nothing = torch.zeros(B, 1, D, dtype=summaries.dtype, device=summaries.device)
        minus = torch.full((B, 1), -1, device=number.device)
        rows = [nothing, summaries] if bank is None else [nothing, bank.to(summaries.dtype), summaries]
        numbers = [minus, chunks.number] if bank is None else [minus, number, chunks.number]
        dead = torch.where(chunks.ends, chunks.doc, -1)
        docs = [dead] if bank is None else [doc, dead]
        memory = torch.cat(rows, dim=1)
        if bank is not None:  # in place: after its last use
            self._keep(bank, number, summaries, chunks, call)
        k, v = (
            z.unflatten(-1, (heads, -1)).transpose(1, 2)
            for z, heads in zip(
                self.mem_kv(memory).split(self.mem_sizes, dim=-1), self.heads[1:], strict=True
            )
        )
        axis = Axis(torch.cat(numbers, dim=1), torch.cat([minus, *docs], dim=1))
        q = call.raw.q  # a head may have several scores, each with its own keys
        q = q if q.shape[1] == self.heads[0] else q.repeat(1, self.heads[0] // q.shape[1], 1, 1)
        seen = keys._replace(k=k.to(q.dtype), v=v.to(q.dtype), axis=axis, aligned=False)
        return attend(q, (seen, Summaries(self.size, self.slots)))

    def _cached(self, call: Call) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The bank ``(B, S, D)``, and its chunks' numbers and documents."""
        bank = call.mem.state("memory")
        seen = goes_on(call) // self.size
        number = seen - self.slots + torch.arange(self.slots, device=seen.device)
        return bank, number.clamp(min=-1), torch.where(number >= 0, 0, -1)

    def _summaries(self, means: Tensor, chunks: Chunks, bank: Tensor | None, call: Call) -> Tensor:
        """``(B, N, D)``: the recursion over chunks; all but ``m_(n-1) W_g`` is done at once."""
        fresh, old = self.gate.weight.split(self.dim, dim=1)
        fresh = torch.nn.functional.linear(means, fresh, self.gate.bias)
        written = torch.tanh(self.write(means))
        last = torch.zeros_like(means[:, 0]) if means.shape[1] else None
        if bank is not None and means.shape[1]:
            last = bank[:, -1].to(means.dtype)
        outs = []
        for n in range(means.shape[1]):
            last = torch.where(chunks.number[:, n, None] > 0, last, 0)
            last = last.detach() if self.detach else last
            g = torch.sigmoid(fresh[:, n] + torch.nn.functional.linear(last, old)).to(means.dtype)
            last = g * written[:, n].to(means.dtype) + (1 - g) * last
            outs.append(last)
        return torch.stack(outs, dim=1) if outs else means

    def _keep(self, bank: Tensor, number: Tensor, new: Tensor, chunks: Chunks, call: Call) -> None:
        """The last S summaries of each row's last document."""
        line = call.line
        if line.doc is None:
            done = (line.past + line.length) // self.size - line.past // self.size
            rows = torch.cat([bank, new[:, :done].to(bank.dtype)], dim=1)
            call.mem.put("memory", rows[:, -self.slots :])
            return
        index = (line.count() - 1).clamp(min=0)[:, None]
        doc, end = line.doc.gather(1, index), line.order.gather(1, index)
        wanted = (end + 1) // self.size - self.slots + torch.arange(self.slots, device=end.device)
        some = line.count()[:, None] > 0
        rows = torch.cat([bank, new.to(bank.dtype)], dim=1)
        numbers = torch.cat([number, chunks.number], dim=1)
        docs = torch.cat([torch.where(number >= 0, 0, -1), torch.where(chunks.ends, chunks.doc, -1)], dim=1)
        match = (numbers[:, None] == wanted[..., None]) & (docs == doc)[:, None] & (wanted >= 0)[..., None]
        call.mem.put("memory", torch.where(some[..., None], match.to(rows.dtype) @ rows, bank))

    def memory(self) -> dict[str, Slot]:
        if not self.slots:
            return {}
        return {"memory": Slot("state", (self.slots, self.dim)), "unfinished": Slot("state", (self.dim,))}

    def work(self, length: int) -> Iterable[Work]:
        H, (content, width, v_width) = self.heads[0], self.widths
        for name, mask in zip(("global read", "own chunk"), self.masks, strict=True):
            if mask is not None:
                per_pair = 2 * H * (width + v_width)
                runs = per_pair * computed_pairs(mask, length, self.impl)
                yield Work("mixing", name, per_pair * mask.pairs(length), runs, "hidden keys", per_head=True)
                bias = 2 * H * self.appended * computed_pairs(mask, length, self.impl)
                yield Work("mixing", f"bias, {name}", 0, bias, "channels that carry the bias")
        if not self.slots:
            return
        c, N, per_pair = self.size, length // self.size, 2 * H * (content + v_width)
        per_chunk = 2 * self.dim * sum(self.mem_sizes)
        seen = sum(min(self.slots, n) * (min((n + 1) * c, length) - n * c) for n in range(N + 1))
        yield Work("mixing", "memory recursion", 2 * N * 3 * self.dim**2)
        why = "the key of an empty memory"
        yield Work("projections", "W_mk, W_mv", N * per_chunk, (N + 1) * per_chunk, why)
        runs = per_pair * length * (N + 1)
        yield Work("mixing", "memory read", per_pair * seen, runs, "hidden summaries", per_head=True)


@register(
    Card(
        name="recurrent_memory_chunked",
        title="Global, chunked and recurrent-memory attention",
        paper="Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context "
        "Language Modeling",
        arxiv="2507.00453",
        family="beyond",
        summary="Queries read the whole past, their own chunk, and a bank of gated summaries of past chunks.",
        cached="k, v (without the global read: of the own chunk), S summaries and one running sum of width D",
        small={"chunk": 4, "mem_slots": 2},
    ),
)
def recurrent_memory_chunked(
    draft: Draft,
    *,
    chunk: int = 16,
    mem_slots: int = 32,
    use_global: bool = True,
    detach_memory: bool = False,
) -> None:
    """Sets the reads.

    Args:
        chunk: c, at least 1; 256 suits long contexts. mem_slots: S summaries that are kept; 0 = no memory.
        use_global: whether the whole past is read too, or ``window`` of it.
        detach_memory: no gradient from a summary to the one before.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with all weight on the global read; mha inside each chunk with S = 0 and no global read.
    """
    if chunk < 1:
        raise ValueError(f"chunk: must be at least 1, got {chunk}")
    if mem_slots < 0:
        raise ValueError(f"mem_slots: must be at least 0 (0 = no memory), got {mem_slots}")
    window, n_sink = draft.host["window"], draft.host["n_sink"]
    if window is not None and not use_global:
        raise ValueError(f"window: narrows the global read, which is off, got {window}; set use_global=true")
    far, near = band(window, n_sink) if use_global else None, OwnChunk(chunk)
    draft.put("mask", Static(near if far is None else far | near))

    def complete(done: Draft) -> None:
        own = [name for name in ("score", "normalise") if name in done.slots]
        if mem_slots and "score" in own:
            raise ValueError(
                f"mem_slots: a score of its own compares tokens, summaries are none, got {mem_slots}; "
                "set it to 0 or leave that variant out"
            )
        impl = "reference" if own or done.host["impl"] == "reference" else "sdpa"
        done.put("read", MemoryReads(done, (far, near), mem_slots, detach_memory, impl))

    draft.very_last(complete)
