"""Where the commands enter: what takes seconds to import, a Ctrl-C may interrupt."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version

STOPPED = 130
"""The exit status that shells expect of a command that Ctrl-C has ended."""


@contextmanager
def uncollected() -> Iterator[None]:
    """For the first import of torch and Lightning: without Python's search for garbage, again and
    again in all that is there to stay, it takes a fifth less. Later searches leave that out, too.
    """
    if not gc.isenabled() or "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run() -> None:
    """`nerve-run`, whose `--version` is Hydra's; nerve's stands before it."""
    if "--version" in sys.argv[1:]:
        print(f"nerve {version('nerve')}", flush=True)
    _enter("run")


def probe() -> None:
    """`nerve-probe`."""
    _enter("probe")


def report() -> None:
    """`nerve-report`."""
    _enter("report")


def status() -> None:
    """`nerve-status`."""
    _enter("status")


def _enter(name: str) -> None:
    try:
        import_module(f"nerve.cli.{name}").main()
    except KeyboardInterrupt:
        print(f"nerve-{name}: stopped", file=sys.stderr, flush=True)
        # What is half imported may have threads, or complain at its end.
        os._exit(STOPPED)
