"""Layers: the design factors as settings, and the modules that they build."""
