"""The configuration: where Hydra finds it, what may be overridden, and how a resumed run gets its
own."""
