"""What is probed, independent of where it comes from: checkpoints, one at a time, and their
batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from nerve.config import require_count, require_path, require_several
from nerve.measuring.found import FoundFFNs
from nerve.measuring.groups import NOT_GROUPED, Grouped
from nerve.measuring.passes import bytes_of
from nerve.sites_and_groups import AROUND, GROUPINGS


@dataclass(frozen=True)
class ProbeArguments:
    """The arguments of the command; None leaves a choice to the model.

    Attributes:
        models: MODEL, as typed.
        text: files; None for the standard library's source.
        tokenizer: where it is, if not beside the weights.
        n_tokens, seq_len, batch_size: sizes of the measured text; batch_size counts sequences.
        device, dtype: where and in which precision the model runs.
        select, layers: the FFNs to measure.
        skip_first: number of positions to exclude at the beginning of each sequence.
        spectra: whether to store eigenvalues.
        memory: limit for the matrices held at once, as in `nerve.measure`.
        steps: of the models, in their order.
        groups: groupings of the samples whose groups are also measured separately.
        sites: what is measured around the nonlinearity.

    Raises:
        ConfigError: for numbers that are too small, unknown groups, and invalid paths.
    """

    models: tuple[str, ...]
    text: tuple[str, ...] | None = None
    tokenizer: str | None = None
    n_tokens: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    device: str | None = None
    dtype: str | None = None
    select: str | None = None
    layers: tuple[int, ...] | None = None
    skip_first: int | None = None
    spectra: bool = True
    memory: str | None = None
    steps: tuple[int, ...] | None = None
    groups: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        tokenizer = () if self.tokenizer is None else (self.tokenizer,)
        paths = {"MODEL": self.models, "--text": self.text or (), "--tokenizer": tokenizer}
        for name, given in paths.items():
            for path in given:
                require_path(name, path)
        least = {"n_tokens": 1, "seq_len": 2, "batch_size": 1, "skip_first": 0}
        require_several("--groups", self.groups or (), GROUPINGS)
        require_several("--sites", self.sites or (), AROUND)
        if self.memory is not None:
            bytes_of(self.memory)
        for name, number in least.items():
            if getattr(self, name) is not None:
                option = f"--{name.replace('_', '-')}"
                require_count(option, getattr(self, name), least=number)

    def as_recorded(
        self,
        dtype: torch.dtype,
        skip_first: int,
        groups: tuple[str, ...],
        sites: tuple[str, ...],
        fingerprints: Mapping[str, str],
    ) -> dict[str, Any]:
        """The arguments as the configuration of the run records them, with defaults as the model
        and its data determined them."""
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "select": self.select,
            "layers": self.layers,
            "skip_first": skip_first,
            "spectra": self.spectra,
            **fingerprints,
            **({"groups": groups} if groups else {}),
            **({"sites": sites} if sites else {}),
        }


class Checkpoint(NamedTuple):
    """The weights of one step.

    Attributes:
        step: number of optimizer steps so far.
        place: the folder or file, or the name on the hub.
    """

    step: int
    place: str

    def is_older_than(self, time: str) -> bool:
        """Whether nothing in it has been written or added since `time`; False for what is not a
        file here."""
        path = Path(self.place)
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        if not files or not path.exists():
            return False
        states = [each.stat() for each in files]
        latest = max(max(state.st_mtime, state.st_ctime) for state in states)
        return latest < datetime.fromisoformat(time).timestamp()


@dataclass(frozen=True)
class Data:
    """What all models of a series share.

    Attributes:
        batches: on the device; they can be iterated repeatedly.
        forward: runs a model on a batch, and returns its loss if there is one.
        config: the configuration of the run, without the weights.
        record: further fields of its record, such as `fingerprints`.
        skip_first, shortcut: of the measurement.
        tokens_seen: by a model at a step.
        grouped: groups of the samples that are measured separately.
        sites: what is measured around the nonlinearity.
        text: the name of the corpus; empty for a run's own data.
    """

    batches: Sequence[Any]
    forward: Callable[[nn.Module, Any], object]
    config: Mapping[str, Any]
    record: Mapping[str, Any] = field(default_factory=dict)
    skip_first: int = 0
    shortcut: bool | str = True
    tokens_seen: Callable[[int], int] = lambda step: 0
    grouped: Grouped = NOT_GROUPED
    sites: tuple[str, ...] = ()
    text: str = ""


class Source(Protocol):
    """A series of checkpoints of one model."""

    name: str
    checkpoints: list[Checkpoint]

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model, in eval mode, on the device."""

    def find(self, model: nn.Module) -> FoundFFNs:
        """Its requested FFNs."""

    def data(self, model: nn.Module, ffns: FoundFFNs) -> Data:
        """The data to measure, given one of the models."""
