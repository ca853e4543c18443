"""Runs that are not trained."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf


@pytest.fixture
def experiments(monkeypatch) -> list[tuple]:
    """The configuration and directory of each run that the command starts, without training."""
    started = []

    def run_experiment(config, hydra_config) -> float:
        directory = Path(hydra_config.runtime.output_dir)
        if "csv" in config.logger:
            assert config.logger.csv.directory == str(directory / "logs")
        started.append((config, directory))
        saved = directory / ".hydra" / "config.yaml"
        if not saved.exists():
            saved.parent.mkdir()
            OmegaConf.save(config, saved)
        return 1.0

    module = ModuleType("nerve.cli.experiment.run")
    module.run_experiment = run_experiment
    monkeypatch.setitem(sys.modules, "nerve.cli.experiment.run", module)
    return started
