"""Spans against the definition, key by key, and against the masks of the mixers."""

from __future__ import annotations

import pytest
import torch

from attnzoo.attention.stages.mask import band
from attnzoo.attention.timeline import Axis
from attnzoo.ops.adapters import band_of, span_of
from attnzoo_kernels.span import Span


@pytest.mark.parametrize(("window", "n_sink"), [(None, 0), (1, 0), (3, 0), (3, 2), (50, 0)])
def test_visible_is_the_definition(window: int | None, n_sink: int) -> None:
    first = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 9]], dtype=torch.int32)
    own = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.int32)  # the last row is padding
    table = Span(first, own, window, n_sink).visible(9)[0, 0]
    for i in range(9):
        for j in range(9):
            a, o = int(first[0, i]), int(own[0, i])
            near = window is None or o - j < window or j - a < n_sink
            assert bool(table[i, j]) == (a <= j <= o and near), (i, j)


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("n_sink", [0, 2])
def test_cols_hold_every_visible_key(window: int | None, n_sink: int) -> None:
    if window is None and n_sink:
        window = 100
    first = torch.tensor([[0] * 5 + [5] * 6, [0] * 11], dtype=torch.int32)
    own = torch.arange(11, dtype=torch.int32).expand(2, -1)
    span = Span(first, own, window, n_sink)
    whole = span.visible(11)
    for rows in (slice(0, 4), slice(4, 7), slice(10, 11)):
        cols = span.cols(11, rows)
        assert whole[:, :, rows].sum() == span.visible(11, rows, cols).sum()
        if window == 2 and not n_sink:
            assert cols.stop - cols.start <= rows.stop - rows.start + 1


@pytest.mark.parametrize("mask", [band(), band(3), band(3, 2)], ids=str)
def test_span_of_a_mask(mask) -> None:
    order = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 0]])
    doc = torch.tensor([[1, 1, 1, 2, 3, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1, 2]])
    axis = Axis(order, doc)
    assert torch.equal(span_of(mask, axis, 9).visible(9)[:, 0], mask.visible(axis, axis))
    late = Axis(torch.arange(5, 9)[None], None)
    assert torch.equal(span_of(mask, late, 9).visible(9)[0, 0], mask.dense(4, 9))


def test_only_bands_are_spans() -> None:
    assert band_of(band(4, 1)) == (4, 1)
    assert band_of(band() | band(3)) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("first", torch.zeros(1, 4), "span.first: needs int32"),
        ("own", torch.zeros(3, 4, dtype=torch.int32), r"span.own: needs int32 \(2 or 1, 4\)"),
        ("window", 0, "span.window: must be at least 1"),
        ("n_sink", -1, "span.n_sink: must be at least 0"),
    ],
)
def test_bad_spans(field: str, value: object, message: str) -> None:
    good = Span.causal(4, 4, torch.device("cpu"))
    fields = {"first": good.first, "own": good.own, "window": 2, "n_sink": 0, field: value}
    with pytest.raises(ValueError, match=message):
        Span(**fields).check(2, 4, 4, torch.device("cpu"))
