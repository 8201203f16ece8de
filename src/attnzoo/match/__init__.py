"""Equal budgets: the size at which a variant costs what the reference costs."""

from attnzoo.match.budget import BUDGETS, budget_of
from attnzoo.match.knobs import KNOBS
from attnzoo.match.solve import Matched, solve

__all__ = ["BUDGETS", "KNOBS", "Matched", "budget_of", "solve"]
