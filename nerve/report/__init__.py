"""Data frames to figures and a page."""
