"""What a sweep prints about its trials: before, while they run, and at the end."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from nerve.cli.console import console, error_text, figure, say, say_next
from nerve.cli.sweep.grid import Trial
from nerve.errors import NerveError, StoreError, first_line
from nerve.storage.record import RunRecord
from nerve.storage.state import RunState

STATE_LABELS = {
    RunState.NEW: "new",
    RunState.INTERRUPTED: "interrupted",
    RunState.DEAD: "killed",
    RunState.FAILED: "failed",
    RunState.DONE: "done",
    RunState.ALIVE: "running elsewhere",
}
ACTIONS = {
    RunState.NEW: "run",
    RunState.INTERRUPTED: "resumed",
    RunState.DEAD: "resumed",
    RunState.FAILED: "retried",
}
SHOWN = 8
"""Maximum number of trials or jobs named in one line; more are counted."""


class SweepError(NerveError):
    """A sweep ended with trials that are not done; the message says which and why.

    Attributes:
        exit_status: of the command.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class SweepTable:
    """Reports the trials of a sweep to the user. How each ended is read from its directory.

    Args:
        folder: of the sweep.
        trials: all of the grid.
    """

    def __init__(self, folder: Path, trials: Sequence[Trial]) -> None:
        self._folder = folder
        self._trials = trials
        self._labels = _labels(trials)
        self._starts = [n_starts(trial) for trial in trials]
        self._n_to_do = sum(trial.is_to_do for trial in trials)
        self._n_started = 0
        self._ended: list[Trial] = []

    def begin(self) -> None:
        """Prints the number of trials, and what was found of them."""
        found = counted(self._trials)
        say(f"sweep {self._folder}: {n_trials(len(self._trials))}, {found}; {self._n_to_do} to run")
        jobs = [trial.job for trial in self._trials if trial.job is not None]
        if jobs:
            say(f"also waiting for {_some(jobs)}, submitted before with their own hydra.launcher")

    def starting(self, trial: Trial) -> None:
        """Prints that a trial starts."""
        self._n_started += 1
        say(
            f"[{self._n_started}/{self._n_to_do}] {self._labels[trial.number]} "
            f"({ACTIONS[trial.state_before]} in {trial.directory})"
        )

    def ended(self, trial: Trial) -> None:
        """Prints how a trial ended, whose directory has just been read."""
        self._ended.append(trial)
        state, record, reason = _ending(trial)
        loss = f", validation loss {figure(record.final.get('val_loss'))}" if record else ""
        outcome = f"done{loss}" if state == RunState.DONE else reason
        say(f"{self._labels[trial.number]}: {outcome}")

    def end(self, signum: int | None = None, errors: Sequence[Exception] = ()) -> None:
        """Prints the summary.

        Args:
            signum: the signal that asked the sweep to stop, if any.
            errors: the errors of a launcher.

        Raises:
            SweepError: unless all trials are done.
        """
        table = Table(title=f"sweep {self._folder}", title_justify="left")
        for name in ("", "trial", "this time", "state", "step", "val loss", "directory"):
            right = name in ("", "step", "val loss")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        reasons: dict[str, list[Trial]] = {}
        is_any_done = False
        settled = {trial.directory for trial in self._ended}
        for run in {trial.directory: trial.run for trial in self._trials}.values():
            if run.path not in settled:
                run.reload()
        for trial in self._trials:
            state, record, reason = _ending(trial)
            is_any_done = is_any_done or state == RunState.DONE
            known = (
                record is not None and trial.duplicate_of is None and trial.rejected_because is None
            )
            table.add_row(
                str(trial.number),
                self._labels[trial.number],
                self._action(trial),
                state,
                record.progress if record and known else "",
                figure(record.final.get("val_loss")) if record and known else "",
                trial.directory.name if trial.rejected_because is None else "",
            )
            if trial.duplicate_of is None and state != RunState.DONE:
                reasons.setdefault(reason, []).append(trial)
        console().print(table)
        if is_any_done:
            say_next(self._folder)
        if reasons or signum is not None:
            self._raise(reasons, signum, errors)

    def _action(self, trial: Trial) -> str:
        if trial.rejected_because is not None:
            return "refused"
        if trial.duplicate_of is not None:
            return f"same as {trial.duplicate_of}"
        if trial.job is not None:
            return "waited for"
        if not trial.is_to_do:
            return "skipped"
        started = n_starts(trial) > self._starts[trial.number]
        return ACTIONS[trial.state_before] if started else "not started"

    def _raise(
        self, reasons: dict[str, list[Trial]], signum: int | None, errors: Sequence[Exception]
    ) -> NoReturn:
        n_missing = sum(map(len, reasons.values()))
        lines = [f"{n_missing} of {n_trials(len(self._trials))} in {self._folder} are not done."]
        for reason, trials in reasons.items():
            names = [f"{trial.number} ({self._labels[trial.number]})" for trial in trials]
            lines.append(f"  {_some(names)}: {reason}")
        for error in errors:
            # submitit's message continues with the whole log of the job; its first line has the
            # path.
            lines.append(f"  the launcher: {first_line(error)}")
        lines.append(
            "Repeat the command to run what is not done; retry=true includes failed trials."
        )
        raise SweepError("\n".join(lines), 1 if signum is None else 128 + signum)


def _ending(trial: Trial) -> tuple[str, RunRecord | None, str]:
    """A trial's state, its record, and why it is not done."""
    if trial.rejected_because is not None:
        return "", None, trial.rejected_because
    try:
        state, record = trial.run.state, trial.run.record
    except StoreError as error:
        return "unreadable", None, str(error)
    if record is None:
        reason = "not started" if state == RunState.NEW else STATE_LABELS[state]
        return state, None, trial.start_error or reason
    why = "; ".join(filter(None, [error_text(record.error), trial.start_error]))
    return state, record, f"{STATE_LABELS[state]}: {why}" if why else STATE_LABELS[state]


def n_starts(trial: Trial) -> int:
    """How many times a process has started working in the trial's directory."""
    if trial.rejected_because is not None:
        return 0
    try:
        return trial.run.n_starts
    except StoreError:
        return 0


def _labels(trials: Sequence[Trial]) -> list[str]:
    """What distinguishes each trial: the overrides that not all of them share."""
    counts = Counter(override for trial in trials for override in set(trial.overrides))
    return [
        " ".join(override for override in trial.overrides if counts[override] < len(trials))
        or "the only one"
        for trial in trials
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def label_before(trial: Trial) -> str:
    """What was found of a trial before the sweep."""
    if trial.rejected_because is not None:
        return "refused"
    if trial.duplicate_of is not None:
        return f"same as {trial.duplicate_of}"
    return "submitted before" if trial.job is not None else STATE_LABELS[trial.state_before]


def counted(trials: Sequence[Trial]) -> str:
    """How many trials were found in which state: `2 new, 1 done`."""
    kinds = Counter(
        "repeated" if found.startswith("same as") else found for found in map(label_before, trials)
    )
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def n_trials(n: int) -> str:
    """`1 trial`, `2 trials`."""
    return "1 trial" if n == 1 else f"{n} trials"
