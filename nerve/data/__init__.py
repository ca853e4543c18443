"""Corpora, token caches and images as Lightning data modules.

A batch is a pure function of (seed, batch index), so a run resumes exactly. The split and the
held-out set do not depend on the seed, so all runs on a corpus are evaluated on the same data.
"""
