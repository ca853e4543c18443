"""How tests are run: in which process and order, and in parallel; shared.py has what they share."""

import gc
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from nerve import cores

# Until all tests are collected: what is imported and collected stays, and to look through it again
# and again takes a quarter of that time.
gc.disable()

# A shell ignores them in what it runs in the background, and what is ignored stays so.
for _signum, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _handler)

# What one process compiles, above all the tests with their assertions, all others read: those that
# run tests, those that these start, and the next session. Else each takes ten seconds for it.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Before NumPy is imported: several processes run tests, and threads that wait for the others of a
# product keep a core busy. Torch gets one thread in shared.py.
cores.multiply_in_one_thread()

TOGETHER = {
    "tests/slurm/": "cluster",
    "tests/test_docs.py": "trained_runs",
    "tests/test_notebook.py": "trained_runs",
    "tests/report/test_page.py": "trained_runs",
    "tests/data/test_text.py": "trained_runs",  # the tokens of the default data
    "tests/cli/survival/": "processes",
    "tests/cli/test_logging.py": "processes",
    "tests/cli/sweep/test_sweeper.py": "processes",
    "tests/measuring/": "measuring",
    "tests/test_scorecard": "study",
}
"""Tests that share what takes long to make, and its name; these come first."""

LONG = (
    *("tests/test_install.py", "tests/cli/", "tests/test_s", "tests/training/"),
    *("tests/integrations/", "tests/report/", "tests/test_m"),
)
"""What comes next: the shorter the last ones, the less a process waits for the others."""


class ByFile(LoadScopeScheduling):
    """Each file's tests run in one process, and so do those of `TOGETHER`."""

    def remove_node(self, node: WorkerController) -> str | None:
        """Like the original, but the test that ended its process is not run again by the next
        one."""
        others, self.assigned_work = self.assigned_work, {node: self.assigned_work[node]}
        crashed: str | None = super().remove_node(node)
        others.pop(node)
        self.assigned_work = others
        for scope, unit in [*self.workqueue.items()]:
            unit.update({crashed: True} if crashed in unit else {})
            if all(unit.values()):
                del self.workqueue[scope]
        for other in others:
            self._reschedule(other)
        return crashed

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return next((name for start, name in TOGETHER.items() if path.startswith(start)), path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False  # as collected, not by the number of tests
    return ByFile(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than the number of cores, because the cluster's tests mostly wait."""
    return cores.allowed() + 1


def pytest_configure(config: pytest.Config) -> None:
    if _only_hands_out(config):  # to which torch and Lightning would be six seconds for nothing
        gc.enable()
    else:
        config.pluginmanager.import_plugin("shared")


def _only_hands_out(config: pytest.Config) -> bool:
    """Whether the tests run in other processes than this one."""
    is_worker = hasattr(config, "workerinput")
    return config.getoption("dist") != "no" and not config.option.collectonly and not is_worker


def pytest_collection_finish() -> None:
    gc.freeze()  # else it is looked through while tests run and at their end, a tenth of all time
    gc.set_threshold(100_000)  # at 700, the default, tests take 2 to 6% more
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, bool, bool]:
    """Excludes what a file's tests have imported or kept from garbage collection; otherwise each
    collection takes longer than the one before, up to a second."""
    ended = yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return ended


def _turn(item: pytest.Item) -> int:
    starts = (*TOGETHER, *LONG)
    return next((i for i, start in enumerate(starts) if item.nodeid.startswith(start)), len(starts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
