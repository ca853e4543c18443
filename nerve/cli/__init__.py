"""The commands. Hydra is used only here; heavy imports wait until a run needs them."""
