"""What a training run imports, some of it only when needed: loaded once, for the server of `children`."""

import datasets  # noqa: F401

import runs  # noqa: F401
from attnzoo import list_variants

list_variants()  # imports every variant
