"""Loads run directories as data frames and compares them; no torch, no matplotlib."""
