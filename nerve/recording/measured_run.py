"""The run of a model that nobody trains: measured once, or at several of its steps."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nerve.errors import StoreError
from nerve.measuring.eigenproblem import FFNSpectra
from nerve.recording.run import RecordedRun, recorded_run
from nerve.recording.solver import Solved
from nerve.recording.writer import SpectraWriter
from nerve.storage.directory import RunDirectory

OWN = ("model", "weights", "batches", "measure", "text")
"""What the configuration of such a run says by itself."""


class Digest:
    """Of tensors: their types, shapes and values."""

    def __init__(self) -> None:
        self._sha: Any = hashlib.sha256()

    def add(self, tensors: Iterable[Any]) -> None:
        """Adds tensors; what else there is does not count."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._sha.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                self._sha.update(plain.numpy())

    def __str__(self) -> str:
        return self._sha.hexdigest()[:16]


class MeasuredRun:
    """Takes the measurements of a run, each of a step.

    Its configuration has what was asked, and grows with each step: `model`, `batches` (a digest),
    and `weights`, for each step in order a text of the step and a digest.
    """

    def __init__(
        self, recorded: RecordedRun, asked: Mapping[str, Any], spectra: bool | str
    ) -> None:
        self._record = recorded.record
        self._writer = SpectraWriter(recorded.store, (), spectra)
        known = recorded.record.config
        self._config = {**asked, **{key: known[key] for key in _FOUND if key in known}}

    @property
    def steps(self) -> list[int]:
        """Those that are measured and stored."""
        return [int(each.split()[0]) for each in self._config.get("weights", ())]

    def add(
        self,
        step: int,
        model: nn.Module,
        batches: Digest,
        spectra: Sequence[FFNSpectra],
        val_loss: float | None,
    ) -> None:
        """Stores a measurement.

        Raises:
            StoreError: for other batches than those of the steps before.
        """
        if self._config.get("batches", str(batches)) != str(batches):
            raise StoreError(
                "All steps of a run are measured on the same batches; those of "
                f"{self._record.directory} had the digest {self._config['batches']}, these have "
                f"{batches}. Choose another directory."
            )
        self._writer.write(
            [Solved({"step": step, "tokens_seen": 0, "val_loss": val_loss}, list(spectra))]
        )
        weights = Digest()
        weights.add(model.state_dict().values())
        of_steps = [*self._config.get("weights", ()), f"{step} {weights}"]
        self._config |= {
            "model": _config_of(model),
            "batches": str(batches),
            "weights": sorted(of_steps, key=lambda each: int(each.split()[0])),
        }
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._record.update(
            config=self._config,
            step=max(self.steps),
            n_parameters=n_parameters,
            final={"val_loss": val_loss},
        )


_FOUND = ("model", "weights", "batches")


@contextmanager
def measured_run(
    directory: str | os.PathLike[str],
    asked: Mapping[str, Any],
    spectra: bool | str,
    *,
    resume: bool,
    fingerprints: Mapping[str, str],
) -> Iterator[MeasuredRun | None]:
    """A run that is measured within the block.

    Args:
        directory: the run directory.
        asked: what is known of the configuration beforehand.
        spectra: whether eigenvalues are stored, as in `SpectraWriter`.
        resume: whether a run that is there goes on; else it is refused where it is done, and begun
            anew where it is not.
        fingerprints: of the run's record.

    Raises:
        StoreError: as `recorded_run`.
    """
    known = RunDirectory(directory).record
    found = {} if known is None else {key: known.config.get(key) for key in _FOUND}
    config = {**asked, **{key: value for key, value in found.items() if value is not None}}
    with recorded_run(directory, config, goes_on=resume, fingerprints=dict(fingerprints)) as run:
        if run is None:
            yield None
            return
        if not resume:
            run.store.truncate_after(-1)
            run.record.update(config=dict(asked))
        yield MeasuredRun(run, asked, spectra)


def _config_of(model: nn.Module) -> Any:
    """What a model of transformers says of itself, without where it came from; of another the
    name of its class."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return type(model).__name__
    told = ("_name_or_path", "transformers_version")
    return {key: value for key, value in to_dict().items() if key not in told}
