"""Run directories of the commands, whose messages name the options of these."""

from nerve.storage.directory import RunDirectory


class SingleRunDirectory(RunDirectory):
    """The directory of a single run of `nerve-run`."""

    ANOTHER = "another directory with hydra.run.dir=…"
    RETRY = "retry=true"


class TrialDirectory(RunDirectory):
    """The directory of a trial of a sweep."""

    ANOTHER = "another directory with hydra.sweep.dir=…"
    RETRY = "retry=true"


class ProbeDirectory(RunDirectory):
    """The directory of a run of `nerve-probe`."""

    ANOTHER = "another directory with -o"
