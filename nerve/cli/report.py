"""`nerve-report`: figures, tables and a page about runs."""

if __name__ == "__main__":  # python -m, as the command: Ctrl-C may come during the imports below
    from nerve.cli import entry

    entry.report()
    raise SystemExit

import argparse
import shlex
from collections.abc import Sequence

from nerve.cli.console import fail, say, whole_numbers
from nerve.config import require_path
from nerve.cores import multiply_in_one_thread
from nerve.errors import NerveError
from nerve.progress import shown

DESCRIPTION = """\
Writes a report on the runs under PATH: index.html (a single file that opens without a network),
figures/ as PNG and SVG, and tables/ as CSV and Parquet.

One run gets its own figures: overview, PR gain and ΔEEE over depth, spectra, training curves.
Several runs are compared: curves and per-layer values for each factor that varies, loss against
metrics, correlations within and across runs with null models, at the last step and at equal loss,
paired by seed, and how well an early step predicts the final loss. Runs that failed, are unfinished
or never learned are listed, and left out of figures and statistics.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `nerve-report`. Errors that the user can fix are shown as one message."""
    args = _parser().parse_args(arguments)
    multiply_in_one_thread()
    # pandas and matplotlib take a second to import
    from nerve.report.write import INDEX, folder_of, write_report

    try:
        for path in args.paths:
            require_path("PATH", path)
        if args.output is not None:
            require_path("--output", args.output)
        replaces = (folder_of(args.paths, args.output) / INDEX).exists()
        with shown() as progress:
            index = write_report(
                args.paths,
                args.output,
                window=args.window,
                steps=args.steps,
                reference=args.reference,
                progress=progress,
            )
    except NerveError as error:
        fail("nerve-report", str(error))
    say(f"report: {shlex.quote(str(index))}" + (" (replaces an earlier one)" if replaces else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nerve-report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="a run, a sweep, or any folder of runs"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="default: report, next to the first path; an earlier report there is replaced",
    )
    parser.add_argument(
        "--window",
        default="after_warmup",
        help="steps used for the correlations in titles and summaries: all, after_warmup "
        "(default), or differences (between consecutive measured steps)",
    )
    parser.add_argument(
        "--steps",
        type=whole_numbers,
        default=(),
        metavar="S,S,…",
        help="steps whose spectra are plotted, for a single run; default: four from first to last",
    )
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help="a CSV with a paper's values, shown as markers in the figures: columns metric, value, "
        "label, and step, layer or val_loss",
    )
    return parser
