"""The property suite, on any mixer: what `attnzoo.testing.check` asserts is the contract; and
`mixing_matrix`, a mixer's weights as a table.
"""

from attnzoo.testing.mixing import mixing_matrix
from attnzoo.testing.subject import Subject
from attnzoo.testing.suite import PROPERTIES, check

__all__ = ["PROPERTIES", "Subject", "check", "mixing_matrix"]
