"""Run directories to data frames, and what compares them; no torch, no matplotlib."""
