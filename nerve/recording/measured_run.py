"""The run of a model that is measured without being trained, at one or more of its steps."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from nerve.errors import StoreError
from nerve.measuring.eigenproblem import FFNSpectra, GroupSpectrum
from nerve.recording.digest import Digest
from nerve.recording.run import RecordedRun, recorded_run
from nerve.recording.solver import Solved
from nerve.recording.writer import SpectraWriter
from nerve.storage.directory import RunDirectory
from nerve.storage.identity import differences

OWN = ("model", "weights", "batches", "masks", "measure", "text")
"""The keys of the configuration that such a run fills in itself, or that `measure` does."""

_FOUND = ("model", "weights", "batches", "masks")
"""Those that are known only when a model is measured."""

_MOST_SHOWN = 5
"""Number of different values that an error names."""


class MeasuredRun:
    """Stores the measurements of a run, one per step.

    Its configuration holds the request, and grows with each step: `model`, `batches` and, if the
    caller gives masks, `masks` (digests), and `weights`, a string with the step and a digest for
    each step in order. A `model` given in the request stays as it is.
    """

    def __init__(
        self, recorded: RecordedRun, requested: Mapping[str, Any], spectra: bool | str
    ) -> None:
        self._record = recorded.record
        self._writer = SpectraWriter(recorded.store, (), spectra)
        self._own_model = "model" not in requested
        known = recorded.record.config
        self._config = {**requested, **{key: known[key] for key in _FOUND if key in known}}

    @property
    def steps(self) -> dict[int, str]:
        """The steps that are measured and stored, each with the digest of its weights."""
        return _steps_of(self._config)

    def require_same(self, samples: Mapping[str, str]) -> None:
        """Raises `StoreError` if the batches or masks, given by their digests, differ from those of
        earlier steps."""
        for name, digest in samples.items():
            known = self._config.get(name, digest)
            if known != digest:
                raise StoreError(
                    f"All steps of a run must be measured on the same {name}; those of "
                    f"{self._record.directory} have the digest {known}, these have {digest}. "
                    "Choose another directory."
                )

    def add(
        self,
        step: int,
        model: nn.Module,
        samples: Mapping[str, str],
        spectra: Sequence[FFNSpectra],
        val_loss: float | None,
        tokens_seen: int = 0,
        groups: Sequence[GroupSpectrum] = (),
    ) -> None:
        """Stores a measurement; `samples` are digests, as of `SampleDigests`.

        Raises:
            StoreError: if these differ from those of earlier steps.
        """
        self.require_same(samples)
        labels = {"step": step, "tokens_seen": tokens_seen, "val_loss": val_loss}
        self._writer.write([Solved(labels, list(spectra), groups)])
        steps = self.steps | {step: str(weights_of(model))}
        self._config |= {
            **samples,
            "weights": [f"{each} {steps[each]}" for each in sorted(steps)],
        }
        if self._own_model:
            self._config["model"] = _config_of(model)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        final = {"final": {"val_loss": val_loss}} if step == max(steps) else {}
        self._record.update(
            config=self._config, step=max(steps), n_parameters=n_parameters, **final
        )


def weights_of(model: nn.Module) -> Digest:
    """The digest of a model's state."""
    digest = Digest()
    digest.add(model.state_dict().values())
    return digest


class Measured(NamedTuple):
    """The state of a measured run.

    Attributes:
        steps: the measured steps, each with the digest of its weights.
        began: when the run began; None if it has not.
        is_done: whether the last process that measured has finished.
    """

    steps: dict[int, str]
    began: str | None = None
    is_done: bool = False


def measured_of(run: RunDirectory, requested: Mapping[str, Any]) -> Measured:
    """What a directory holds of the requested run.

    Raises:
        StoreError: if the directory holds another run.
    """
    record = run.record
    if record is None:
        return Measured({})
    different = differences(_requested_part(record.config, requested), requested)
    if different:
        names = ", ".join(different[:_MOST_SHOWN])
        if len(different) > _MOST_SHOWN:
            names += f" and {len(different) - _MOST_SHOWN} more"
        raise StoreError(
            f"A directory can hold only one run; {record.directory} holds run {record.run_id} "
            f"({record.run_status}) with different values of {names}. "
            f"Choose {run.ANOTHER}, or delete that one."
        )
    return Measured(_steps_of(record.config), record.started, record.run_status == "done")


def _requested_part(config: Mapping[str, Any], requested: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that the run fills in itself."""
    return {key: value for key, value in config.items() if key in requested or key not in _FOUND}


def _steps_of(config: Mapping[str, Any]) -> dict[int, str]:
    steps = (each.split() for each in config.get("weights", ()))
    return {int(step): digest for step, digest in steps}


@contextmanager
def measured_run(
    directory: str | os.PathLike[str],
    requested: Mapping[str, Any],
    spectra: bool | str,
    *,
    resume: bool,
    **first: Any,
) -> Iterator[MeasuredRun | None]:
    """Records a measured run within the block.

    Args:
        directory: the run directory.
        requested: the part of the configuration that is known in advance.
        spectra: whether eigenvalues are stored, as in `SpectraWriter`.
        resume: whether to continue an existing run. Otherwise a run that has measured something is
            refused.
        first: fields of a new run's record, such as `fingerprints`.

    Raises:
        StoreError: as `recorded_run`.
    """
    known = RunDirectory(directory).record
    found = {} if known is None else known.config
    config = {**{key: found[key] for key in _FOUND if key in found}, **requested}
    with recorded_run(
        directory, config, resume=resume, how_to_resume="resume=True", **first
    ) as run:
        if run is None:
            yield None
            return
        if not resume:
            run.store.truncate_after(-1)
            run.record.update(config=dict(requested))
        yield MeasuredRun(run, requested, spectra)


def _config_of(model: nn.Module) -> Any:
    """The model's own configuration, as in transformers, without where it was loaded from; for
    other models the name of the class."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        return type(model).__name__
    left_out = ("_name_or_path", "transformers_version")
    return {key: value for key, value in to_dict().items() if key not in left_out}
