"""The report page's content, without a browser: what it says, what it leaves out, and that data stays data."""

from __future__ import annotations

import pytest

pytest.importorskip("plotly")

from attnzoo.compare.page import render
from comparisons import bare, comparison


@pytest.mark.parametrize(
    "made", [comparison(), comparison(seeds=1), bare()], ids=["whole", "one seed", "bare"]
)
def test_page_is_one_document(made):
    page = render(made)
    assert page.count("<!DOCTYPE html>") == 1
    assert page.rstrip().endswith("</html>")
    assert "NaN" not in page.split('id="figures"')[1].split("</script>")[0]
