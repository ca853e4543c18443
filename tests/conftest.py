"""What all tests share: shapes are checked as annotated, no user's cache is touched, real runs."""

import gc
import itertools
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook
from support import make_run, row, store, tables  # noqa: F401 - fixtures for all tests
from xdist.scheduler import LoadScopeScheduling

from nerve import cores

SWEEP = (
    "threads=1",
    "trainer.max_steps=50",
    "trainer.enable_progress_bar=false",
    "monitor.every_n_steps=10",
    "model.n_layers=2",
    "model.d_model=32",
    "model.n_heads=2",
    "model.seq_len=32",
    "data.batch_size=32",
    "optimizer.lr=2e-2",
)

CHECKED = ("nerve.spectra", "nerve.nn", "nerve.models", "nerve.optim")
install_import_hook(list(CHECKED), "beartype.beartype")

torch.set_num_threads(1)  # tiny tensors; and several tests start processes of their own


# A shell ignores them in what it runs in the background, and what is ignored stays so.
for _signum, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, _handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["NERVE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 activations × 2 normalizations × 2 seeds, trained on the default data for 50 steps."""
    from nerve.cli.run import main  # after the import hook

    folder = tmp_path_factory.mktemp("sweep")
    handlers, level = logging.root.handlers.copy(), logging.root.level
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for trial in itertools.product(("gelu", "relu"), ("preln", "normfree"), (0, 1)):
            names = ("activation", "normalization", "seed")
            factors = [f"{name}={value}" for name, value in zip(names, trial, strict=True)]
            directory = f"hydra.run.dir=runs/{'-'.join(map(str, trial))}"
            patch.setattr(sys, "argv", ["nerve-run", *SWEEP, *factors, directory])
            main()
    # Hydra's handlers write to what was stdout meanwhile.
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    return folder / "runs"


TOGETHER = {
    "tests/slurm/": "cluster",
    "tests/test_docs.py": "trained_runs",
    "tests/test_notebook.py": "trained_runs",
    "tests/report/test_page.py": "trained_runs",
    "tests/data/test_text.py": "trained_runs",  # the tokens of the default data
    "tests/cli/survival/": "processes",
    "tests/cli/test_logging.py": "processes",
    "tests/measuring/": "processes",
    "tests/cli/sweep/test_sweeper.py": "processes",
}
"""Tests that share what takes long to make, and its name; these come first."""

LONG = ("tests/test_install.py", "tests/cli/", "tests/test_s")
"""What comes next: the shorter the last ones, the less a process waits for the others."""


class ByFile(LoadScopeScheduling):
    """Each file's tests run in one process, and so do those of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return next((name for start, name in TOGETHER.items() if path.startswith(start)), path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    config.option.loadscopereorder = False  # as collected, not by the number of tests
    return ByFile(config, log)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores, as that of the cluster's tests mostly waits."""
    return cores.allowed() + 1


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: to look through it takes a tenth of all time


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def _turn(item: pytest.Item) -> int:
    starts = (*TOGETHER, *LONG)
    return next((i for i, start in enumerate(starts) if item.nodeid.startswith(start)), len(starts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_turn)
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
