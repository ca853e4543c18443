"""`nerve-probe`: measures a trained model, or its checkpoints."""

if __name__ == "__main__":  # python -m, as the command: Ctrl-C may come during the imports below
    from nerve.cli import entry

    entry.probe()
    raise SystemExit

import argparse
from collections.abc import Sequence

from nerve.cli.console import fail, say, whole_numbers
from nerve.config import require_path
from nerve.errors import NerveError, with_notes
from nerve.progress import shown, unseen

DESCRIPTION = """\
Measures the FFNs of trained models and creates a run that nerve-report reads.

MODEL is a folder that transformers reads (save_pretrained; a .gguf file), a name on the Hugging
Face hub (name@revision), or the directory of a nerve run, whose weights stored by checkpoint.keep
are measured on its own held-out data. Several of them, or a pattern such as 'ckpt/step_*', are the
checkpoints of one model: they form one run, whose steps come from the names.

Repeat the command to measure only what is missing, also after an interruption. If some checkpoints
cannot be loaded, the others are measured, and the command fails.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `nerve-probe`. Errors that the user can fix are shown as one message."""
    given = vars(_parser().parse_args(arguments))
    given["models"] = tuple(given["models"])
    if given["text"] is not None:
        given["text"] = tuple(given["text"])
    lists, output = given.pop("list"), given.pop("output")
    # torch and pandas take seconds to import
    from nerve.cli.probing.run import listing, probe, source_of
    from nerve.cli.probing.source import ProbeArguments

    try:
        if output is not None:
            require_path("--output", output)
        args = ProbeArguments(**given)
        if lists:
            say(listing(source_of(args), unseen))
            return
        with shown() as progress:
            probe(source_of(args), args, output=output, progress=progress)
    except NerveError as error:
        fail("nerve-probe", with_notes(error))
    except KeyboardInterrupt:
        fail(
            "nerve-probe",
            "interrupted; repeat the command to continue after the last checkpoint",
            130,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nerve-probe",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="a model, or the checkpoints of one")
    add("-o", "--output", metavar="FOLDER", help="default: outputs/probe/<model>-<id>")
    add("--list", action="store_true", help="list the FFNs, measure nothing")
    add("--select", metavar="GLOB", help="select FFNs by their path in the model, such as '*.mlp'")
    add("--layers", type=whole_numbers, metavar="I,I,…", help="layers to measure; default: all")
    add(
        "--skip-first", type=int, metavar="N", help="exclude the first N positions of each sequence"
    )
    either = argparse.BooleanOptionalAction
    add(
        "--sites",
        type=_names,
        metavar="S,S,…",
        help="further sites: stream_in, input, output, stream_out",
    )
    add(
        "--groups",
        type=_names,
        metavar="G,G,…",
        help="groups of tokens: position, frequency, halves",
    )
    add("--spectra", action=either, default=True, help="store the eigenvalues (default)")
    add(
        "--memory",
        metavar="SIZE",
        help="limit for the matrices, such as 8GiB; beyond it, more passes",
    )
    add(
        "--steps",
        type=whole_numbers,
        metavar="S,S,…",
        help="steps of the models; default: from their names",
    )
    add("--device", help="default: a GPU if there is one")
    add("--dtype", help="float32, bfloat16, float16 or float64; default: that of the weights")
    text = parser.add_argument_group("text (not for nerve runs)").add_argument
    text(
        "--text",
        metavar="FILE",
        nargs="+",
        help="files or patterns: plain text, .jsonl, .json, .parquet, optionally compressed; "
        "default: the source code of Python's standard library",
    )
    text("--tokenizer", metavar="FOLDER", help="default: in the folder of the weights")
    text("--n-tokens", type=int, metavar="N", help="default: 8 per unit of the widest FFN")
    text("--seq-len", type=int, metavar="N", help="default: the model's maximum, up to 1024")
    text("--batch-size", type=int, metavar="N", help="sequences per batch; default: 4")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
