"""The rule for verdicts on the paper's claims: core checks, their outcomes, and null models.

Effects, intervals and what follows from them are those of `nerve.analysis.estimate`.
"""

from criteria import gpt, others, ours

CHECKS = (*gpt.CHECKS, *others.CHECKS)
"""Of the paper's claims."""
OURS = ours.CHECKS
"""Of claims of our own."""
