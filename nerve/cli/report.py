"""`nerve-report`: figures, tables and a page about runs."""

import argparse
import shlex
from collections.abc import Sequence

from nerve.cli.console import fail, say, whole_numbers
from nerve.cores import multiply_in_one_thread
from nerve.errors import NerveError
from nerve.progress import shown

DESCRIPTION = """\
Writes a folder about the runs under PATH: index.html (one file that opens without a network),
figures/ as PNG and SVG, tables/ as CSV and Parquet.

One run gets its own figures: overview, PR gain and ΔEEE over depth, spectra, training curves.
Several runs are compared: curves and layers by each factor that varies, loss against metrics,
correlations within and across runs beside null models, at the last step and at equal loss, paired
by seed, and what an early step says of the final loss. Runs that failed, are
unfinished or never learned are named and left out of figures and statistics.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `nerve-report`. Errors that the user can fix are shown as one message."""
    asked = _parser().parse_args(arguments)
    multiply_in_one_thread()
    from nerve.report.write import write_report  # pandas and matplotlib take a second to import

    try:
        with shown() as progress:
            index = write_report(
                asked.paths,
                asked.output,
                window=asked.window,
                steps=asked.steps,
                reference=asked.reference,
                progress=progress,
            )
    except NerveError as error:
        fail("nerve-report", str(error))
    say(f"report: {shlex.quote(str(index))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nerve-report",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", metavar="PATH", nargs="+", help="a run, a sweep, or a folder of outputs"
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="default: report beside the first path"
    )
    parser.add_argument(
        "--window",
        default="after_warmup",
        help="steps of the correlations in titles and summaries: all, after_warmup (default), or "
        "differences (of the changes from one measured step to the next)",
    )
    parser.add_argument(
        "--steps",
        type=whole_numbers,
        default=(),
        metavar="S,S,…",
        help="steps whose spectra are drawn, for one run; default: four from first to last",
    )
    parser.add_argument(
        "--reference",
        metavar="FILE",
        help="a CSV with a paper's values, which figures show as marks: columns metric, value, "
        "label, and step, layer or val_loss",
    )
    return parser


if __name__ == "__main__":
    main()
