"""The entry points of the commands, which also handle Ctrl-C during imports that take seconds."""

import os
import sys
from importlib import import_module

import nerve
from nerve.errors import NerveError

STOPPED, UNREAD = 130, 141
"""The exit statuses that shells expect of a command ended by Ctrl-C, or by a closed pipe."""


def run() -> None:
    """`nerve-run`, whose `--version` is Hydra's; nerve's version is printed before it."""
    if "--version" in sys.argv[1:]:
        print(f"nerve {nerve.__version__}", flush=True)
    _enter("nerve-run", "nerve.cli.run")


def trial() -> None:
    """A trial of a sweep, in its own process."""
    _enter("nerve-run", "nerve.cli.sweep.worker")


def probe() -> None:
    """`nerve-probe`."""
    _enter("nerve-probe", "nerve.cli.probe")


def report() -> None:
    """`nerve-report`."""
    _enter("nerve-report", "nerve.cli.report")


def status() -> None:
    """`nerve-status`."""
    _enter("nerve-status", "nerve.cli.status")


def _enter(command: str, module: str) -> None:
    _open_standard_streams()
    try:
        import_module(module).main()
    except NerveError as error:  # of an import: commands report their own
        print(f"{command}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{command}: stopped", file=sys.stderr, flush=True)
        # What is half imported may have threads, or fail as it ends.
        os._exit(STOPPED)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # what is still to be written fails, too
        print(f"{command}: stopped, as nothing reads its output any more", file=sys.stderr)
        sys.exit(UNREAD)


def _open_standard_streams() -> None:
    """Opens the null device for each standard stream that is closed (`>&-`). Otherwise the next
    file that is opened would take its place, and receive whatever a library prints."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115 - until the end
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
