"""Loads runs as pandas frames: one row per run, or the stored rows joined with the factors of their
run.

All loaders take a run directory, a sweep, a tree of outputs, or several of these, and warn about
everything they leave out. Unfinished and failed runs are included in every frame; see `run_status`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd

from nerve.analysis.flags import flag_runs
from nerve.analysis.frames import require_joinable, require_names
from nerve.analysis.gather import (
    Block,
    Coded,
    Derive,
    StoredRun,
    frame_from_columns,
    gather_columns,
    reads,
)
from nerve.analysis.run_rows import RunRows
from nerve.analysis.sampling import codes_by_halves
from nerve.derived import OF_CHANNELS, VERDICTS, derived_columns, outlier_codes, sampling_codes
from nerve.errors import StoreError, warn_caller
from nerve.storage.find import AnyPath, IncompleteWarning, listed, load_records
from nerve.storage.parts import DamagedPartError, warn_damaged
from nerve.storage.schema import DATASETS, Dataset


class Runs:
    """The runs under some paths. The tree is searched and each record is parsed once, on creation;
    frames of rows are loaded on first access and cached.

    Args:
        paths: a run, a sweep, a tree of outputs, or several of these.
        factors: columns of `frame`, such as `"normalization.kind"` or `"final.val_loss"`, that are
            joined to `metrics`, `spectra`, `scalars` and `groups`.

    Raises:
        StoreError: if there is no run under `paths`.
        ConfigError: if `factors` is not a list.

    Attributes:
        records: id and directory of each run.
        frame: one row per run, with the columns of `load_runs`.
    """

    def __init__(self, paths: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> None:
        require_names(factors=factors)
        rows = RunRows()
        records = load_records(paths, rows.take_from)
        self.records = [StoredRun(record.run_id, record.directory) for record in records]
        self.frame = rows.frame([record.directory for record in records])
        self.factors = tuple(factors)
        self._counts: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per measured FFN and step; columns and errors as in `load_metrics`."""
        return self._joined("metrics", self._metrics)

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """One row per measured FFN, step and site, as in `load_spectra`."""
        return self._joined("spectra", self._rows)

    @cached_property
    def scalars(self) -> pd.DataFrame:
        """One row per logged value, as in `load_scalars`."""
        return self._joined("scalars", self._rows)

    @cached_property
    def groups(self) -> pd.DataFrame:
        """One row per site and group of a measured FFN and step, as in `load_groups`."""
        return self._joined("groups", lambda dataset: self._groups)

    @cached_property
    def flags(self) -> pd.DataFrame:
        """Which runs can be compared, and why the others cannot: `flag_runs` of `metrics` and
        `frame`."""
        return flag_runs(self.metrics, self.frame)

    def _with_derived(self, groups: pd.DataFrame, rows: Block, runs: slice) -> Block:
        """Rows of metrics of some of the runs, with the columns derived from them and from the
        groups of all runs."""
        ffn, status, numbers = rows["ffn"], rows["status"], _numbers_of(rows)
        assert isinstance(ffn, Coded)
        assert isinstance(status, Coded)
        sampling = sampling_codes(numbers, status.equal("ok"))
        if len(groups):
            ends = np.cumsum([0, *self._counts["groups"]])
            own = groups.iloc[ends[runs.start] : ends[runs.stop]]
            sampling = codes_by_halves(sampling, rows, own)
        return {
            **rows,
            **derived_columns(numbers),
            "outliers": Coded.used(*outlier_codes(numbers, ffn.equal(OF_CHANNELS))),
            "sampling": Coded.used(sampling, VERDICTS),
        }

    @cached_property
    def _groups(self) -> dict[str, Any]:
        """The columns of `groups` without factors. Metrics are derived from them, whose factors may
        have the name of one of these columns."""
        return self._rows(DATASETS["groups"])

    def _metrics(self, dataset: Dataset) -> dict[str, Any]:
        return self._rows(dataset, partial(self._with_derived, frame_from_columns(self._groups)))

    def _joined(self, name: str, load: Callable[[Dataset], Mapping[str, Any]]) -> pd.DataFrame:
        """The rows of a dataset with the `factors` of their run, which are checked first.

        Args:
            name: of the dataset.
            load: returns the columns of its rows.
        """
        dataset = DATASETS[name]
        require_joinable(self.factors, self.frame, dataset)
        columns = dict(load(dataset))
        counts = np.array(self._counts[name])
        for factor in self.factors:
            if factor not in columns:
                columns[factor] = _repeated(self.frame[factor], counts)
        return frame_from_columns(columns)

    def _rows(self, dataset: Dataset, derive: Derive | None = None) -> dict[str, Any]:
        """The columns of the rows of all runs, with those that `derive` adds, and `run_status` and
        `n_damaged_parts` of their run.

        Only a few runs are read at a time, so that hardly more than these columns is in memory.
        """
        counts: list[int] = []
        unread: list[Sequence[StoreError]] = []

        def blocks() -> Iterator[tuple[Block, float]]:
            for read in reads(self.records, dataset, derive):
                counts.extend(read.counts)
                unread.extend(read.unread)
                yield read.block, len(self) / len(counts)

        columns: dict[str, Any] = {**gather_columns(blocks())}
        self._counts[dataset.name] = counts
        self._warn(dataset, unread)
        n_damaged = pd.Series([len(errors) for errors in unread], dtype=np.int32)
        of_runs = {"run_status": self.frame["run_status"], "n_damaged_parts": n_damaged}
        for name, values in of_runs.items():
            columns[name] = _repeated(values, np.array(counts))
        return columns

    def _warn(self, dataset: Dataset, unread: Sequence[Sequence[StoreError]]) -> None:
        errors = [error for of_run in unread for error in of_run]
        warn_damaged(error for error in errors if isinstance(error, DamagedPartError))
        for error in errors:
            if not isinstance(error, DamagedPartError):
                warn_caller(f"Left out: {error}", IncompleteWarning)
        found = zip(self.records, self._counts[dataset.name], strict=True)
        empty = [record.run_id for record, n_rows in found if not n_rows]
        if empty and not dataset.is_optional:
            warn_caller(f"Runs without {dataset.name}: {listed(empty)}.", IncompleteWarning)


def load_runs(path: AnyPath | Iterable[AnyPath]) -> pd.DataFrame:
    """One row per run under `path`.

    Columns: `run_id, config_id, design_id` (`config_id` without the seed: shared by runs that
    differ only in it), `sweep, directory, run_status, error ("Type: message"), step, restarts,
    seed, n_parameters, unigram_loss, separator_token, stopped_by, warning`, the times (UTC), `host,
    device, git_commit`, the entries of `final.*, fingerprints.*, versions.*, job.*, pre_scales.*`,
    and every leaf of the configuration by its dotted name (`normalization.kind`, `ffn.width`; a
    list as JSON). A leaf with the name of one of the former columns has the prefix `config.`
    (`config.device`), except an integer `seed`. For a key that was added after the version of
    nerve-run that wrote a run, its row has the value that corresponds to the behavior of that
    version. Anything else that a run does not have is missing in its row.

    Raises:
        StoreError: if there is no run under `path`.
    """
    return Runs(path).frame


def load_metrics(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per measured FFN and step, joined with `run_status` and the `factors` of its run.

    `n_damaged_parts` counts the parts of the run that could not be read. Derived columns, missing
    where their inputs are missing:

    - `exp_se_pre`, `exp_se_post` = exp(SE) in [1, D], the number of directions of a flat spectrum
      with this entropy; never less than PR
    - `pr_gain = pr_post / pr_pre`, `delta_eee = eee_post - eee_pre`
    - `se_pre_normalized`, `se_post_normalized` = SE / ln D in [0, 1]; `pr_pre_fraction`,
      `pr_post_fraction` = PR / D in [1/D, 1], with D = `d_ff`
    - `rank_limit_pre = min(d_in, d_ff, n_samples - 1)`, `rank_limit_post = min(d_ff, n_samples -
      1)`: upper bounds of the rank, and therefore of PR and exp(SE) (after a LayerNorm the first is
      lower by one)
    - `outliers`: the sites whose PR may be dominated by a few samples, `pre`, `post`, `pre, post`
      or empty (see `nerve.derived.outliers`)
    - `sampling`: whether there were enough samples, `well`, `under` or `severely under`: from how
      much PR changes when it is extrapolated from halves to infinitely many samples (5%, 20%; the
      worse of pre and post), or from N/D if no halves were measured (8, 2)

    Args:
        path: a run, a sweep, a tree of outputs, or several of these.
        factors: columns of `load_runs`, such as `"normalization.kind"` or `"final.val_loss"`.

    Raises:
        StoreError: if there is no run under `path`.
        ConfigError: for a factor that is not a column of `load_runs`; the message suggests similar
            names.
    """
    return Runs(path, factors).metrics


def load_spectra(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per measured FFN, step and site; `eigenvalues` are float32 arrays.

    Otherwise as `load_metrics`.
    """
    return Runs(path, factors).spectra


def load_groups(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per measured FFN, step, site, grouping and group, for runs that measured groups.

    - `site`: in the order of the forward pass `stream_in` (the residual stream before the FFN and
      its norm), `input` (of the FFN), `pre`, `post`, `output`, `stream_out`
    - `grouping` and `group`: `all` and `all` for all samples; `position` has `0`, `like_0` (equally
      many others, one from each sequence) and `q1` to `q4`; `frequency` has `head`, `mid` and
      `tail`; `halves` has `a` and `b`
    - `n_samples`, `dim` (features), `se`, `pr`, `eee`, `variance`, `pr_corrected`, `status` as in
      `load_metrics`; `se_spread`, `pr_spread` and `eee_spread`, divided by √N, are the standard
      errors for N independent Gaussian samples (`sampling_error` gives those of the actual samples)

    Otherwise as `load_metrics`; empty if no run measured groups.
    """
    return Runs(path, factors).groups


def load_scalars(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per logged value: `run_id, step, name, value`. Otherwise as `load_metrics`."""
    return Runs(path, factors).scalars


def _numbers_of(rows: Block) -> dict[str, np.ndarray]:
    return {name: values for name, values in rows.items() if not isinstance(values, Coded)}


def _repeated(values: pd.Series, counts: np.ndarray) -> Any:
    """The value of each run, repeated for each of its rows; strings as categories."""
    if all(isinstance(value, str) for value in values.dropna()) and values.notna().any():
        return Coded.of(values).repeat(counts)
    own = values.to_numpy() if isinstance(values.dtype, np.dtype) else values.array
    return own.repeat(counts)
