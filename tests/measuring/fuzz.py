"""Randomly drawn models, described correctly or not: the correct numbers, or an error.

    export PYTHONPATH=.:tests
    python tests/measuring/fuzz.py 10000              # cases, and how often each kind occurred
    python tests/measuring/fuzz.py 10000 --from 5000  # the second half of them
    python tests/measuring/fuzz.py 1000 --checks      # with each check removed in turn

`--jobs 16` uses that many processes. Every model keeps the features of each FFN as it runs, sorted
into sequences; the expected values are computed from them. A case depends only on its number.
"""

import argparse
import contextlib
import logging
import math
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from by_hand import values
from torch import Tensor, nn
from torch.nn import functional

import nerve
from nerve.errors import MeasurementError
from nerve.measuring import (
    accumulator,
    ffns,
    masks,
    measure,
    probe,
    recorded,
    samples,
    streams,
    trace,
)
from nerve.measuring.ffns import FFNAdapter, Site

ACTS = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leaky": functional.leaky_relu,
}
EXPERTS = ("experts in a list", "experts in a parameter")
CHOICES: dict[str, tuple[str, ...]] = {
    "form": ("plain", "gated", "halves", "turns", "convolution", *EXPERTS),
    "act": tuple(ACTS),
    "order": ("sequences", "sequences, flat", "positions", "positions, flat"),
    "alter": (
        *("nothing",) * 2,
        *("hook", "global hook", "new weight", "own forward", "own type", "overwritten"),
    ),
    "repeat": ("once",) * 3 + ("looped", "skipped"),
    "padding": ("none",) * 3 + ("mask",) * 10 + ("additive",),
    "mask": ("of the batch", "of the batch", "one", "by name"),
    "description": (
        *("right",) * 8,
        *("found",) * 4,
        *("act", "next layer", "wrong side", "n_runs", "wrong axis", "fewer after"),
    ),
    "input": ("position", "keyword"),
    "sizes": ("equal", "different"),
    "streams": ("one", "one", "one", "two"),
    "skip": ("0", "0", "1"),
}

SILENT: dict[str, Callable[["Case"], bool]] = {
    "1 x 1 convolution": lambda c: c.form == "convolution",
    "batch second, as long as it is wide": lambda c: (
        c.sizes == "equal" and c.order.startswith("positions") and c.form != "convolution"
    ),
    "two streams of equal length": lambda c: c.streams == "two" and c.sizes == "equal",
    "additive mask": lambda c: c.padding == "additive",
    "pre is the activation": lambda c: c.description == "act",
    "post of the next layer": lambda c: c.description == "next layer",
    "pre is the other side": lambda c: c.description == "wrong side",
    "another number of runs": lambda c: c.description == "n_runs",
    "another axis": lambda c: c.description == "wrong axis",
    "fewer samples after": lambda c: c.description == "fewer after",
    "a hook": lambda c: c.alter == "hook",
    "a global hook": lambda c: c.alter == "global hook",
    "a weight that changes": lambda c: c.alter == "new weight",
    "a forward of its own": lambda c: c.alter == "own forward",
    "a weight of another type": lambda c: c.alter == "own type",
    "pre is overwritten": lambda c: c.alter == "overwritten",
    "halves of one projection": lambda c: c.form in ("halves", "turns"),
    "experts in a list": lambda c: c.form == EXPERTS[0],
    "experts in a parameter": lambda c: c.form == EXPERTS[1],
    "looped": lambda c: c.repeat == "looped",
    "skipped": lambda c: c.repeat == "skipped",
    "tokens flattened beside a mask": lambda c: c.order.endswith("flat") and c.padding == "mask",
    "input by keyword": lambda c: c.input == "keyword",
}
"""The kinds that were once measured wrongly, or could be, without an error."""

REFUSED = ("act", "next layer", "wrong side", "n_runs", "wrong axis", "fewer after")
"""Wrong descriptions, which must never be measured."""


@dataclass(frozen=True)
class Case:
    """A drawn case: a value for each of `CHOICES`, and whatever else is random."""

    seed: int
    drawn: dict[str, str]

    @classmethod
    def of(cls, seed: int) -> "Case":
        rng = random.Random(seed)
        drawn = {name: rng.choice(values) for name, values in CHOICES.items()}
        if drawn["description"] == "wrong side":
            drawn |= {"form": "gated", "alter": "nothing"}
        elif drawn["description"] in REFUSED:
            drawn |= {"form": rng.choice(("plain", "gated")), "alter": "nothing"}
        if drawn["description"] in ("wrong axis", "fewer after"):
            drawn |= {"order": "sequences", "padding": "none", "streams": "one", "skip": "0"}
        if drawn["description"] == "fewer after":
            drawn["mask"] = "of the batch"
        if drawn["description"] == "next layer":
            drawn |= {"streams": "one", "repeat": "once"}
        if drawn["alter"] == "own type" and drawn["form"] == "convolution":
            drawn["form"] = "plain"
        if drawn["form"] in EXPERTS:
            drawn |= {"description": "found", "repeat": "once"}
            if drawn["alter"] != "new weight":
                drawn["alter"] = "nothing"
        return cls(seed, drawn)

    def __getattr__(self, name: str) -> str:
        return self.drawn[name]


class OwnType(Tensor):
    """A weight that a linear layer does not use as it is, like quantized weights."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        given = super().__torch_function__(func, types, args, kwargs or {})
        if func is functional.linear:
            given = given.as_subclass(Tensor)
            return given.square() - 1
        return given


class FFN(nn.Module):
    """An FFN in the form of the case. It keeps pre and post of each run."""

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
        if self.case.description == "fewer after":
            return x + self.call(self.down, post[:, :1])
        return self.call(self.down, post)


class Act(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Mixture(nn.Module):
    """Three experts, one of which receives each token; what is kept has one number per sample."""

    def __init__(self, case: Case, d: int, d_ff: int) -> None:
        super().__init__()
        self.case, self.d, self.act = case, d, ACTS[case.act]
        self.router = nn.Linear(d, 3)
        self.kept: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], [], []]
        if case.form == EXPERTS[0]:
            self.experts = nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(d, d_ff), "down": nn.Linear(d_ff, d)})
                for _ in range(3)
            )
        else:
            self.w_up = nn.Parameter(torch.randn(3, d_ff, d) / math.sqrt(d))
            self.w_down = nn.Parameter(torch.randn(3, d, d_ff) / math.sqrt(d_ff))

    @property
    def up(self) -> Tensor:
        """The projection whose weight changes."""
        return self.experts[0]["up"].weight if self.case.form == EXPERTS[0] else self.w_up

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.d)
        chosen = self.router(tokens).argmax(-1)
        given = torch.zeros_like(tokens)
        for e in range(3):
            rows = torch.where(chosen == e)[0]
            if self.case.form == EXPERTS[0]:
                up, down = self.experts[e]["up"], self.experts[e]["down"]
            else:
                up, down = partial(self._up, e), partial(self._down, e)
            if len(rows):
                pre = up(tokens[rows])
                post = self.act(pre)
                self.kept[e].append((pre.detach().clone(), post.detach().clone(), rows))
                given[rows] = down(post)
            else:
                nothing = torch.zeros(0, 1)
                self.kept[e].append((nothing, nothing, rows))
        return given.reshape(x.shape)

    def _up(self, e: int, given: Tensor) -> Tensor:
        return functional.linear(given, self.w_up[e])

    def _down(self, e: int, given: Tensor) -> Tensor:
        return given @ self.w_down[e].T


class Stack(nn.Module):
    """Two layers over one stream of tokens."""

    def __init__(self, case: Case, d: int, d_ff: int, n_loops: int) -> None:
        super().__init__()
        self.case, self.d, self.d_ff = case, d, d_ff
        make = Mixture if case.form in EXPERTS else FFN
        self.embedding = nn.Embedding(20, d)
        self.blocks = nn.ModuleList(make(case, d, d_ff) for _ in range(2))
        self.n_runs = [{"once": 1, "looped": n_loops, "skipped": 0}[case.repeat], 1]

    def forward(self, ids: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        x = self.embedding(ids) + shift
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
        """`[n_sequences, n_positions, width]`, undoing the arrangement by `forward`."""
        if self.case.form == "convolution":
            features = features.movedim(1, -1)
        if self.case.order.startswith("sequences"):
            return features.reshape(*shape, features.shape[-1])
        return features.reshape(*shape[::-1], features.shape[-1]).transpose(0, 1)


class Model(nn.Module):
    """Embeds tokens and runs its FFNs; with two streams, the second one receives the mean of the
    first."""

    def __init__(self, case: Case, rng: random.Random) -> None:
        super().__init__()
        self.case, self.d, self.d_ff = case, rng.randint(3, 6), rng.randint(7, 12)
        n_loops = rng.randint(2, 3)
        self.encoder = Stack(case, self.d, self.d_ff, n_loops)
        self.decoder = Stack(case, self.d, self.d_ff, n_loops) if case.streams == "two" else None
        self.n_forwards = 0

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        self.n_forwards += 1
        if self.case.alter == "new weight" and self.n_forwards > 2:
            up = self.encoder.blocks[1].up
            (up if isinstance(up, Tensor) else up.weight).mul_(1.5)
        x = self.encoder(input_ids)
        if self.decoder is None:
            return x
        return self.decoder(decoder_input_ids, x.mean())

    @property
    def stacks(self) -> dict[str, Stack]:
        """The stacks, by the prefix of their tokens."""
        both = {"": self.encoder} if self.decoder is None else {}
        return both or {"": self.encoder, "decoder_": self.decoder}


def batches_of(case: Case, rng: random.Random) -> list[dict[str, Tensor]]:
    n = rng.randint(3, 6)
    lengths = {"": n if case.sizes == "equal" else n + rng.randint(1, 3)}
    if case.streams == "two":
        lengths["decoder_"] = lengths[""] + (0 if case.sizes == "equal" else 2)
    given = []
    for _ in range(2):
        batch = {}
        for prefix, t in lengths.items():
            batch[f"{prefix}input_ids"] = torch.randint(0, 20, (n, t))
            if case.padding != "none":
                until = torch.randint(1, t + 1, (n, 1))
                until[0] = t
                mask = (torch.arange(t) < until).long()
                batch[f"{prefix}attention_mask"] = (
                    (1 - mask) * -1e9 if case.padding == "additive" else mask
                )
        given.append(batch)
    return given


def describe(case: Case, model: Model) -> list[FFNAdapter] | None:
    if case.description == "found":
        return None
    described = []
    for prefix, stack in model.stacks.items():
        for i, block in enumerate(stack.blocks):
            part = {"halves": slice(0, model.d_ff), "turns": slice(0, None, 2)}
            pre: Any = Site(block.up, "output", part.get(case.form, slice(None)))
            post: Any = block.down
            n_runs = None if i == 0 and case.repeat != "once" else 1
            if case.description == "act":
                pre = block.act
            elif case.description == "next layer" and i == 0:
                post = stack.blocks[1].down
            elif case.description == "wrong side":
                pre = block.other
            elif case.description == "n_runs" and i == 0:
                n_runs = 1 + (stack.n_runs[0] == 1)
            elif case.description == "wrong axis":
                pre, post = Site(block.up, "output", axis=1), Site(block.down, "input", axis=1)
            name = f"{prefix}ffn" if i else f"{prefix}first"
            described.append(FFNAdapter(i, name, pre, post, n_runs=n_runs))
    return described


@contextlib.contextmanager
def altered(case: Case, model: Model) -> Iterator[None]:
    """Something that changes the output of the last FFN's projection without changing its
    weight."""
    up = model.encoder.blocks[1].up
    if case.alter == "hook":
        up.register_forward_hook(lambda module, args, output: output.square() - 1)
    elif case.alter == "own forward":
        inner = up.forward
        up.forward = lambda input: inner(input).square() - 1
    elif case.alter == "own type" and isinstance(up, nn.Linear):
        up.weight = nn.Parameter(up.weight.detach().as_subclass(OwnType), requires_grad=False)
    handle = None
    if case.alter == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: output.square() - 1 if module is up else None
        )
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def mask_of(case: Case) -> Callable[[Any], Any] | None:
    """The value of `mask=`: None, one mask for all FFNs, or one for each name."""
    if case.mask == "of the batch":
        return None
    if case.mask == "one" or case.description == "found":
        return lambda batch: batch.get("attention_mask")

    def by_name(batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
        prefixes = ("", "decoder_") if case.streams == "two" else ("",)
        return {f"{p}{n}": batch.get(f"{p}attention_mask") for p in prefixes for n in NAMES}

    return by_name


NAMES = ("first", "ffn")


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
    # Batches that show no streams, whose order would tell as well.
    is_hidden = case.description == "fewer after"
    said = Said()
    with altered(case, model), said:
        try:
            rows = nerve.measure(
                model,
                [(batch,) for batch in batches] if is_hidden else batches,
                forward=(lambda model, batch: model(**batch[0])) if is_hidden else None,
                ffns=describe(case, model),
                mask=mask_of(case),
                skip_first=int(case.skip),
            )
        except MeasurementError as error:
            return case, f"refused: {str(error)[:60]}"
        assert case.description not in REFUSED, f"{case}: measured as it was described"
        is_whole = check(case, model, batches, rows, named=said.lines)
    return case, "compared" if is_whole else "some compared, the others named"


class Said(logging.Handler):
    """Collects the log messages about FFNs that are not measured."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "Said":
        logging.getLogger(measure.__name__).addHandler(self)
        return self

    def __exit__(self, *error: Any) -> None:
        logging.getLogger(measure.__name__).removeHandler(self)


def check(
    case: Case, model: Model, batches: list[dict[str, Tensor]], rows: Any, named: list[str]
) -> bool:
    """Compares every row with what the model kept of the measured passes. Every FFN must have a
    row, unless a message named its mixture."""
    known = rows.set_index(["layer", "ffn"]).to_dict("index")
    expected = {}
    for prefix, stack in model.stacks.items():
        ids = [batch[f"{prefix}input_ids"] for batch in batches]
        counts = [_counts(case, batch, prefix) for batch in batches]
        ran = [i for i, n_runs in enumerate(stack.n_runs) if n_runs]
        for i, block in enumerate(stack.blocks):
            if isinstance(block, Mixture):
                stem = "encoder_" if case.streams == "two" and not prefix else prefix
                of_all = [_of_expert(stack, block.kept[e], ids, counts) for e in range(3)]
                for e, sides in enumerate(of_all):
                    expected[i, f"{stem}expert_{e}"] = sides
                together = [[s[k] for s in of_all if len(s[k])] for k in (0, 1)]
                expected[i, f"{stem}experts"] = [torch.cat(parts) for parts in together]
                continue
            if case.description == "found":
                if i not in ran:
                    continue
                stem = "encoder_" if case.streams == "two" and not prefix else prefix
                place = (ran.index(i), f"{stem}ffn")
            else:
                place = (i, f"{prefix}ffn" if i else f"{prefix}first")
            expected[place] = _of_ffn(stack, block.kept, ids, counts, stack.n_runs[i])
    lacking = set(expected) - set(known)
    assert set(known) <= set(expected), f"{case}: {sorted(known)}"
    assert not lacking or (len(lacking) == 4 * len(named) and case.form == EXPERTS[1]), case
    for place, sides in expected.items():
        if place in lacking:
            continue
        row = known[place]
        if len(sides[0]) < 2:
            assert (row["n_samples"], row["status"]) == (len(sides[0]), "too_few_samples"), case
            continue
        for side, features in zip(("pre", "post"), sides, strict=True):
            with np.errstate(invalid="ignore"):
                n, pr, variance = values(features)
            got = (row["n_samples"], row[f"pr_{side}"], row[f"variance_{side}"])
            if variance < 1e-24:  # equal samples: what there is of it is rounding
                assert row["n_samples"] == n, case
                continue
            where = f"{case} {place} {side}"
            np.testing.assert_allclose(got, (n, pr, variance), rtol=1e-6, err_msg=where)
    return not lacking


def _counts(case: Case, batch: dict[str, Tensor], prefix: str) -> Tensor:
    """The tokens of a stream that count, bool `[n_sequences, n_positions]`."""
    # One mask that is given for all FFNs is the first stream's.
    of = (
        ""
        if case.mask == "one" or (case.mask == "by name" and case.description == "found")
        else prefix
    )
    ids, mask = batch[f"{prefix}input_ids"], batch.get(f"{of}attention_mask")
    counts = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask == 1
    counts = counts.clone()
    counts[:, : int(case.skip)] = False
    return counts


def _of_ffn(
    stack: Stack, kept: list[Any], ids: list[Tensor], counts: list[Tensor], n_runs: int
) -> list[Tensor]:
    size = ids[0].numel() * stack.d_ff
    whole = [pair for pair in kept if pair[0].numel() == size]
    last = whole[len(whole) - 2 * n_runs :]  # what came before looked at the model alone
    sides = []
    for place in (0, 1):
        parts = [torch.zeros(0, stack.d_ff)]
        for number, pair in enumerate(last):
            features = stack.sequences(pair[place], tuple(ids[0].shape))
            parts.append(features[counts[number // n_runs]])
        sides.append(torch.cat(parts))
    return sides


def _of_expert(
    stack: Stack, kept: list[Any], ids: list[Tensor], counts: list[Tensor]
) -> list[Tensor]:
    sides = []
    for place in (0, 1):
        parts = [torch.zeros(0, stack.d_ff)]
        for (*pair, rows), of_batch in zip(kept[-2:], counts, strict=True):
            if len(rows):
                n = of_batch.numel()
                number = stack.sequences(torch.arange(n)[:, None], tuple(ids[0].shape))[..., 0]
                counted = torch.zeros(n, dtype=torch.bool)
                counted[number[of_batch]] = True
                parts.append(pair[place][counted[rows]])
        sides.append(torch.cat(parts))
    return sides


# Each check taken away


def without() -> dict[str, list[Any]]:
    """The patches that remove a check, by its name."""
    put = mock.patch.object

    def finish(self: probe.Probe) -> None:
        self._following.finish_forward()
        self._forget()

    def yes(*how: Any, **more: Any) -> Tensor:
        return torch.tensor(True)

    def any_bool(mask: Tensor) -> Tensor:
        return mask if mask.dtype == torch.bool else mask != 0

    def all_count(rows: Tensor, *how: Any) -> Tensor:
        return torch.ones(rows.shape[:-1], dtype=torch.bool)

    return {
        "post follows from pre": [put(recorded, "way_from", lambda *how: "directly")],
        "pre is no factor": [put(recorded, "slope_of_factor", lambda *how: None)],
        "pre has a weight": [put(ffns, "_has_weight", lambda module: True)],
        "masks are 0 and 1": [put(module, "as_bool", any_bool) for module in (masks, streams)],
        "W x + b is what the layer gave": [put(accumulator, "gives", yes)],
        "the weight is that of the first batch": [
            put(accumulator.Accumulator, "_compare_weight", lambda *how: None)
        ],
        "the number of runs": [put(probe.Probe, "finish_forward", finish)],
        "the axis is as wide as declared": [
            put(probe, "of_site", lambda tensor, site, where: site.features(tensor))
        ],
        "post of the same samples": [put(probe, "check_same_samples", lambda *how: None)],
        "the order of tokens": [put(trace, "_traced", lambda *how: trace.Traced("", True))],
        "the tokens of an expert": [put(samples, "counted_of", all_count)],
        "pre unchanged": [put(torch, "isclose", yes)],
    }


def fails(seed: int, name: str | None) -> bool:
    """Whether a case ends in a forbidden way when a check is removed."""
    with contextlib.ExitStack() as stack:
        for patch in without()[name] if name else ():
            stack.enter_context(patch)
        try:
            outcome(seed)
        except Exception:
            torch.set_grad_enabled(True)
            return True
    return False


def ending(seed: int) -> tuple[list[str], str]:
    """The kinds of a case, and how it ended."""
    torch.set_num_threads(1)
    case, end = outcome(seed)
    kinds = [f"silent: {name}" for name, holds in SILENT.items() if holds(case)]
    return [*kinds, *(f"{name}={value}" for name, value in case.drawn.items())], end


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("n", type=int)
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--checks", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    seeds = range(asked.first, asked.n)
    with multiprocessing.Pool(asked.jobs) as pool:
        if asked.checks:
            for name in (None, *without()):
                wrong = sum(pool.imap(partial(fails, name=name), seeds, chunksize=20))
                print(f"{wrong:5d} of {len(seeds)} fail without: {name}", flush=True)
            return
        ends, of_kind, compared = Counter[str](), Counter[str](), Counter[str]()
        for kinds, end in pool.imap(ending, seeds, chunksize=20):
            ends[end] += 1
            of_kind.update(kinds)
            compared.update(kinds if end == "compared" else ())
    print(*(f"{n:6d}  {end}" for end, n in ends.most_common()), sep="\n")
    for kind in sorted(of_kind):
        print(f"{of_kind[kind]:6d} of which {compared[kind]} compared  {kind}")


if __name__ == "__main__":
    main()
