"""Turns data frames into figures and a page."""
