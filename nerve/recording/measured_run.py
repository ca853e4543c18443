"""The run of a model that nobody trains: measured once, or at several of its steps."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nerve.measuring.eigenproblem import FFNSpectra
from nerve.recording.digest import add_tensors
from nerve.recording.run import RecordedRun, recorded_run
from nerve.recording.solver import Solved
from nerve.recording.writer import SpectraWriter

OWN = ("model", "weights", "batches", "measure")
"""What the configuration of such a run says by itself."""


class MeasuredRun:
    """Takes the measurements of a run, each of a step.

    Attributes:
        told: what is known of the run by now, for its configuration.
    """

    def __init__(self, recorded: RecordedRun, spectra: bool | str) -> None:
        self.told: dict[str, Any] = {}
        self._record = recorded.record
        self._writer = SpectraWriter(recorded.store, (), spectra)
        self._weights = hashlib.sha256()
        self._val_loss: float | None = None

    def noting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, of which a digest is made as they pass."""
        digest = hashlib.sha256()
        for batch in batches:
            add_tensors(digest, (each for each in tree_leaves(batch) if isinstance(each, Tensor)))
            yield batch
        self.told["batches"] = digest.hexdigest()[:16]

    def add(
        self, step: int, model: nn.Module, spectra: Sequence[FFNSpectra], val_loss: float | None
    ) -> None:
        """Stores a measurement."""
        labels = {"step": step, "tokens_seen": 0, "val_loss": val_loss}
        self._writer.write([Solved(labels, list(spectra))])
        add_tensors(self._weights, model.state_dict().values())
        self.told |= {"model": _config_of(model), "weights": self._weights.hexdigest()[:16]}
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        final = {"val_loss": val_loss}
        self._record.update(step=step, n_parameters=n_parameters, final=final)


@contextmanager
def measured_run(
    directory: str | os.PathLike[str], asked: Mapping[str, Any], spectra: bool | str
) -> Iterator[MeasuredRun | None]:
    """A new run that is measured within the block; its configuration is whole where that ends.

    Args:
        directory: the run directory.
        asked: what is known of the configuration beforehand.
        spectra: whether eigenvalues are stored, as in `SpectraWriter`.

    Raises:
        StoreError: as `recorded_run`.
    """
    with recorded_run(directory, asked, goes_on=False) as recorded:
        if recorded is None:
            yield None
            return
        recorded.store.truncate_after(-1)
        run = MeasuredRun(recorded, spectra)
        yield run
        recorded.record.update(config={**asked, **run.told})


def _config_of(model: nn.Module) -> Any:
    """What a model of transformers says of itself, without where it came from; of another the
    name of its class."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return type(model).__name__
    told = ("_name_or_path", "transformers_version")
    return {key: value for key, value in to_dict().items() if key not in told}
