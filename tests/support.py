"""Helpers for several test files: rows, runs and stores with known numbers, and the pages'
examples."""

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nerve.analysis.load import load_metrics, load_runs
from nerve.cli.config.compose import CONF, register
from nerve.storage import record
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

CONFIG = {
    "normalization": {"kind": "layernorm", "placement": "pre"},
    "activation": {"name": "gelu"},
    "ffn": {"width": "8/3", "gated": False},
    "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]},
    "seed": 7,
}

TINY_RUN = (
    f"data.corpus.roots=[{Path(os.__file__).parent / 'json'}]",
    "data.vocab_size=300",
    "data.batch_size=4",
    "data.val_fraction=0.2",
    "model.n_layers=2",
    "model.d_model=16",
    "model.n_heads=2",
    "model.seq_len=16",
    "trainer.max_steps=5",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "monitor.every_n_steps=2",
    "monitor.n_tokens=128",
    "threads=1",
)
"""Arguments of a run that takes a fraction of a second. What is given after them wins."""

ROOT = Path(__file__).parents[1]


class PlainArguments(logging.Handler):
    """Rejects log records with arguments other than strings, numbers and the like: a handler that
    keeps records would keep a model or the frames of an error alive."""

    PLAIN = (str, int, float, Path, torch.device, type(None))

    def emit(self, record: logging.LogRecord) -> None:
        given = record.args.values() if isinstance(record.args, dict) else record.args or ()
        kept = [type(each).__name__ for each in given if not isinstance(each, self.PLAIN)]
        assert not kept, f"{record.name} logs {kept} by itself, where its text is enough"


LOGGERS = (None, "lightning", "lightning.fabric", "lightning.pytorch", "nerve")
"""Those whose level a command sets."""


@contextmanager
def as_before() -> Iterator[None]:
    """Restores what a command sets for its process: the environment, log levels, the root logger's
    handlers (Hydra's handler writes to the current stdout), the exception hook, and Hydra's own
    configuration."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, LOGGERS)]
    handlers, environment = logging.root.handlers.copy(), os.environ.copy()
    hook, config = sys.excepthook, HydraConfig.instance().cfg
    nerve, plain = logging.getLogger("nerve"), PlainArguments()
    nerve.addHandler(plain)
    try:
        yield
    finally:
        nerve.removeHandler(plain)
        sys.excepthook = hook
        HydraConfig.instance().cfg = config
        logging.root.handlers[:] = handlers
        for logger, level in levels:
            if logger.level != level:
                logger.setLevel(level)
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)


def ask_once_for_provenance() -> None:
    """Caches the commit and the versions, which do not change during tests; each new record would
    call git three times and read the metadata of a dozen packages."""
    versions = functools.cache(record.package_versions)
    record.git_commit = functools.cache(record.git_commit)
    record.package_versions = lambda: dict(versions())


sync = os.fsync


def never_sync() -> None:
    """Makes `os.fsync` do nothing. What it writes would be missing only after a crash of the
    machine; what a killed process has written stays. Sixty a run were a third of the time of tests
    of storage."""
    os.fsync = lambda descriptor: None


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Example:
    """A fenced block of a page: the page relative to the root, its language, and its text."""

    page: str
    language: str
    text: str


def examples(language: str) -> list[Example]:
    """All fenced blocks of README.md and docs/*.md in this language, in the order of the pages."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    return [
        Example(str(page.relative_to(ROOT)), found, text)
        for page in PAGES
        for found, text in fence.findall(page.read_text())
        if found == language
    ]


def example(language: str, words: str) -> str:
    """The only block of the pages in this language that contains these words."""
    (found,) = [block.text for block in examples(language) if words in block.text]
    return found


class StaticPage(HTMLParser):
    """What a reader without scripts sees of a report.

    Attributes:
        title, notes: the heading of the page, and what is to be read first.
        facts: by label.
        figures: their names.
        tables: by name, the texts of each row; the first is that of the columns.
        text: all text but that of cells.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.title, self.text = "", ""
        self.notes: list[str] = []
        self.facts: dict[str, str] = {}
        self.figures: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._label = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        name = dict(attrs).get("id") or ""
        if tag == "figure":
            self.figures.append(name.removeprefix("figure-"))
        elif name.startswith("table-"):
            self._rows = self.tables[name.removeprefix("table-")] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:  # elements that have no end, such as img
            pass

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self._rows[-1][-1] += data
        elif inside not in ("script", "style"):
            self.text += data
        if inside == "h1":
            self.title += data
        elif inside == "li":
            self.notes.append(data)
        elif inside == "dt":
            self._label = data
        elif inside == "dd":
            self.facts[self._label] = data


class Batches(tuple):
    """A single loader of batches; Lightning would take a list or tuple for several loaders."""


class KeepWeights(L.Callback):
    """Keeps copies of the weights after each optimizer step, and before the first."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._keep(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        self._keep(trainer, module)

    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.after[trainer.global_step] = deepcopy(module.model.state_dict())


@contextmanager
def hydra_at_conf() -> Iterator[None]:
    """The configuration search path of the command line."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str, name: str = "config", with_hydra: bool = False) -> DictConfig:
    """A configuration as composed by the command line, with Hydra's own node on request."""
    with hydra_at_conf():
        return compose(name, list(overrides), return_hydra_config=with_hydra)


def metrics_row(step: int, layer: int = 0, **values: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "tokens_seen": step * 64,
        "layer": layer,
        "ffn": "ffn",
        "n_samples": 100,
        "d_ff": 8,
        "d_in": 4,
        "se_pre": 1.0,
        "se_post": 1.5,
        "pr_pre": 2.0,
        "pr_post": 5.0,
        "eee_pre": 0.75,
        "eee_post": 0.25,
        "js": 0.125,
        "variance_pre": 3.0,
        "variance_post": 1.0,
        "pr_pre_corrected": 2.0625,
        "pr_post_corrected": 5.25,
        "variance_outside": 0.5,
        "largest_share_pre": 0.03125,
        "largest_share_post": 0.03125,
        "top_share_pre": 0.03125,
        "top_share_post": 0.03125,
        "mean_share_pre": 0.25,
        "mean_share_post": 0.75,
        "position_ratio_pre": 1.5,
        "position_ratio_post": 1.25,
        "train_loss": 4.0,
        "val_loss": 4.5,
        "lr": 0.003,
        "precision": "float32",
        "status": "ok",
    }
    return row | values


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    """A complete row of metrics at a step."""
    return metrics_row


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """An empty store."""
    return RunStore(tmp_path / "run", "cafe0001")


@pytest.fixture
def make_run() -> Callable[..., RunRecord]:
    """Makes a run directory with two steps of metrics, two layers each."""

    def make(
        directory: Path,
        config: dict[str, Any] | None = None,
        steps: tuple[int, ...] = (0, 10),
        **values: Any,
    ) -> RunRecord:
        record = RunRecord.create(directory, config or CONFIG, **values)
        store = RunStore(directory, record.run_id)
        for step in steps:
            store.append_metrics(metrics_row(step, layer) for layer in range(2))
            store.append_scalars([{"step": step, "name": "train_loss", "value": 4.0 - step / 10}])
            store.flush(step)
        return record

    return make


@pytest.fixture
def tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[pd.DataFrame, pd.DataFrame]]:
    """Stores runs and loads them again: `tables({...}, {...})` gives metrics and runs.

    A run is a mapping with `rows` (what differs from `metrics_row`), and where they matter `run_id,
    seed, config` (leaves by dotted name), `run_status, error`, and other fields of its record.
    """
    # What takes time and is tested elsewhere: where the code comes from.
    monkeypatch.setattr("nerve.storage.record.git_commit", lambda: None)
    monkeypatch.setattr("nerve.storage.record.package_versions", dict)

    def make(*specs: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
        for i, spec in enumerate(specs):
            values = {"run_id": f"run{i}", "seed": i, "unigram_loss": 7.0, "config": {}} | spec
            rows, leaves = values.pop("rows"), values.pop("config")
            run_status, error = values.pop("run_status", "done"), values.pop("error", None)
            final = values.pop("final", {})
            config: dict[str, Any] = {"seed": values["seed"]}
            for name, value in leaves.items():
                group, dot, key = name.partition(".")
                if dot:
                    config.setdefault(group, {})[key] = value
                else:
                    config[name] = value
            record = RunRecord.create(tmp_path / values["run_id"], config, **values)
            store = RunStore(record.directory, record.run_id)
            store.append_metrics(metrics_row(**row) for row in rows)
            store.flush(0)
            record.finish(run_status, error, final=final)
        return load_metrics(tmp_path), load_runs(tmp_path)

    return make
