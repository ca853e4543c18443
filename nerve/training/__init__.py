"""Lightning: the modules that train, the monitor, callbacks, loggers, checkpoints and signals."""
