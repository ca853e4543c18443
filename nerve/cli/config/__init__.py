"""The configuration: where Hydra finds it, what may be overridden, and that of a resumed run."""
