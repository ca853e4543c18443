"""The runs that the folders of sweeps already hold."""

from pathlib import Path

from nerve.cli.console import say
from nerve.cli.directories import TrialDirectory
from nerve.errors import StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.record_file import RECORD_NAME
from nerve.storage.state import RunState


class StoredRuns:
    """The runs stored in the directories of sweeps; each record is read once, on first use."""

    def __init__(self) -> None:
        self._runs: dict[Path, RunDirectory] = {}
        self._chosen: dict[Path, dict[str, RunDirectory]] = {}

    def at(self, path: Path) -> RunDirectory:
        """The unique object for the directory `path`."""
        return self._runs.setdefault(path, TrialDirectory(path))

    def run_of(self, own: RunDirectory, config_id: str) -> RunDirectory:
        """Where the run of `config_id` is, in the sweep that contains the directory `own`.

        That is `own`, named by the id, if a run there is done or active; otherwise the sibling
        directory whose run has the id, which an earlier version may have named differently.

        Raises:
            StoreError: when the record in `own` cannot be read.
        """
        if own.state in (RunState.DONE, RunState.ALIVE):
            return own
        folder = own.path.parent
        if folder not in self._chosen:
            self._chosen[folder] = self._choose(folder)
        return self._chosen[folder].get(config_id, own)

    def _choose(self, folder: Path) -> dict[str, RunDirectory]:
        """The run directly below `folder` to use for each id, after reporting the ones passed over.

        Among several, it is one that is done, or one that is active, or the one that got furthest,
        or among equals the one with the latest heartbeat; directory names do not matter.
        """
        runs: dict[str, list[RunDirectory]] = {}
        for path in sorted(folder.glob(f"[!.]*/{RECORD_NAME}")):
            run = self.at(path.parent)
            try:
                runs.setdefault(run.require_record().config_id, []).append(run)
            except StoreError as error:
                say(f"skipped: {error}")
        chosen: dict[str, RunDirectory] = {}
        for config_id, same in runs.items():
            best, *others = sorted(same, key=_worth, reverse=True)
            chosen[config_id] = best
            if others:
                names = ", ".join(str(other.path) for other in others)
                say(
                    f"{best.path} ({best.state}, step {best.require_record().progress}) is used; "
                    f"ignored, with the same configuration: {names}"
                )
        return chosen


def _worth(run: RunDirectory) -> tuple[bool, bool, int, str]:
    record = run.require_record()
    is_done, is_alive = (run.state == state for state in (RunState.DONE, RunState.ALIVE))
    return is_done, is_alive, record.step, record.heartbeat
