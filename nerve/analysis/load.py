"""Runs as pandas frames: one row per run, and the rows that runs stored, joined with their factors.

All loaders take a run directory, a sweep, a whole tree of outputs, or several of these, and name
in a warning whatever they leave out. Unfinished and failed runs are in every frame; their
`run_status` tells them.
"""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from nerve.analysis.derived import derived_columns
from nerve.analysis.flags import flag_runs
from nerve.analysis.frames import require_names
from nerve.analysis.gather import Block, Coded, frame_of, gathered
from nerve.analysis.read import AT_ONCE, Derive, RunRows, StoredRun, reads
from nerve.analysis.sampling import VERDICTS, sampling_codes
from nerve.errors import ConfigError, StoreError, warn_caller
from nerve.outliers import OF_CHANNELS, outlier_codes
from nerve.storage.find import AnyPath, IncompleteWarning, listed, load_records
from nerve.storage.parts import DamagedPartError, warn_damaged
from nerve.storage.schema import DATASETS, Dataset


class Runs:
    """The runs under some paths. The tree is walked and each record is parsed once, here; the
    frames of rows are made when they are first asked for, and kept.

    Args:
        paths: a run, a sweep, a tree of outputs, or several of these.
        factors: columns of `frame`, such as `"normalization.kind"` or `"final.val_loss"`, that
            `metrics`, `spectra` and `scalars` are joined with.

    Raises:
        StoreError: when there is no run under `paths`.
        ConfigError: for `factors` that are no list.

    Attributes:
        records: id and directory of each run.
        frame: one row per run; its columns are those of `load_runs`.
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
        """One row per measured FFN and step; columns and errors are those of `load_metrics`."""
        _ = self.groups  # read before threads ask for them
        return self._rows(DATASETS["metrics"], self._with_derived)

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """One row per measured FFN, step and site, as of `load_spectra`."""
        return self._rows(DATASETS["spectra"])

    @cached_property
    def scalars(self) -> pd.DataFrame:
        """One row per logged value, as of `load_scalars`."""
        return self._rows(DATASETS["scalars"])

    @cached_property
    def groups(self) -> pd.DataFrame:
        """One row per site and group of a measured FFN and step, as of `load_groups`."""
        return self._rows(DATASETS["groups"])

    @cached_property
    def flags(self) -> pd.DataFrame:
        """Which runs can be compared, and why others cannot: `flag_runs` of `metrics`, `frame`."""
        return flag_runs(self.metrics, self.frame)

    def _with_derived(self, rows: Block, runs: slice) -> Block:
        """Rows of metrics of some of the runs with what derives from them and their groups."""
        groups = self.groups
        if len(groups):
            ends = np.cumsum([0, *self._counts["groups"]])
            groups = groups.iloc[ends[runs.start] : ends[runs.stop]]
        ffn, numbers = rows["ffn"], _numbers_of(rows)
        assert isinstance(ffn, Coded)
        return {
            **rows,
            **derived_columns(numbers),
            "outliers": Coded.used(*outlier_codes(numbers, ffn.equal(OF_CHANNELS))),
            "sampling": Coded.used(sampling_codes(rows, groups), VERDICTS),
        }

    def _rows(self, dataset: Dataset, derive: Derive | None = None) -> pd.DataFrame:
        """The rows of all runs, each with what `derive` makes of them and the `factors` of its run.

        Some runs are read at once, so that no more is in memory than the frame and these.
        """
        _check_factors(self.factors, self.frame, dataset)
        counts: list[int] = []
        unread: list[Sequence[StoreError]] = []

        def blocks() -> Iterator[Block]:
            for read in reads(self.records, dataset, derive):
                counts.extend(read.counts)
                unread.extend(read.unread)
                yield read.block

        columns: dict[str, Any] = {**gathered(blocks(), -(-len(self) // AT_ONCE))}
        self._counts[dataset.name] = counts
        self._warn(dataset, unread)
        n_damaged = np.array([len(errors) for errors in unread], np.int32)
        runs = self.frame.assign(n_damaged_parts=n_damaged)
        for name in dict.fromkeys(["run_status", "n_damaged_parts", *self.factors]):
            columns[name] = _repeated(runs[name], np.array(counts))
        return frame_of(columns)

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

    Columns: `run_id, config_id, design_id` (as `config_id`, but without the seed: runs that differ
    in nothing else share it), `sweep, directory, run_status, error ("Type: message"), step,
    restarts, seed, n_parameters, unigram_loss, separator_token, stopped_by, warning`, the times
    (UTC), `host, device, git_commit`, the entries of `final.*, fingerprints.*, versions.*, job.*,
    pre_scales.*`, and every leaf of the configuration by its dotted name (`normalization.kind`,
    `ffn.width`; a list as its JSON text). A run of an older nerve-run has, for a key that was added
    since, the value that means what it did. What a run does not have is missing in its row.

    Raises:
        StoreError: when there is no run under `path`.
    """
    return Runs(path).frame


def load_metrics(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per measured FFN and step, joined with `run_status` and the `factors` of its run.

    `n_damaged_parts` counts the parts of its run that could not be read. Derived columns, missing
    where what they derive from is:

    - `exp_se_pre`, `exp_se_post` = exp(SE) in [1, D], the number of directions that a flat spectrum
      of this entropy has; never below PR
    - `pr_gain = pr_post / pr_pre`, `delta_eee = eee_post - eee_pre`
    - `se_pre_normalized`, `se_post_normalized` = SE / ln D in [0, 1]; `pr_pre_fraction`,
      `pr_post_fraction` = PR / D in [1/D, 1], with D = `d_ff`
    - `rank_limit_pre = min(d_in, d_ff, n_samples - 1)`, `rank_limit_post = min(d_ff, n_samples -
      1)`: no spectrum can have more directions, so PR and exp(SE) cannot exceed them (behind a
      LayerNorm the first is one less still)
    - `outliers`: the sites whose PR may be that of a few samples, `pre`, `post`, `pre, post` or
      empty (see `nerve.outliers`)
    - `sampling`: whether there were enough samples, `well`, `under` or `severely under`: by how far
      PR moves when it is extrapolated from halves to endlessly many samples (5%, 20%; of pre and
      post the worse), or by N/D where no halves were measured (8, 2)

    Args:
        path: a run, a sweep, a tree of outputs, or several of these.
        factors: columns of `load_runs`, such as `"normalization.kind"` or `"final.val_loss"`.

    Raises:
        StoreError: when there is no run under `path`.
        ConfigError: for a factor that is not a column of `load_runs`; near names are given.
    """
    return Runs(path, factors).metrics


def load_spectra(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per measured FFN, step and site; `eigenvalues` are float32 arrays.

    Else as `load_metrics`.
    """
    return Runs(path, factors).spectra


def load_groups(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per measured FFN, step, site, grouping and group, of runs that measured any.

    - `site`: along a block `stream_in` (the residual stream before the FFN and its norm), `input`
      (of the FFN), `pre`, `post`, `output`, `stream_out`
    - `grouping` and `group`: `all` and `all` for all samples; `position` has `0`, `like_0` (as many
      others, one of each sequence) and `q1` to `q4`; `frequency` has `head`, `mid` and `tail`;
      `halves` has `a` and `b`
    - `n_samples`, `dim` (features), `se`, `pr`, `eee`, `variance`, `pr_corrected`, `status` as of
      `load_metrics`; `se_spread`, `pr_spread` and `eee_spread` over √N are the standard errors of N
      independent Gaussian samples (`sampling_error` says what they are of these)

    Else as `load_metrics`; empty where no run measured groups.
    """
    return Runs(path, factors).groups


def load_scalars(path: AnyPath | Iterable[AnyPath], factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per logged value: `run_id, step, name, value`. Else as `load_metrics`."""
    return Runs(path, factors).scalars


def _numbers_of(rows: Block) -> dict[str, np.ndarray]:
    return {name: values for name, values in rows.items() if not isinstance(values, Coded)}


def _repeated(values: pd.Series, counts: np.ndarray) -> Any:
    """The value of each run as often as it has rows; texts as categories."""
    if all(isinstance(value, str) for value in values.dropna()) and values.notna().any():
        return Coded.of(values).repeat(counts)
    own = values.to_numpy() if isinstance(values.dtype, np.dtype) else values.array
    return own.repeat(counts)


def _check_factors(factors: Sequence[str], runs: pd.DataFrame, dataset: Dataset) -> None:
    columns = [name for name in runs.columns if name not in dataset.schema.names]
    for factor in factors:
        if factor in columns:
            continue
        parts = [name for name in columns if factor in (name.split(".")[0], name.split(".")[-1])]
        near = dict.fromkeys([*parts, *get_close_matches(factor, columns, n=5)])
        fix = f"Near names: {', '.join(near) or 'none; see load_runs(path).columns'}."
        if factor in runs.columns:
            fix = (
                "Leave it out; a configuration value of that name can be a factor inside a group: "
                f'config={{"group": {{"{factor}": …}}}} gives group.{factor}.'
            )
        raise ConfigError(
            f"A factor is a column of load_runs that {dataset.name} does not have already; got "
            f"{factor!r}. {fix}"
        )
