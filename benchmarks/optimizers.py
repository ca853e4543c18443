"""What each optimizer and each constraint costs a step: 12 layers of 512, 16,384 tokens.

Compiled loops by hand in bfloat16 with the optimizers as they are configured, with CUDA graphs and
without; constraints with AdamW. A step ends where its update ends on the device. With `--peers`,
the same optimizers of other packages come after those that nerve has configured, with the same
settings: their time is what is compared, they need not compute the same.
"""

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_optimizer
import torch
from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).parent))
from gpt_loops import SCHEDULE, SIZES, Clock, Size, Trained, Windows, make_model

from nerve.cli.config.compose import CONF, build
from nerve.nn.constraint import CONSTRAINTS
from nerve.optim import Part, build_optimizer

OPTIMIZERS = ("adamw", "sgd", "adafactor", "muon", "dion", "soap", "shampoo")

Groups = list[dict[str, Any]]
Build = Callable[[Groups], torch.optim.Optimizer]


def whole(build: Build) -> dict[str, Part]:
    """One optimizer for every parameter."""
    return {"main": Part(("hidden", "embedding", "head", "vector"), build)}


def of_matrices(build: Build) -> dict[str, Part]:
    """One for hidden matrices, and AdamW for the rest, as nerve has it."""
    rest = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95), fused=True, weight_decay=0.1)
    return {
        "matrices": Part(("hidden",), build),
        "rest": Part(("embedding", "head", "vector"), rest),
    }


def muon_of_pytorch_optimizer(groups: Groups) -> torch.optim.Optimizer:
    of_muon = [group | {"use_muon": True} for group in groups]
    return pytorch_optimizer.Muon(of_muon, lr=0.02, momentum=0.95, weight_decay=0.01)


def adafactor_of_transformers(groups: Groups) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=0.1, weight_decay=0.003, relative_step=False, scale_parameter=True)


ADAFACTOR = {"lr": 0.1, "weight_decay": 0.003}
MUON = {"lr": 0.02, "weight_decay": 0.01}
PEERS: dict[str, dict[str, dict[str, Part]]] = {
    "adafactor": {
        "torch's": whole(partial(torch.optim.Adafactor, **ADAFACTOR)),
        "torch's, foreach": whole(partial(torch.optim.Adafactor, **ADAFACTOR, foreach=True)),
        "transformers'": whole(adafactor_of_transformers),
        "pytorch_optimizer's": whole(
            partial(
                pytorch_optimizer.AdaFactor,
                **ADAFACTOR,
                betas=(None, 0.999),  # without momentum, as the others
                relative_step=False,
            )
        ),
    },
    "muon": {
        "torch's": of_matrices(partial(torch.optim.Muon, **MUON)),
        "pytorch_optimizer's": of_matrices(muon_of_pytorch_optimizer),
    },
    "shampoo": {
        "pytorch_optimizer's scalable": of_matrices(
            partial(
                pytorch_optimizer.ScalableShampoo,
                lr=0.05,
                start_preconditioning_step=1,
                preconditioning_compute_steps=10,
            )
        ),
    },
}
"""Of an optimizer that nerve has configured, the same one elsewhere."""


def configured(name: str) -> dict[str, Part]:
    """The parts of an optimizer of nerve."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"optimizer={name}"])
    return {
        str(part_name): Part(tuple(part.roles), part.build)
        for part_name, part in build(config.optimizer.parts, key="optimizer.parts").items()
    }


def with_peers(names: list[str], has_peers: bool) -> dict[str, Mapping[str, Part]]:
    """Row to parts of its optimizer, each followed by its peers."""
    rows: dict[str, Mapping[str, Part]] = {}
    for name in names:
        rows[name] = configured(name)
        if has_peers:
            rows |= {f"{name}, {whose}": parts for whose, parts in PEERS.get(name, {}).items()}
    return rows


def milliseconds(
    trained: Trained, size: Size, device: str, parts: Mapping[str, Part], n: int, seconds: float
) -> list[float]:
    """Of `n` steps, or as many as fit, after the first ten, with a fresh optimizer. At least ten
    are counted, because some optimizers compute decompositions at every tenth step."""
    optimizer, clock = build_optimizer(trained.model, parts), Clock(device)
    scheduler = SCHEDULE.scheduler(optimizer, n)
    batches, began = Windows(size).train_dataloader(), time.perf_counter()
    for step, batch in enumerate(batches):
        if step >= n + 10 or (step >= 20 and time.perf_counter() - began > seconds):
            break
        loss = trained.step(optimizer, batch)
        scheduler.step()
        clock.mark(loss)
        if device == "cuda" and step % 10 == 9:
            torch.cuda.synchronize()  # so that the time counts what is done, not what is asked
    return clock.milliseconds()[10:]


def print_result(what: str, steps: list[float], base: float | None) -> float:
    mean = statistics.mean(steps)
    times = "" if base is None else f", {mean / base:.2f} times"
    print(f"{what:52} {mean:8.2f} ms a step (worst {max(steps):.1f}){times}", flush=True)
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", default="12x512", choices=SIZES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row, if ten steps fit")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--peers", action="store_true", help="also those of other packages")
    constraints = [each for each in CONSTRAINTS if each != "none"]
    parser.add_argument("--constraints", nargs="*", choices=constraints, default=["spectral_norm"])
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, {args.size}", flush=True)
    size, rows = SIZES[args.size], with_peers(args.optimizers, args.peers)
    for mode in ("default", "reduce-overhead"):
        how = "with graphs" if mode == "reduce-overhead" else "no graphs"
        base: float | None = None
        adamw = {"adamw": configured("adamw")}
        for constraint in ("none", *args.constraints):
            torch.compiler.reset()
            trained = Trained(make_model(size, constraint), args.device, mode)
            initial = deepcopy(trained.model.state_dict())
            for name, parts in (rows if constraint == "none" else adamw).items():
                what = f"{how}, {name}" if constraint == "none" else f"{how}, {name}, {constraint}"
                try:
                    trained.model.load_state_dict(initial)
                    steps = milliseconds(
                        trained, size, args.device, parts, args.steps, args.seconds
                    )
                    mean = print_result(what, steps, base)
                    base = mean if base is None else base
                except Exception:
                    print(f"{what}: FAILED\n{traceback.format_exc()[-3000:]}", flush=True)


if __name__ == "__main__":
    main()
