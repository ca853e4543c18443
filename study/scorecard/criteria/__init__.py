"""The rule for verdicts on the paper's claims: core checks, their outcomes, and null models.

Effects, intervals and outcomes are computed by `nerve.analysis.estimate`.
"""

from criteria import gpt, others, ours

CHECKS = (*gpt.CHECKS, *others.CHECKS)
"""The checks of the paper's claims."""
OURS = ours.CHECKS
"""The checks of our own claims."""
