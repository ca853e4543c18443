"""What identifies a run of nerve.watch and of the callbacks, and which arguments are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nerve
from nerve.errors import StoreError


class Net(nn.Module):
    """Two FFNs in a row, of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)) for _ in range(2)
        )

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for ffn in self.ffns:
            x = x + ffn(x)
        return {"loss": x.square().mean()}


HELDOUT = [{"input_ids": torch.arange(64).reshape(2, 32) % 9}]


def watched(directory: Path, ask: Callable[[Net], dict] = lambda model: {}, **given) -> dict:
    """The configuration of a run of one step, measured on held-out batches before and after it.

    Args:
        ask: gives arguments that refer to the model.
        given: other arguments.
    """
    model = Net()
    with nerve.watch(model, directory, heldout=HELDOUT, **given, **ask(model)) as run:
        with torch.no_grad():
            model.embed.weight.mul_(0.5)
        run.step(0.5)
    return nerve.RunRecord.load(directory).config


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


def only(layer: int) -> Callable[[Net], dict]:
    def ask(model: Net) -> dict:
        ffn = model.ffns[layer]
        return {"ffns": [nerve.FFNAdapter(layer, "ffn", ffn[0], ffn[2])]}

    return ask


BY_FREQUENCY = {"groups": ["frequency"], "token_counts": torch.arange(9)}


@pytest.mark.parametrize(
    ("one", "other", "key"),
    [
        ({"ask": only(0)}, {"ask": only(1)}, "ffns"),
        ({"ask": only(0)}, {}, "ffns"),
        ({"mask": lambda batch: batch["input_ids"] < 8}, {}, "mask"),
        ({"exclude": [1]}, {"exclude": [2]}, "exclude"),
        (BY_FREQUENCY, {**BY_FREQUENCY, "token_counts": torch.ones(9)}, "token_counts"),
    ],
)
def test_measuring_something_else_is_another_run(tmp_path, one, other, key):
    """Neither repeats the other, and neither goes on in the other's directory."""
    watched(tmp_path / "one", **one)
    watched(tmp_path / "other", **other)
    assert flags(tmp_path) == ["ok", "ok"]
    nerve.RunRecord.load(tmp_path / "one").finish("interrupted")
    with pytest.raises(StoreError, match=rf"other values of monitor\.{key} "):
        watched(tmp_path / "one", **other)


def test_a_run_without_these_arguments_records_none_of_them(tmp_path):
    """So that its id stays as it was; nor does one where they have no effect."""
    recorded = watched(tmp_path / "a")["monitor"]
    assert {"ffns", "mask", "token_counts"}.isdisjoint(recorded)
    assert (recorded["exclude"], recorded["only_labeled"]) == ([], False)
    assert watched(tmp_path / "b", token_counts=torch.ones(9), exclude=())["monitor"] == recorded
    assert watched(tmp_path / "c", exclude=(5, 3, 3))["monitor"]["exclude"] == [3, 5]
