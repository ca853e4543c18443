"""Schedules and solves measurements during training, and writes their rows; no Lightning."""
