"""How many files of nerve a reader meets on the four ways through it.

Counts the files whose functions are entered from the start of a way to its end: a batch of
held-out data to its row on disk, `nerve-run` to `fit`, a sweep of two trials to its table (in the
process that sends them), and a report. Importing a file does not count, calling into it does.

    python benchmarks/walks.py           # the counts
    python benchmarks/walks.py --list    # and the files
"""

import argparse
import contextlib
import inspect
import io
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import pyarrow.parquet as pq

import nerve

PACKAGE = Path(nerve.__file__).parent
TINY = (
    "model.n_layers=2",
    "model.d_model=16",
    "model.n_heads=2",
    "model.seq_len=16",
    "data.batch_size=4",
    "monitor.n_tokens=64",
    "trainer.max_steps=2",
    "trainer.enable_progress_bar=false",
    "threads=1",
)
WALKS = ("row", "fit", "sweep", "report")


class Walk:
    """Notes the files of nerve whose functions are entered while it is on."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._names: dict[str, str] = {}

    def start(self) -> None:
        threading.setprofile(self._enter)
        sys.setprofile(self._enter)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> None:
        """Is called for whatever Python calls, torch and Lightning most of all: what is none of
        nerve must go at once."""
        if event != "call":
            return
        filename = frame.f_code.co_filename
        name = self._names.get(filename)
        if name is None:
            name = self._names[filename] = name_in_nerve(filename)
        if name and name not in self.files and is_entered(frame):
            self.files.append(name)


def name_in_nerve(filename: str) -> str:
    """The path of a Python file within the package; empty for any other."""
    path = Path(filename)
    is_ours = PACKAGE in path.parents and path.suffix == ".py"
    return path.relative_to(PACKAGE).as_posix() if is_ours else ""


def is_entered(frame: FrameType) -> bool:
    """Whether this is a function, and not a part of importing its file or another one of nerve."""
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # the body of a class or of a file
        return False
    caller: FrameType | None = frame
    while caller is not None:
        code = caller.f_code
        if code.co_name == "<module>" and name_in_nerve(code.co_filename):
            return False
        caller = caller.f_back
    return True


class Stop(BaseException):
    """Ends a walk at its end."""


class FromFirstBatch(L.Callback):
    """Starts a walk with the first batch of held-out data, ahead of all other callbacks."""

    walk: Walk

    def on_validation_batch_start(self, *args: Any) -> None:
        if not self.walk.files:
            self.walk.start()


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def command(module: str, *arguments: str) -> None:
    """Calls a command of nerve in this process."""
    main = __import__(f"nerve.cli.{module}", fromlist=["main"]).main
    with replaced(sys, "argv", [f"nerve-{module}", *arguments]):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise


def to_row(walk: Walk) -> None:
    write = pq.write_table

    def written(table: Any, *args: Any, **options: Any) -> None:
        write(table, *args, **options)
        if "pr_post" in table.column_names:
            walk.stop()
            raise Stop

    FromFirstBatch.walk = walk
    build = L.Trainer.__init__

    def trainer(self: L.Trainer, *args: Any, callbacks: list[L.Callback], **options: Any) -> None:
        build(self, *args, callbacks=[FromFirstBatch(), *callbacks], **options)

    with replaced(pq, "write_table", written), replaced(L.Trainer, "__init__", trainer):
        command("run", *TINY)


def to_fit(walk: Walk) -> None:
    def fit(*args: Any, **options: Any) -> None:
        walk.stop()
        raise Stop

    with replaced(L.Trainer, "fit", fit):
        walk.start()
        command("run", *TINY)


def to_table(walk: Walk) -> None:
    walk.start()
    command("run", "-m", "activation=gelu,relu", *TINY)
    walk.stop()


def to_report(walk: Walk) -> None:
    run = [sys.executable, "-m", "nerve.cli.run", "-m", "activation=gelu,relu", *TINY]
    subprocess.run(run, check=True)
    walk.start()
    command("report", "outputs")
    walk.stop()


@contextlib.contextmanager
def silent_processes() -> Iterator[None]:
    """Lets the processes that are started here print nothing."""
    stdout = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="name the files, as they are met")
    parser.add_argument("walk", nargs="?", choices=WALKS, help="this one alone, in this process")
    args = parser.parse_args()
    if args.walk is None:
        for name in WALKS:  # Hydra and torch remember what they were called with
            asked = [sys.executable, __file__, name, *(["--list"] if args.list else [])]
            subprocess.run(asked, check=True)
        return
    walk = Walk()
    walks = dict(zip(WALKS, (to_row, to_fit, to_table, to_report), strict=True))
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        silent_processes(),
        contextlib.suppress(Stop),
    ):
        walks[args.walk](walk)
    print(f"{args.walk}: {len(walk.files)} files")
    if args.list:
        print("\n".join(f"  {name}" for name in walk.files))


if __name__ == "__main__":
    main()
