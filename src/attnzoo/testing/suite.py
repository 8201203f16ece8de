"""All properties by name, and `check`, which runs them on one variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnzoo.testing import bookkeeping, documents, memory, numerics, order
from attnzoo.testing.subject import Subject

PROPERTIES: dict[str, Callable[[Subject], None]] = {
    f.__name__: f
    for f in (
        order.causal,
        order.causal_gradient,
        order.prefix_consistent,
        memory.decode,
        memory.decode_positions,
        memory.cache_bytes,
        documents.documents,
        documents.document_gradients,
        documents.document_decode,
        documents.unequal_prompts,
        numerics.row_independent,
        numerics.forms,
        numerics.gradients,
        numerics.finite,
        numerics.low_precision,
        bookkeeping.parameters,
        bookkeeping.flops,
        bookkeeping.state_dict,
        bookkeeping.seeded,
        bookkeeping.sizes,
        bookkeeping.default_positions,
    )
}


def check(target: str | Subject, **options: Any) -> list[str]:
    """Runs the property suite.

    Args:
        target: a registered name, or a `Subject` for a mixer that is not registered.
        options: of the variant. Without any, the defaults are tested, the card's ``small`` options, and a
            stack where the card says that the mechanism spans layers.

    Returns:
        The names of the properties that hold.

    Raises:
        AssertionError: naming the variant, its options, and every property that does not hold, with the
            reason.
    """
    subject = Subject.of(target, **options) if isinstance(target, str) else target
    cases = [subject]
    if not subject.options:
        named = Subject.cases(target).values() if isinstance(target, str) else ()
        small = subject.card.small and Subject(subject.make, subject.card, subject.card.small)
        cases = list(named) or [subject, *filter(None, [small])]
    failures = []
    for case in cases:
        for name, holds in PROPERTIES.items():
            try:
                holds(case)
            except Exception as error:
                failures.append(f"{name} {dict(case.options) or ''}: {error}")
    if failures:
        raise AssertionError(
            f"{subject.card.name} breaks {len(failures)} properties:\n  " + "\n  ".join(failures)
        )
    return list(PROPERTIES)
