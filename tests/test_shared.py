"""Every test starts from the same state: changes to the process are undone or detected."""

import logging
import os
import signal
import sys

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from shared import state_of_the_process
from support import as_before, composed


def test_what_a_command_sets_for_its_process_is_undone():
    logger, handler = logging.getLogger("lightning.pytorch"), logging.NullHandler()
    level = logger.level
    with as_before():
        os.environ["NERVE_CACHE"], os.environ["OF_A_COMMAND"] = "elsewhere", "1"
        logger.setLevel(level + 1)
        logging.root.addHandler(handler)
        sys.excepthook = print
        HydraConfig.instance().set_config(composed("seed=3", with_hydra=True))
        assert HydraConfig.initialized()
    assert os.environ["NERVE_CACHE"] != "elsewhere"
    assert "OF_A_COMMAND" not in os.environ
    assert logger.level == level
    assert handler not in logging.root.handlers
    assert sys.excepthook is not print
    assert not HydraConfig.initialized()


def changes() -> dict[str, tuple]:
    """By name: a function that makes the change, the usual value, and another value."""
    return {
        "working directory": (os.chdir, os.getcwd(), "/"),
        "sys.path": (
            sys.path.__setitem__,
            (slice(None), [*sys.path]),
            (slice(None), [*sys.path, "/"]),
        ),
        "sys.argv": (sys.argv.__setitem__, (0, sys.argv[0]), (0, "nerve-run")),
        "default dtype": (torch.set_default_dtype, torch.float32, torch.float64),
        "default device": (torch.set_default_device, None, "meta"),
        "gradients": (torch.set_grad_enabled, True, False),
        "autocast": (torch.set_autocast_enabled, ("cpu", False), ("cpu", True)),
        "deterministic": (torch.use_deterministic_algorithms, False, True),
        "precision of float32": (torch.set_float32_matmul_precision, "highest", "medium"),
        "threads": (torch.set_num_threads, 1, 2),
        "signals": (
            signal.signal,
            (signal.SIGUSR1, signal.SIG_DFL),
            (signal.SIGUSR1, signal.SIG_IGN),
        ),
    }


@pytest.mark.parametrize("name", changes())
def test_what_a_test_leaves_behind_is_seen(name):
    change, *values = changes()[name]
    usual, other = (value if isinstance(value, tuple) else (value,) for value in values)
    before = state_of_the_process()
    change(*other)
    try:
        after = state_of_the_process()
    finally:
        change(*usual)
    assert {key for key, value in after.items() if value != before[key]} == {name}
    assert state_of_the_process() == before
