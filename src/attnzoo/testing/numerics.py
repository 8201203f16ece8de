"""Properties of values: rows are independent, implementations agree, gradients reach every parameter."""

from __future__ import annotations

import torch

from attnzoo.context import Collector, Context
from attnzoo.testing.subject import LENGTH, Subject, gap, inputs, require


def row_independent(subject: Subject) -> None:
    """A row's output does not depend on the other rows of the batch."""
    mixer, x = subject.mixer().eval(), inputs(batch=3)
    with torch.no_grad():
        y = mixer(x)
        worst = max(gap(y[b], mixer(x[b : b + 1])[0]) for b in range(3))
    if subject.has("row_independent"):
        require(worst <= 1e-11, f"a row alone differs by {worst:.1e} from itself in a batch")
    else:
        require(worst > 1e-6, "the card says row_independent=False, but no row reads another")


def forms(subject: Subject) -> None:
    """The default implementation equals impl="reference", values and gradients; chunk sizes do not matter."""
    cases = [
        {"impl": "reference"},
        *({"chunk_size": c} for c in (1, 3, 8, 64) if _takes_chunks(subject, c)),
    ]
    x, probe = inputs(), inputs(seed=3)

    def run(**more: object) -> list[torch.Tensor]:
        mixer, leaf = subject.mixer(**more), x.clone().requires_grad_()
        y = mixer(leaf)
        grads = torch.autograd.grad(
            (y * probe).sum(), [leaf, *(p for p in mixer.parameters() if p.requires_grad)], allow_unused=True
        )
        return [y.detach(), *(g for g in grads if g is not None)]

    want = run()
    for case in cases:
        got = run(**case)
        require(len(got) == len(want), f"{case} reaches other parameters than the default")
        worst = max(
            gap(a, b) if float(b.abs().max()) > 1e-12 else float(a.abs().max())
            for a, b in zip(got, want, strict=True)
        )
        require(worst <= 1e-9, f"{case} differs by {worst:.1e} from the default implementation")


def _takes_chunks(subject: Subject, size: int) -> bool:
    """Whether it has the option, and does not refuse this size (a mechanism may need powers of two)."""
    # under its options a variant may be of a frame without chunks
    if "chunk_size" not in subject.takes & set(getattr(subject.mixer(), "options", subject.takes)):
        return False
    try:
        subject.mixer(chunk_size=size)
    except ValueError as error:
        refused = str(error).startswith("chunk_size:") and size & (size - 1) != 0
        require(refused, f"chunk_size={size} does not work: {error}")
        return False
    return True


def gradients(subject: Subject) -> None:
    """Every parameter gets a finite gradient that is not zero; exceptions are on the card, and true."""
    if not subject.has("trains"):
        return
    mixer, collector = subject.mixer().train(), Collector()
    y = mixer(inputs(), Context(collector=collector))
    ((y * inputs(seed=3)).sum() + collector.total()).backward()
    for name, param in mixer.named_parameters():
        reached = param.grad is not None and bool((param.grad != 0).any())
        if name in subject.card.no_grad:
            require(not reached, f"the card says {name} has no gradient, but it has")
            continue
        require(reached, f"{name} gets no gradient")
        require(bool(param.grad.isfinite().all()), f"{name} gets a gradient that is not finite")
    require(
        all(n in dict(mixer.named_parameters()) for n in subject.card.no_grad), "no_grad names no parameter"
    )


def finite(subject: Subject) -> None:
    """Values and gradients are finite at extreme and degenerate inputs, T = 1, odd T, fp32 and bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = subject.mixer(dtype).train()
        for scale in (0.0, 1.0, 300.0):
            for length in (1, 2, LENGTH):
                x = (scale * inputs(length=length)).to(dtype).requires_grad_()
                y = mixer(x)
                require(y.dtype == dtype, f"{dtype} in, {y.dtype} out")
                require(y.shape == x.shape, f"x {tuple(x.shape)} in, y {tuple(y.shape)} out")
                require(bool(y.isfinite().all()), f"y is not finite at x * {scale}, T={length}, {dtype}")
                grads = torch.autograd.grad(
                    y.float().square().mean(), [x, *mixer.parameters()], allow_unused=True
                )
                bad = any(g is not None and not bool(g.isfinite().all()) for g in grads)
                require(not bad, f"a gradient is not finite at x * {scale}, T={length}, {dtype}")


def low_precision(subject: Subject) -> None:
    """bf16 autocast stays within bf16 rounding of fp64."""
    x = inputs(dtype=torch.float32)
    with torch.no_grad():
        want = subject.mixer().eval()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            got = subject.mixer(torch.float32).eval()(x)
    error = float((got.double() - want).norm() / want.norm())
    require(error <= 0.05, f"bf16 autocast is {error:.1%} away from fp64")
