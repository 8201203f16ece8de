"""Kernels run natively on a GPU and in Triton's interpreter elsewhere, which must be set before they load."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
