"""Errors that a user can fix. A message gives the rule, what was received and the likely fix."""


class NerveError(Exception):
    """Base of all errors that the command line shows as one message, without a traceback."""


class ConfigError(NerveError):
    """A configuration value, or a combination of values, that cannot be run."""


class DataError(NerveError):
    """A corpus, image archive, tokenizer or token cache that cannot be used."""


class StoreError(NerveError):
    """A run directory or a stored file that cannot be read or written."""


class MeasurementError(NerveError):
    """Features captured wrongly, not at all or twice; or a spectrum that cannot be one."""


class DivergedError(NerveError):
    """The training loss became NaN or infinite."""
