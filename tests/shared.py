"""What all tests share: shapes are checked against annotations, the user's cache is not used, real
runs are provided, and no test hangs."""

import faulthandler
import itertools
import os
import random
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import composing
import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook
from studied import evidence, judged, scorecard  # noqa: F401 - fixtures as well
from support import (  # noqa: F401 - fixtures for all tests
    as_before,
    ask_once_for_provenance,
    make_run,
    never_sync,
    row,
    store,
    tables,
)

CHECKED = ("nerve.spectra", "nerve.nn", "nerve.models", "nerve.optim")
install_import_hook(list(CHECKED), "beartype.beartype")

UNCHECKED = (
    *("tests/training/", "tests/integrations/", "tests/cli/", "tests/report/"),
    *("tests/test_docs.py", "tests/test_notebook", "tests/test_sweeps.py"),
)
"""Tests of what calls these packages, whose calls are not checked: that takes a sixth of the time
that they take, and they call them alike, dozens of times; but for one file of each kind."""
CHECKED_AMONG = (
    *("tests/training/test_module.py", "tests/integrations/test_loop.py"),
    *("tests/cli/test_run.py", "tests/cli/test_mixer.py"),
)

torch.set_num_threads(1)  # tiny tensors; and several tests start processes of their own
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # likewise

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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

composing.remember()
ask_once_for_provenance()
never_sync()


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 activations × 2 normalizations × 2 seeds, trained on the default data for 50 steps."""
    from nerve.cli.run import main  # after the import hook

    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch, as_before():
        patch.chdir(folder)
        for trial in itertools.product(("gelu", "relu"), ("preln", "normfree"), (0, 1)):
            names = ("activation", "normalization", "seed")
            factors = [f"{name}={value}" for name, value in zip(names, trial, strict=True)]
            directory = f"hydra.run.dir=runs/{'-'.join(map(str, trial))}"
            patch.setattr(sys, "argv", ["nerve-run", *SWEEP, *factors, directory])
            main()
    return folder / "runs"


LATE_S = 60.0
"""How long after its time limit a test is ended by force, with its process, which says where its
threads stand. The limit itself is heard by Python alone: not in a wait of torch's, for instance."""

_stderr = pytest.StashKey[int]()
_found = pytest.StashKey[dict[str, object]]()


def pytest_configure(config: pytest.Config) -> None:
    cache = tempfile.TemporaryDirectory(prefix="nerve-cache-")
    config.add_cleanup(cache.cleanup)
    os.environ["NERVE_CACHE"] = cache.name
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Ends a test that hangs, and undoes what a test drew or set for its process, as commands do,
    so that no test depends on those before it."""
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker else item.config.getini("timeout"))
    if not item.config.getoption("usepdb"):
        faulthandler.dump_traceback_later(
            limit + LATE_S, exit=True, file=item.config.stash[_stderr]
        )
    path = item.nodeid.partition("::")[0]
    is_checked = not path.startswith(UNCHECKED) or path in CHECKED_AMONG
    jaxtyping_config.update("jaxtyping_disable", not is_checked)
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    try:
        with as_before():
            return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_found] = state_of_the_process()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Fails a test that leaves the process in another state."""
    yield
    found, left = item.stash[_found], state_of_the_process()
    changed = [
        f"{name}: {found[name]} -> {left[name]}" for name in left if found[name] != left[name]
    ]
    if changed:
        pytest.fail(f"It leaves its process another one. {'; '.join(changed)}", pytrace=False)


def state_of_the_process() -> dict[str, object]:
    """The state that a test could change for all others and that no command sets."""
    return {
        "working directory": os.getcwd(),
        "sys.path": tuple(sys.path),
        "sys.argv": tuple(sys.argv),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision of float32": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "process group": torch.distributed.is_initialized(),
        "signals": tuple(map(signal.getsignal, SIGNALS)),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(without_gpu)
