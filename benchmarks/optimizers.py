"""What each optimizer and each constraint costs a step: 12 layers of 512, 16,384 tokens.

Compiled loops by hand in bfloat16 with the optimizers as they are configured, with CUDA graphs and
without; constraints with AdamW. A step ends where its update ends on the device.
"""

import argparse
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from graphs import SCHEDULE, SIZES, Clock, Size, Windows, make_model, moved

from nerve.cli.config.compose import CONF, build
from nerve.nn.constraint import CONSTRAINTS
from nerve.optim import Part, build_optimizer

OPTIMIZERS = ("adamw", "sgd", "adafactor", "muon", "dion", "soap", "shampoo")


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"optimizer={name}"])
    parts = {
        str(part_name): Part(tuple(part.roles), part.build)
        for part_name, part in build(config.optimizer.parts, key="optimizer.parts").items()
    }
    return build_optimizer(model, parts)


class Trained:
    """A model with its compiled loss, which one optimizer after the other goes on with."""

    def __init__(self, size: Size, device: str, mode: str, constraint: str = "none") -> None:
        torch.compiler.reset()
        self._size, self._device = size, device
        self.model = model = make_model(size, constraint).to(device)

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

        self._losses = torch.compile(losses, mode=mode)

    def milliseconds(self, name: str, n: int, seconds: float) -> list[float]:
        """Of `n` steps, or as many as fit, after the first ten. At least ten are counted, because
        some optimizers compute decompositions at every tenth step."""
        optimizer, clock = optimizer_of(self.model, name), Clock(self._device)
        scheduler = SCHEDULE.scheduler(optimizer, n)
        batches, began = Windows(self._size).train_dataloader(), time.perf_counter()
        for step, batch in enumerate(batches):
            if step >= n + 10 or (step >= 20 and time.perf_counter() - began > seconds):
                break
            inputs, targets = (moved(each, self._device) for each in batch)
            with torch.autocast(self._device, dtype=torch.bfloat16):
                loss = self._losses(inputs, targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            clock.mark(loss)
            if self._device == "cuda" and step % 10 == 9:
                torch.cuda.synchronize()  # so that the time counts what is done, not what is asked
        return clock.milliseconds()[10:]


def told(what: str, steps: list[float], base: float | None) -> float:
    mean = statistics.mean(steps)
    times = "" if base is None else f", {mean / base:.2f} times"
    print(f"{what:42} {mean:8.2f} ms a step (worst {max(steps):.1f}){times}", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="12x512", choices=SIZES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row, if ten steps fit")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    constraints = [each for each in CONSTRAINTS if each != "none"]
    parser.add_argument("--constraints", nargs="*", choices=constraints, default=["spectral_norm"])
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {args.size}", flush=True)
    for mode in ("default", "reduce-overhead"):
        how = "with graphs" if mode == "reduce-overhead" else "no graphs"
        base: float | None = None
        rows = [("none", args.optimizers), *((each, ("adamw",)) for each in args.constraints)]
        for constraint, optimizers in rows:
            trained = None
            for name in optimizers:
                what = f"{how}, {name}" if constraint == "none" else f"{how}, {name}, {constraint}"
                try:
                    if trained is None:
                        trained = Trained(SIZES[args.size], args.device, mode, constraint)
                    steps = trained.milliseconds(name, args.steps, args.seconds)
                    mean = told(what, steps, base)
                    base = mean if base is None else base
                except Exception:
                    print(f"{what}: FAILED\n{traceback.format_exc()[-3000:]}", flush=True)


if __name__ == "__main__":
    main()
