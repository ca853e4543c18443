"""Stored configurations name classes by their old modules; conf/ names the current ones."""

import re

from hydra.utils import get_object

from nerve.cli.config.compose import CONF, SWEEPS
from nerve.cli.config.targets import TARGETS, foreign_targets, resolve_targets

NAMED = {
    name
    for folder in (CONF, SWEEPS)
    for path in folder.rglob("*.yaml")
    for name in re.findall(r"_target_: (nerve\.[\w.]+)", path.read_text())
}


def test_the_table_has_all_targets_of_the_configuration_and_each_exists():
    assert set(TARGETS.values()) == NAMED
    assert all(callable(get_object(path)) for path in NAMED)


def test_resuming_a_run_of_any_shipped_option_warns_of_no_target():
    named = re.findall(r"_target_: ([\w.]+)", "".join(p.read_text() for p in CONF.rglob("*.yaml")))
    assert len(named) > len(NAMED)
    runs = [{"_target_": name} for name in named if not name.startswith("hydra_plugins.")]
    assert foreign_targets(runs) == []


def test_a_moved_target_is_found_by_its_last_name_at_any_depth():
    stored = {
        "logger": {"csv": {"_target_": "nerve.logger.CSVLogger", "flush": 1}},
        "lists": [{"_target_": "nerve.somewhere.text_files"}, 3],
        "other": {"_target_": "torch.optim.AdamW"},
        "own": {"_target_": "nerve.mine.Unknown"},
    }
    assert resolve_targets(stored) == {
        "logger": {"csv": {"_target_": "nerve.training.loggers.CSVLogger", "flush": 1}},
        "lists": [{"_target_": "nerve.data.files.text_files"}, 3],
        "other": {"_target_": "torch.optim.AdamW"},
        "own": {"_target_": "nerve.mine.Unknown"},
    }


def test_foreign_targets_are_found_at_any_depth():
    values = {
        "_target_": "torch.optim.AdamW",
        "logger": {"csv": {"_target_": "nerve.training.loggers.CSVLogger"}},
        "lists": [[{"_target_": "os.system", "inner": {"_target_": "torchvision.models.vgg"}}], 3],
        "callbacks": {"a": {"_target_": "lightning.pytorch.callbacks.EarlyStopping"}},
        "again": {"_target_": "os.system"},
        "near": {"_target_": "nerves.of.steel"},
        "text": "_target_: subprocess.run",
    }
    assert foreign_targets(values) == ["nerves.of.steel", "os.system", "torchvision.models.vgg"]
