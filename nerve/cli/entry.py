"""Where the commands enter: what takes seconds to import, a Ctrl-C may interrupt."""

import os
import sys
from importlib import import_module

STOPPED = 130
"""The exit status that shells expect of a command that Ctrl-C has ended."""


def run() -> None:
    """`nerve-run`."""
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
