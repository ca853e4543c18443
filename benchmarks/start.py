"""How long a start takes: to the first step of the default run, and over a corpus of gigabytes.

    python benchmarks/start.py                   # the first step, then 3 GB of text
    python benchmarks/start.py --skip corpus

**First step**: `nerve-run` of the default run, token cache and files warm, from the start of its
process until the first training step begins and ends, in fresh processes: once as installed and
once without scipy and transformers, which nerve does not need and Lightning's torchmetrics imports
where it finds them. At most 6 s on two idle cores.

**Corpus**: text files of so many gigabytes, in a temporary folder. A first start reads them, trains
a tokenizer and tokenizes; that is timed over a part of the files (`--first` megabytes), and said as
a rate. For the second start the tokens of that part are repeated until they are as many as all of
the files have, so that nothing is smaller than it would be. It must take at most 5 s and 1 GB, and
may not read the files; what it reads is counted by the kernel. Beside it, if `datasets` is
installed: the same tokens in its memory-mapped Arrow files, rows of one sequence each, from
`load_from_disk` to the first shuffled batch of a DataLoader. It neither looks whether files of text
changed nor verifies what it reads.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from host_memory import host_peak

OPTIONAL = ("scipy", "transformers")
FILE_BYTES = 2_000_000
SEQ_LEN = 512
DEFAULT = ("trainer.max_steps=2", "trainer.enable_progress_bar=false")


def child(mode: str, *arguments: str, **environment: str) -> dict[str, float]:
    """What a fresh process measures of itself; its wall time counts from here. As those of an
    installed nerve, its modules are not compiled each time."""
    values = {**os.environ, **environment, "START": str(time.time())}
    values.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, __file__, "--child", mode, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=values, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def used() -> dict[str, float]:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "s": time.time() - float(os.environ["START"]),
        "cpu_s": own.ru_utime + own.ru_stime,
        "peak_bytes": host_peak(),
    }


def hide(packages: tuple[str, ...]) -> None:
    """Has this process find none of the packages, as in an environment without them."""
    from importlib import metadata

    version = metadata.version

    def without(name: str) -> str:
        if name in packages:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    class Hidden:
        @staticmethod
        def find_spec(name: str, *_: Any) -> None:
            if name.partition(".")[0] in packages:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    metadata.version = without
    sys.meta_path.insert(0, Hidden)


def first_step() -> None:
    """`nerve-run`, which says when all is imported, and when its first step begins and ends."""
    hide(tuple(os.environ["HIDE"].split()))
    seen: dict[str, float] = {}

    def note(what: str) -> None:
        seen.setdefault(what, used()["s"])
        seen.setdefault(f"{what}_cpu", used()["cpu_s"])

    import nerve.cli.run
    from nerve.cores import spin_briefly, uncollected

    spin_briefly()  # as nerve-run does before it imports torch
    with uncollected():  # likewise
        import nerve.cli.experiment.run

    note("imported")
    from lightning.pytorch import Callback, Trainer

    class Noted(Callback):
        def on_fit_start(self, *_: Any) -> None:
            note("built")

        def on_train_batch_start(self, *_: Any) -> None:
            note("begins")

        def on_train_batch_end(self, *_: Any) -> None:
            note("ends")

    fit = Trainer.fit

    def noted_fit(trainer: Trainer, *arguments: Any, **named: Any) -> None:
        trainer.callbacks.append(Noted())
        fit(trainer, *arguments, **named)

    Trainer.fit = noted_fit
    sys.argv = ["nerve-run", *DEFAULT]
    nerve.cli.run.main()
    print(json.dumps(seen))


def first_steps(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, hidden in (
            ("as installed", ""),
            ("without scipy, transformers", " ".join(OPTIONAL)),
        ):
            for number in range(repeats + 1):
                found = child("first_step", HIDE=hidden)
                if number:  # the first makes the token cache and fills that of files
                    print(
                        f"first step, {name}: begins after {found['begins']:.2f} s, ends after "
                        f"{found['ends']:.2f} (imports {found['imported']:.2f}, until it is built "
                        f"{found['built']:.2f}; CPU {found['imported_cpu']:.2f}, "
                        f"{found['built_cpu']:.2f}, {found['begins_cpu']:.2f}, "
                        f"{found['ends_cpu']:.2f}); at most 6 s",
                        flush=True,
                    )
        os.chdir("/")


def write_files(folder: Path, n_bytes: int) -> None:
    """Text files of `FILE_BYTES`, no two alike."""
    import sysconfig

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in sources)
    folder.mkdir()
    for number in range(n_bytes // FILE_BYTES):
        start = number * 7919 % (len(text) - FILE_BYTES)
        head = f"file {number}\n".encode()
        piece = text[start : start + FILE_BYTES - len(head)].decode(errors="replace").encode()
        (folder / f"{number:05d}.txt").write_bytes(head + piece[: FILE_BYTES - len(head)])


def module_of(pattern: str, cache: Path, monitor_tokens: int = 8192) -> Any:
    from nerve.data.files import text_files
    from nerve.data.text import TextDataModule

    return TextDataModule(
        text_files(pattern),
        seq_len=SEQ_LEN,
        batch_size=16,
        n_train_batches=1000,
        n_heldout_tokens=monitor_tokens,
        seed=0,
        cache_dir=cache,
    )


def start(pattern: str, cache: str) -> None:
    """Everything that a start does with its data, up to the first batch."""
    from nerve.cores import uncollected

    with uncollected():  # as nerve-run does
        import nerve.data.text  # noqa: F401
    data = module_of(pattern, Path(cache))
    imported, before = used(), _read_bytes()
    data.setup()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    print(json.dumps(since(imported, before)))


def save_arrow(cache_entry: str, folder: str) -> None:
    """Writes the tokens of a cache entry as `datasets` keeps them."""
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, disable_progress_bars

    from nerve.data.cache_entry import open_entry

    disable_progress_bars()

    entry = open_entry(Path(cache_entry))
    assert entry is not None
    tokens = entry.train.all()
    n = len(tokens) // SEQ_LEN
    offsets = pa.array(np.arange(n + 1, dtype=np.int32) * SEQ_LEN)
    rows = pa.ListArray.from_arrays(offsets, pa.array(tokens[: n * SEQ_LEN]))
    Dataset(pa.table({"input_ids": rows})).save_to_disk(folder)
    print("{}")


def start_arrow(folder: str) -> None:
    """What `start` does, over the files that `save_arrow` wrote."""
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    imported, before = used(), _read_bytes()
    rows = load_from_disk(folder).with_format("torch")
    batch = next(iter(DataLoader(rows, batch_size=16, shuffle=True)))
    assert batch["input_ids"].shape == (16, SEQ_LEN)
    print(json.dumps(since(imported, before)))


def since(imported: dict[str, float], read: int) -> dict[str, float]:
    """What this process used, and what of it since it had imported everything."""
    found = used()
    return found | {
        "data_s": found["s"] - imported["s"],
        "import_s": imported["s"],
        "read": _read_bytes() - read,
        "grown_bytes": found["peak_bytes"] - imported["peak_bytes"],
    }


def _read_bytes() -> int:
    """What this process has read with system calls, from the disk or the cache of files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def repeated_entry(small: Path, large: Path, times: int) -> None:
    """The entry of a corpus `times` as large as that of `small`."""
    import zlib

    import numpy as np

    from nerve.data import cache_entry
    from nerve.data.token_file import Checksums

    large.mkdir()
    shutil.copy(small / "tokenizer.json", large)
    entry = cache_entry.open_entry(small)
    assert entry is not None
    for split, tokens in (("train", entry.train.all()), ("val", entry.val.all())):
        checksums = Checksums()
        with (large / f"{split}.tokens").open("wb") as file:
            for _ in range(times):
                file.write(tokens.tobytes())
                checksums.update(tokens.tobytes())
        (large / f"{split}.crc32").write_bytes(checksums.of_blocks().tobytes())
    np.save(large / "counts.npy", entry.train_counts * times, allow_pickle=False)
    meta = replace(
        entry.meta,
        n_train_tokens=entry.meta.n_train_tokens * times,
        n_val_tokens=entry.meta.n_val_tokens * times,
    )
    files = {
        name: zlib.crc32((large / name).read_bytes())
        for name in ("tokenizer.json", "counts.npy", "train.crc32", "val.crc32")
    }
    content = {"meta": asdict(meta), "files": files}
    sealed = content | {"checksum": cache_entry.checksum_of(content)}
    (large / "meta.json").write_text(json.dumps(sealed))


def corpora(n_bytes: int, n_first: int) -> None:
    from nerve.data import cache
    from nerve.data.tokenizer import TokenizerSpec

    with tempfile.TemporaryDirectory() as name:
        folder, root = Path(name) / "files", Path(name) / "cache"
        began = time.time()
        write_files(folder, n_bytes)
        print(f"{n_bytes / 1e9:.1f} GB of text written in {time.time() - began:.0f} s", flush=True)
        time.sleep(max(0.0, 2.5 - (time.time() - began)))  # files of this instant are not trusted
        n_files = n_first // FILE_BYTES
        part = Path(name) / "part"
        part.mkdir()
        for path in sorted(folder.iterdir())[:n_files]:
            (part / path.name).symlink_to(path)
        found = child("start", f"{part}/*.txt", str(root))
        print(
            f"first start over {n_first / 1e6:.0f} MB: {found['data_s']:.1f} s, "
            f"{n_first / 1e6 / found['data_s']:.2f} MB/s, peak {found['peak_bytes'] / 1e9:.2f} GB "
            f"({found['grown_bytes'] / 1e6:.0f} MB more than after imports)",
            flush=True,
        )
        data = module_of(f"{folder}/*.txt", root)
        began = time.time()
        key = cache._key(data.corpus, root, TokenizerSpec(), 0.05)
        print(f"reading {n_bytes / 1e9:.1f} GB once: {time.time() - began:.1f} s", flush=True)
        (small,) = root.glob("tokens-*")
        repeated_entry(small, root / f"tokens-{key}", n_bytes // n_first)
        what = f"over {n_bytes / 1e9:.1f} GB"
        second_starts(f"second start {what} (at most 5 s, 1 GB)", "start", f"{folder}/*.txt", root)
        if find_spec("datasets") is None:
            print("datasets is not installed")
            return
        arrow = Path(name) / "arrow"
        child("save_arrow", str(root / f"tokens-{key}"), str(arrow))
        second_starts(f"datasets {what}", "start_arrow", arrow)


def second_starts(what: str, mode: str, *arguments: str | Path) -> None:
    """Prints what three starts take."""
    for _ in range(3):
        found = child(mode, *map(str, arguments))
        print(
            f"{what}: {found['s']:.2f} s (imports {found['import_s']:.2f}, data "
            f"{found['data_s']:.2f}, CPU {found['cpu_s']:.2f}), peak "
            f"{found['peak_bytes'] / 1e9:.2f} GB ({found['grown_bytes'] / 1e6:.0f} MB more than "
            f"after imports), read {found['read'] / 1e6:.2f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--first", type=float, default=20.0, help="megabytes of the first start")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip", choices=("first-step", "corpus"), nargs="*", default=[])
    args = parser.parse_args()
    if "first-step" not in args.skip:
        first_steps(args.repeats)
    if "corpus" not in args.skip:
        corpora(int(args.gigabytes * 1e9), int(args.first * 1e6))


CHILDREN: dict[str, Callable[..., None]] = {
    "first_step": first_step,
    "start": start,
    "save_arrow": save_arrow,
    "start_arrow": start_arrow,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        CHILDREN[sys.argv[2]](*sys.argv[3:])
    else:
        main()
