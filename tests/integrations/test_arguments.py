"""What identifies a run of nerve.watch and of the callbacks, and which arguments are refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

import nerve
from nerve.errors import StoreError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))


HELDOUT = [torch.randn(32, 4, generator=torch.Generator().manual_seed(1))]


def with_loss(model: nn.Module, batch: torch.Tensor) -> dict:
    return {"loss": model(batch).square().mean()}


def watched(directory: Path, **given) -> nerve.RunRecord:
    """The record of a run of one step, measured on held-out batches before and after it."""
    model, asked = network(), {"heldout": HELDOUT, "forward": with_loss, **given}
    with nerve.watch(model, directory, **asked) as run:
        with torch.no_grad():
            model[2].weight.mul_(0.5)
            model[2].bias.mul_(0.5)
        run.step(0.5)
    return nerve.RunRecord.load(directory)


def flags(path: Path) -> list[str]:
    return nerve.flag_runs(nerve.load_metrics(path), nerve.load_runs(path))["flag"].tolist()


def test_runs_that_differ_in_a_key_that_nerve_run_excludes_are_different_runs(tmp_path):
    """`objective` is where a sweep of nerve-run looks for its best value; a user may train with
    two objectives. Neither run repeats the other, and neither goes on in the other's directory."""
    for name in ("mlm", "clm"):
        watched(tmp_path / name, config={"objective": name, "seed": 0})
    runs = nerve.load_runs(tmp_path)
    assert runs["config_id"].nunique() == runs["design_id"].nunique() == 2
    assert flags(tmp_path) == ["ok", "ok"]
    points = nerve.final_metrics(nerve.load_metrics(tmp_path), runs, ["objective"])
    assert sorted(points["objective"]) == ["clm", "mlm"]
    nerve.RunRecord.load(tmp_path / "mlm").finish("interrupted")
    with pytest.raises(StoreError, match=r"other values of objective \(mlm, now clm\)"):
        watched(tmp_path / "mlm", config={"objective": "clm", "seed": 0})
