"""Memory and step time of training on machines that are not there; see docs/plan.md."""

from attnzoo.plan.estimate import Choice, Estimate, choose, estimate, refusal
from attnzoo.plan.hardware import Hardware, entry_for, read_hardware
from attnzoo.plan.setup import Job, Setup

__all__ = [
    "Choice",
    "Estimate",
    "Hardware",
    "Job",
    "Setup",
    "choose",
    "entry_for",
    "estimate",
    "read_hardware",
    "refusal",
]
