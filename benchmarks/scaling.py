"""How the cost of a measurement grows: with type, width, samples, depth and cadence, and the way.

The FFNs are real layers on random inputs, measured as in training: products on the device, problems
copied to the host and solved there by threads. `blocked` is the time for which a measurement holds
up the device that would train, `solved` the time until the last spectrum is there; a cadence hides
the solving if as much time of training lies between two measurements.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from host_memory import host_peak
from torch import Tensor, nn

from nerve.measuring.eigenproblem import FFNSpectra
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.recording.solver import Solver
from nerve.recording.workers import spare_workers
from nerve.spectra import eigenvalues, participation_ratio, spectral_entropy

ROWS = 65_536
"""Tokens of a micro-batch."""

MIB = 2**20


class Layer(nn.Module):
    """An FFN whose features are correlated as trained ones are."""

    def __init__(self, d_ff: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        d_model = d_ff // 4
        self.up = nn.Linear(d_model, d_ff, device=device, dtype=dtype)
        self.down = nn.Linear(d_ff, 8, device=device, dtype=dtype)
        with torch.no_grad():
            self.up.weight *= 4 * torch.linspace(0.05, 1, d_model, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Stack:
    """Layers that are measured one after the other on the same inputs."""

    def __init__(
        self,
        n_layers: int,
        d_ff: int,
        dtype: torch.dtype,
        device: str,
        shortcut: bool | str = False,
    ) -> None:
        self.shortcut = shortcut
        self.layers = [Layer(d_ff, device, dtype) for _ in range(n_layers)]
        self.inputs = torch.randn(ROWS, d_ff // 4, device=device, dtype=dtype)
        self.probe = Probe(
            [FFNAdapter(i, "ffn", layer.up, layer.down) for i, layer in enumerate(self.layers)]
        )
        self.probe.install()

    def forward(self) -> None:
        with torch.no_grad():
            for layer in self.layers:
                layer(self.inputs)

    def measure(self, n_batches: int = 1) -> Measurement:
        measurement = Measurement(self.probe, shortcut=self.shortcut)
        for _ in range(n_batches):
            measurement.start()
            self.forward()
            measurement.finish_forward()
            measurement.stop()
        return measurement


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Milliseconds on the device's time line, the host's waiting included."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    yield
    torch.cuda.synchronize()
    into.append(1000 * (time.perf_counter() - began))


def cost(stack: Stack, solver: Solver, n_batches: int, repeats: int = 3) -> tuple[float, float]:
    """Medians: ms for which the device is blocked beyond the forward passes, s until solved."""
    alone: list[float] = []
    blocked: list[float] = []
    solved: list[float] = []
    for repeat in range(repeats + 1):
        with timed(alone):
            for _ in range(n_batches):
                stack.forward()
        began = time.perf_counter()
        with timed(blocked):
            waiting = list(solver.submit({}, stack.measure(n_batches).eigenproblems()))
        assert not waiting or not solver.n_workers
        list(solver.drain())
        solved.append(time.perf_counter() - began)
        if repeat == 0:  # the first one compiles kernels and pins memory
            first = blocked.pop() - alone.pop()
            solved.pop()
    print(f"  first {first:7.0f} ms", end="")
    return statistics.median(blocked) - statistics.median(alone), statistics.median(solved)


def errors(stack: Stack, spectra: FFNSpectra) -> tuple[float, float]:
    """SE (absolute) and PR (relative) against float64 on the same features, the larger of both
    sides."""
    layer, worst = stack.layers[0], [0.0, 0.0]
    with torch.no_grad():
        pre = layer.up(stack.inputs)
        for x, found in ((pre, spectra.pre), (nn.functional.gelu(pre), spectra.post)):
            mean = x.mean(0, dtype=torch.float64)
            scatter = sum((c := rows.double() - mean).T @ c for rows in x.split(8192))
            exact = eigenvalues(scatter / (len(x) - 1)).cpu()
            worst[0] = max(worst[0], abs(float(spectral_entropy(found) - spectral_entropy(exact))))
            ratio = participation_ratio(found) / participation_ratio(exact)
            worst[1] = max(worst[1], abs(float(ratio) - 1))
    return worst[0], worst[1]


def by_type(device: str, solver: Solver) -> None:
    print("type of the features: one layer, pre and post, d_ff 3072, 65,536 tokens")
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        stack = Stack(1, 3072, dtype, device)
        blocked, _ = cost(stack, solver, 1)
        spectra = stack.measure().spectra()[0]
        se, pr = errors(stack, spectra)
        print(
            f"  {dtype!s:15} as {spectra.precision:10} {blocked:7.1f} ms; from float64 on the same "
            f"features: SE {se:.1e} nats, PR {pr:.1e}",
            flush=True,
        )


def by_size(device: str, solver: Solver) -> None:
    print("width, samples and depth: bfloat16, all layers")
    sizes = [(512, 1, 12), (1024, 1, 12), (2048, 1, 12), (3072, 1, 12), (4096, 1, 12)]
    sizes += [(3072, 4, 12), (3072, 16, 12), (3072, 1, 6), (3072, 1, 24), (3072, 1, 48)]
    sizes += [(8192, 1, 6)]
    for d_ff, n_batches, n_layers in sizes:
        stack = Stack(n_layers, d_ff, torch.bfloat16, device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        blocked, solved = cost(stack, solver, n_batches, repeats=1)
        device_mib = (torch.cuda.max_memory_allocated() - before) / MIB
        host_gib = host_peak() / 2**30
        print(
            f"  d_ff {d_ff:5} N {n_batches * ROWS:9,} layers {n_layers:3}: blocked {blocked:7.1f} "
            f"ms, solved after {solved:6.2f} s; device +{device_mib:5.0f} MiB (with a layer's "
            f"features), host's peak so far {host_gib:.1f} GiB",
            flush=True,
        )


def by_way(device: str, solver: Solver) -> None:
    """Core-seconds are those of all threads of this process, from the first product to the last
    spectrum."""
    print("pre itself, and projected from the FFN's input: 12 layers, bfloat16, 65,536 tokens")
    for d_ff in (2048, 3072):
        for shortcut in (False, "projected"):
            stack = Stack(12, d_ff, torch.bfloat16, device, shortcut)
            blocked, solved = cost(stack, solver, 1)
            began = time.process_time()
            list(solver.submit({}, stack.measure().eigenproblems()))
            list(solver.drain())
            print(
                f"  d_ff {d_ff:5} {shortcut or 'pre itself':10}: blocked {blocked:7.1f} ms, solved "
                f"after {solved:6.2f} s, {time.process_time() - began:6.1f} core-seconds",
                flush=True,
            )


def by_cadence(device: str, solver: Solver) -> None:
    """Steps of matrix products in place of training."""
    print("cadence: 12 layers, d_ff 3072, 65,536 tokens, beside steps of matrix products")
    stack = Stack(12, 3072, torch.bfloat16, device)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def step() -> None:
        for _ in range(60):
            torch.mm(a, a)

    for every, n_steps in ((0, 40), (1, 12), (5, 30), (10, 40), (25, 75), (100, 200)):
        total: list[float] = []
        with timed(total):
            for i in range(n_steps):
                step()
                torch.cuda.synchronize()
                if every and i % every == 0:
                    list(solver.submit({}, stack.measure().eigenproblems()))
        list(solver.drain())
        took = total[0] / n_steps
        if not every:
            alone = took
            print(f"  a step alone {alone:.1f} ms")
        else:
            print(
                f"  every {every:3} steps: {took:7.1f} ms per step ({took / alone - 1:+.1%})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="a CUDA device")
    parts = {"type": by_type, "size": by_size, "way": by_way, "cadence": by_cadence}
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    args = parser.parse_args()
    device = args.device
    solver = Solver(torch.device(device), spare_workers(torch.device(device)))
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {solver.n_workers} threads solve")
    for name in args.only:
        parts[name](device, solver)
    solver.close()


if __name__ == "__main__":
    main()
