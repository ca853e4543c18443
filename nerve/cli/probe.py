"""`nerve-probe`: measures a model that is trained, or its checkpoints."""

import argparse
from collections.abc import Sequence

from nerve.cli.console import fail, say, whole_numbers
from nerve.errors import NerveError
from nerve.progress import shown

DESCRIPTION = """\
Measures the FFNs of trained models, and leaves a run that nerve-report takes.

MODEL is a folder that transformers reads (save_pretrained; a .gguf file), a name on the hub
(name@revision), or the directory of a run of nerve, of which the weights that checkpoint.keep
kept are measured on its own held-out data. Several, or a pattern such as 'ckpt/step_*', are the
checkpoints of one model: one run, whose rows stand at the steps that the names give.

Called again it measures what is not there yet, and goes on with what was cut off.
"""


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
        with shown() as progress:
            probe(source_of(asked), asked, output=output, progress=progress)
    except NerveError as error:
        fail("nerve-probe", str(error))
    except KeyboardInterrupt:
        fail("nerve-probe", "interrupted; the same command goes on after the last checkpoint", 130)


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
    add("--layers", type=whole_numbers, metavar="I,I,…", help="default: all")
    add("--skip-first", type=int, metavar="N", help="positions that begin each sequence, left out")
    either = argparse.BooleanOptionalAction
    add("--sites", type=_names, metavar="S,S,…", help="stream_in, input, output, stream_out")
    add("--groups", type=_names, metavar="G,G,…", help="of position, frequency, halves")
    add("--spectra", action=either, default=True, help="store the eigenvalues (default)")
    add("--memory", metavar="SIZE", help="matrices held at once, such as 8GiB; else more passes")
    add("--steps", type=whole_numbers, metavar="S,S,…", help="of the models; default: as names say")
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


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
