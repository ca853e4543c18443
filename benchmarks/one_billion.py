"""Ten steps of llama_1b under FSDP on two GPUs, measured twice: time, and peak memory.

`nerve-run model=llama_1b trainer=fsdp` on a small corpus, with a vocabulary of 8,192 in place of
32,000 (1.24 billion parameters); its 24 FFNs have d_ff 5461. It ends once the second measurement is
solved and written, before the checkpoint of the end. Peaks are those of each process: of the
device as torch allocates it, of the host as the system counts it, from the start of training on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from host_memory import host_peak


class Clock(L.Callback):
    """Notes when each step ended and when spectra were there, and ends the process after the last.

    Args:
        folder: where each process leaves what it found.
        began: when the command was given.
    """

    def __init__(self, folder: str, began: float) -> None:
        self._folder, self._began = Path(folder), began
        self._found: dict[str, Any] = {"steps": []}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._found["set up"] = self._now()
        self._found["parameters"] = sum(each.numel() for each in pl_module.parameters())

    def on_sanity_check_start(self, *args: Any) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        self._found["host before, GiB"] = host_peak() / 2**30
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
        self._found["device before, GiB"] = torch.cuda.memory_allocated() / 2**30
        self._found["begins"] = self._now()

    def on_sanity_check_end(self, *args: Any) -> None:
        self._found["first measurement taken"] = self._now()

    def on_train_batch_end(self, *args: Any) -> None:
        self._found["steps"].append(self._now())

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        import torch

        from nerve.training.fit import callbacks_of
        from nerve.training.monitor import FitMonitor

        if trainer.sanity_checking:
            return
        self._found["second measurement taken"] = self._now()
        for callback in callbacks_of(trainer):
            if isinstance(callback, FitMonitor):
                callback._recorder.wait()
                self._found["rows"] = len(callback.latest)
        self._found["all solved"] = self._now()
        self._found["device peak, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        self._found["device reserved, GiB"] = torch.cuda.max_memory_reserved() / 2**30
        self._found["host peak, GiB"] = host_peak() / 2**30
        torch.distributed.barrier()
        (self._folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(self._found))
        torch.distributed.barrier()  # one that ends early has the others killed
        os._exit(0)

    def _now(self) -> float:
        return round(time.time() - self._began, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens, of a step")
    parser.add_argument("--limit", type=float, default=190.0, help="seconds at most")
    parser.add_argument("overrides", nargs="*", help="further values of nerve-run")
    args = parser.parse_args()
    library = Path(os.__file__).parent
    roots = ",".join(str(library / name) for name in ("asyncio", "email", "unittest", "xml"))
    with tempfile.TemporaryDirectory() as folder:
        clock = {"_target_": "one_billion.Clock", "folder": folder, "began": time.time()}
        command = [
            *(sys.executable, "-m", "nerve.cli.run", "model=llama_1b", "trainer=fsdp"),
            f"trainer.devices={args.devices}",
            "trainer.max_steps=10",
            "trainer.enable_progress_bar=false",
            "monitor.every_n_steps=10",
            f"data.corpus.roots=[{roots}]",
            "data.vocab_size=8192",
            "data.val_fraction=0.25",
            f"data.batch_size={args.sequences}",
            "logger=none",
            f"hydra.run.dir={folder}/run",
            *(f"+callbacks.clock.{name}={value}" for name, value in clock.items()),
            *args.overrides,
        ]
        path = os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        )
        log = Path(folder, "log")
        with open(log, "w") as file:
            run = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": path},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                run.wait(args.limit)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)  # with the processes that Lightning started
        found = [json.loads(each.read_text()) for each in sorted(Path(folder).glob("rank*.json"))]
        print(log.read_text()[-3000:])
        if not found:
            sys.exit("it did not come to its end")
    import torch

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.devices} GPUs")
    for rank, each in enumerate(found):
        print(f"process {rank}:")
        for name, value in each.items():
            print(f"  {name}: {value:.2f}" if isinstance(value, float) else f"  {name}: {value}")
    print(f"from the command to the last row: {found[0]['all solved']:.0f} s (aim: 90 s)")


if __name__ == "__main__":
    main()
