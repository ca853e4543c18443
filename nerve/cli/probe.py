"""`nerve-probe`: measures a model that is trained, or its checkpoints."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from nerve.cli.console import say
from nerve.errors import NerveError

DESCRIPTION = """\
Measures the FFNs of trained models, and leaves a run that nerve-report takes.

MODEL is a folder that transformers reads (save_pretrained; a .gguf file), a name on the hub
(name@revision), or the directory of a run of nerve, of which the weights that checkpoint.keep
kept are measured on its own held-out data. Several, or a pattern such as 'ckpt/step_*', are the
checkpoints of one model: one run, whose rows stand at the steps that the names give.

Called again it measures what is not there yet, and goes on with what was cut off.
"""

SAY_EVERY_S = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `nerve-probe`. Errors that the user can fix are shown as one message."""
    given = vars(_parser().parse_args(arguments))
    given["models"] = tuple(given["models"])
    if given["text"] is not None:
        given["text"] = tuple(given["text"])
    lists, output = given.pop("list"), given.pop("output")
    # torch and pandas take seconds to import
    from nerve.cli.probing.run import opened, probe, source_of
    from nerve.cli.probing.source import Asked

    try:
        asked = Asked(**given)
        if lists:
            source = source_of(asked)
            say(str(opened(source, source.checkpoints[0]).ffns))
            return
        with _progress() as progress:
            probe(source_of(asked), spectra=asked.spectra, output=output, progress=progress)
    except NerveError as error:
        _fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nerve-probe",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="a model, or the checkpoints of one")
    add("-o", "--output", metavar="FOLDER", help="default: outputs/probe/<model>-<id>")
    add("--list", action="store_true", help="show the FFNs that are found, and measure nothing")
    add("--select", metavar="GLOB", help="FFNs by their path in the model, such as '*.mlp'")
    add("--layers", type=_numbers, metavar="I,I,…", help="default: all")
    add("--skip-first", type=int, metavar="N", help="positions that begin each sequence, left out")
    either = argparse.BooleanOptionalAction
    add("--spectra", action=either, default=True, help="store the eigenvalues (default)")
    add("--steps", type=_numbers, metavar="S,S,…", help="of the models; default: as names say")
    add("--device", help="default: a GPU where there is one")
    add("--dtype", help="float32, bfloat16, float16 or float64; default: that of the weights")
    text = parser.add_argument_group("text (not for runs of nerve)").add_argument
    text(
        "--text",
        metavar="FILE",
        nargs="+",
        help="files or patterns: plain text, .jsonl, .json, .parquet, also compressed; "
        "default: the source of Python's standard library",
    )
    text("--tokenizer", metavar="FOLDER", help="default: beside the weights")
    text("--n-tokens", type=int, metavar="N", help="default: 8 for each unit of the widest FFN")
    text("--seq-len", type=int, metavar="N", help="default: what the model takes, up to 1024")
    text("--batch-size", type=int, metavar="N", help="sequences of a batch; default: 4")
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"whole numbers with commas between, such as 0,100,400; got {text!r}"
        ) from error


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A bar on a terminal; elsewhere a line from time to time."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}", markup=False)
    console = Console(stderr=True)
    with Progress(*columns, description, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def _lines() -> Callable[..., None]:
    """A line for each model, and of one that takes long more of them."""
    said = [0.0, -1.0]

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done != said[1] or now - said[0] > SAY_EVERY_S:
            said[:] = now, done
            print(f"{done}/{total} {what}", file=sys.stderr, flush=True)

    return progress


def _fail(message: str) -> NoReturn:
    print(f"nerve-probe: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
