"""The monitor for training loops that are not nerve's own; no Lightning."""
