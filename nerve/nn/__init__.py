"""Layers: the design factors as values, and the modules that they build."""
