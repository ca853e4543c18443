"""The commands. Only here is Hydra known; heavy imports wait until a run needs them."""
