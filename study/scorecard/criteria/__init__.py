"""The rule for verdicts on the paper's claims: core checks, their outcomes, and null models.

Effects, intervals and what follows from them are those of `nerve.analysis.estimate`.
"""

from criteria import gpt, others

CHECKS = (*gpt.CHECKS, *others.CHECKS)
