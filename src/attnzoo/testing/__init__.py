"""The property suite, on any mixer: what `attnzoo.testing.check` asserts is the contract."""

from attnzoo.testing.subject import Subject
from attnzoo.testing.suite import PROPERTIES, check

__all__ = ["PROPERTIES", "Subject", "check"]
