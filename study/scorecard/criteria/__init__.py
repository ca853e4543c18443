"""The rule for verdicts on the paper's claims: core checks, their outcomes, and null models."""

from criteria import gpt, others

CHECKS = (*gpt.CHECKS, *others.CHECKS)
