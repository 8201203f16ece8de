"""Properties of order: nothing reads the future, and how long a sequence is does not matter to its start."""

from __future__ import annotations

import torch

from attnzoo.testing.subject import LENGTH, Subject, gap, inputs, require

CUTS = (1, 2, 7, 13, LENGTH - 1)


def causal(subject: Subject) -> None:
    """Changing x from t on leaves every y before t as it was (1e-12 in fp64).

    A mixer whose card says it is not causal must show it.
    """
    mixer, x = subject.mixer(), inputs()
    worst = 0.0
    with torch.no_grad():
        y = mixer(x)
        for t in CUTS:
            changed = x.clone()
            changed[:, t:] = 5 * inputs(seed=2)[:, t:]
            worst = max(worst, gap(mixer(changed)[:, :t], y[:, :t]))
    if subject.has("causal"):
        require(worst <= 1e-12, f"y before t changes by {worst:.1e} when x changes from t on")
    else:
        require(worst > 1e-6, "the card says causal=False, but no output reads the future")


def causal_gradient(subject: Subject) -> None:
    """The gradient of y_i to x_j is exactly zero for j > i, through routing and selection too."""
    if not subject.has("causal"):
        return
    mixer = subject.mixer()
    x = inputs().requires_grad_()
    y = mixer(x)
    probe = inputs(seed=3)
    for i in (0, *CUTS):
        i = min(i, LENGTH - 2)
        (grad,) = torch.autograd.grad((y[:, i] * probe[:, i]).sum(), x, retain_graph=True)
        require(bool((grad[:, i + 1 :] == 0).all()), f"y_{i} has a gradient to a later x")
        require(bool((grad[:, : i + 1] != 0).any()), f"y_{i} has no gradient at all")


def prefix_consistent(subject: Subject) -> None:
    """``f(x[:, :t]) == f(x)[:, :t]`` for every t: no selection, mask or statistic depends on the length."""
    mixer, x = subject.mixer(), inputs()
    with torch.no_grad():
        y = mixer(x)
        worst = max(gap(mixer(x[:, :t]), y[:, :t]) for t in range(1, LENGTH))
    if subject.has("prefix_consistent"):
        require(
            worst <= 1e-11, f"the output of a prefix differs by {worst:.1e} from the prefix of the output"
        )
    else:
        require(worst > 1e-6, "the card says prefix_consistent=False, but every prefix agrees")
