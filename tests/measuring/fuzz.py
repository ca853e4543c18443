"""Models drawn at random, described rightly or wrongly: the right numbers, or a refusal.

    PYTHONPATH=.:tests python tests/measuring/fuzz.py 10000

Every model keeps the features of each FFN as it runs, sorted into sequences; from these the
expected values are taken. A case is drawn from its number alone.
"""

import contextlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from by_hand import values
from torch import Tensor, nn
from torch.nn import functional

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.sites import Site

ACTS = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leaky": functional.leaky_relu,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "form": ("plain", "gated", "halves", "turns", "convolution"),
    "act": tuple(ACTS),
    "order": ("sequences", "sequences, flat", "positions", "positions, flat"),
    "alter": ("nothing",) * 4 + ("hook", "global hook", "new weight", "own forward", "overwritten"),
    "repeat": ("once",) * 3 + ("looped", "skipped"),
    "padding": ("none", "mask", "mask", "mask", "additive"),
    "mask": ("of the batch", "of the batch", "one", "by name"),
    "description": ("right",) * 9 + ("act", "next layer", "found", "found", "wrong side", "n_runs"),
    "input": ("position", "keyword"),
    "sizes": ("equal", "different"),
}


@dataclass(frozen=True)
class Case:
    """What was drawn: a value of each of `CHOICES`, and what else is random."""

    seed: int
    drawn: dict[str, str]

    @classmethod
    def of(cls, seed: int) -> "Case":
        rng = random.Random(seed)
        return cls(seed, {name: rng.choice(values) for name, values in CHOICES.items()})

    def __getattr__(self, name: str) -> str:
        return self.drawn[name]


class FFN(nn.Module):
    def __init__(self, case: Case, d: int, d_ff: int) -> None:
        super().__init__()
        self.case, self.act = case, Act(ACTS[case.act])
        both = 2 * d_ff if case.form in ("halves", "turns") else d_ff
        make = (lambda i, o: nn.Conv1d(i, o, 1)) if case.form == "convolution" else nn.Linear
        self.up, self.down = make(d, both), make(d_ff, d)
        self.other = make(d, d_ff) if case.form == "gated" else None
        self.kept: list[tuple[Tensor, Tensor]] = []

    def call(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(input=x) if self.case.input == "keyword" else module(x)

    def forward(self, x: Tensor) -> Tensor:
        given = self.call(self.up, x)
        pre = given
        if self.case.form == "halves":
            pre, other = given.chunk(2, -1)
        elif self.case.form == "turns":
            pre, other = given[..., ::2], given[..., 1::2]
        elif self.other is not None:
            other = self.call(self.other, x)
        before = pre.detach().clone()
        post = self.act(pre)
        if self.case.alter == "overwritten":
            pre.mul_(0.5)
        if self.case.form not in ("plain", "convolution"):
            post = post * other
        self.kept.append((before, post.detach().clone()))
        return self.call(self.down, post)


class Act(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Model(nn.Module):
    """Embeds tokens, mixes the positions of each sequence, and runs its FFNs."""

    def __init__(self, case: Case, rng: random.Random) -> None:
        super().__init__()
        self.case, self.d, self.d_ff = case, rng.randint(3, 6), rng.randint(7, 12)
        self.embedding = nn.Embedding(20, self.d)
        self.blocks = nn.ModuleList(FFN(case, self.d, self.d_ff) for _ in range(2))
        self.n_runs = [{"once": 1, "looped": rng.randint(2, 3), "skipped": 0}[case.repeat], 1]
        self.n_forwards = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.n_forwards += 1
        if self.case.alter == "new weight" and self.n_forwards > 2:
            self.blocks[1].up.weight.mul_(1.5)
        x = self.embedding(input_ids)
        x = x + torch.linspace(0, 1, x.shape[1])[:, None]
        if self.case.order.startswith("positions"):
            x = x.transpose(0, 1)
        if self.case.form == "convolution":
            x = x.movedim(-1, 1)  # batch, channels, positions
        elif self.case.order.endswith("flat"):
            x = x.flatten(0, 1)
        for block, n_runs in zip(self.blocks, self.n_runs, strict=True):
            for _ in range(n_runs):
                x = x + block(x)
        return x

    def sequences(self, features: Tensor, shape: tuple[int, int]) -> Tensor:
        """`[n_sequences, n_positions, width]`, undoing what `forward` did."""
        if self.case.form == "convolution":
            features = features.movedim(1, -1)
        if self.case.order.startswith("sequences"):
            return features.reshape(*shape, features.shape[-1])
        return features.reshape(*shape[::-1], features.shape[-1]).transpose(0, 1)


def batches_of(case: Case, rng: random.Random) -> list[dict[str, Tensor]]:
    n = rng.randint(3, 6)
    t = n if case.sizes == "equal" else n + rng.randint(1, 3)
    given = []
    for _ in range(2):
        ids = torch.randint(0, 20, (n, t))
        batch = {"input_ids": ids}
        if case.padding != "none":
            lengths = torch.randint(1, t + 1, (n, 1))
            lengths[0] = t
            batch["attention_mask"] = (torch.arange(t) < lengths).long()
        if case.padding == "additive":
            batch["attention_mask"] = (1 - batch["attention_mask"]) * -1e9
        given.append(batch)
    return given


def describe(case: Case, model: Model) -> list[FFNAdapter] | None:
    if case.description == "found":
        return None
    ffns = []
    for i, block in enumerate(model.blocks):
        part = {"halves": slice(0, model.d_ff), "turns": slice(0, None, 2)}
        pre: Any = Site(block.up, "output", part.get(case.form, slice(None)))
        post = block.down
        n_runs = None if i == 0 and case.repeat != "once" else 1
        if case.description == "act":
            pre = block.act
        elif case.description == "next layer" and i == 0:
            post = model.blocks[1].down
        elif case.description == "wrong side" and block.other is not None:
            pre = block.other
        elif case.description == "n_runs" and i == 0:
            n_runs = 1 + (model.n_runs[0] == 1)
        ffns.append(FFNAdapter(i, "ffn" if i else "first", pre, post, n_runs=n_runs))
    return ffns


@contextlib.contextmanager
def altered(case: Case, model: Model) -> Iterator[None]:
    """What changes the output of the last FFN's projection behind its weight's back."""
    up = model.blocks[1].up
    if case.alter == "hook":
        up.register_forward_hook(lambda module, args, output: output.square() - 1)
    elif case.alter == "own forward":
        inner = up.forward
        up.forward = lambda input: inner(input).square() - 1
    handle = None
    if case.alter == "global hook":
        hook = lambda module, args, output: output.square() - 1 if module is up else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def outcome(seed: int) -> tuple[Case, str]:
    """Runs a case: `compared`, or `refused: …`.

    Raises:
        AssertionError: for a number that is not the expected one.
    """
    case = Case.of(seed)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        model = Model(case, rng).double().eval()
        batches = batches_of(case, rng)
    mask = None
    if case.mask != "of the batch":
        is_named = case.mask == "by name" and case.description != "found"
        name = (lambda m: {"first": m, "ffn": m}) if is_named else (lambda m: m)
        mask = lambda batch: name(batch.get("attention_mask"))  # noqa: E731
    with altered(case, model):
        try:
            rows = nerve.measure(model, batches, ffns=describe(case, model), mask=mask)
        except MeasurementError as error:
            return case, f"refused: {str(error)[:60]}"
        assert case.description != "n_runs", f"{case}: another number of runs than promised"
        check(case, model, batches, rows)
    return case, "compared"


def check(case: Case, model: Model, batches: list[dict[str, Tensor]], rows: Any) -> None:
    """Every row against what the model kept: of the last passes, those that were measured."""
    shape = tuple(batches[0]["input_ids"].shape)
    rows = rows.set_index("layer")
    found = [i for i, n_runs in enumerate(model.n_runs) if n_runs]
    if case.description == "found":
        assert len(rows) == len(found), case
    for layer, row in enumerate(rows.to_dict("records")):
        index = found[layer] if case.description == "found" else layer
        block, n_runs = model.blocks[index], model.n_runs[index]
        whole = [p for p in block.kept if p[0].numel() == shape[0] * shape[1] * model.d_ff]
        kept = whole[len(whole) - 2 * n_runs :]  # what came before looked at the model alone
        if not kept:
            assert (row["n_samples"], row["status"]) == (0, "too_few_samples"), case
            continue
        for place, side in enumerate(("pre", "post")):
            parts = []
            for number, pair in enumerate(kept):
                features = model.sequences(pair[place], shape)
                padding = batches[number // n_runs].get("attention_mask")
                parts.append(features.flatten(0, 1) if padding is None else features[padding == 1])
            n, pr, variance = values(torch.cat(parts))
            got = (row["n_samples"], row[f"pr_{side}"], row[f"variance_{side}"])
            np.testing.assert_allclose(got, (n, pr, variance), rtol=1e-6, err_msg=f"{case} {side}")


def main(n_cases: int) -> None:
    ends, of_kind, compared = Counter[str](), Counter[str](), Counter[str]()
    for seed in range(n_cases):
        case, end = outcome(seed)
        ends[end] += 1
        for name, value in case.drawn.items():
            of_kind[f"{name}={value}"] += 1
            compared[f"{name}={value}"] += end == "compared"
    print(*(f"{n:6d}  {end}" for end, n in ends.most_common()), sep="\n")
    print(
        *(f"{n:6d} of which {compared[kind]} compared  {kind}" for kind, n in of_kind.items()),
        sep="\n",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
