"""Arguments of nerve.measure that change what is measured identify its run, and must be the same
where it is resumed."""

from functools import partial
from pathlib import Path

import pytest
import torch
from by_hand import Net
from torch import Tensor, nn

import nerve
from nerve.errors import StoreError

MODEL = Net()
BATCHES = [{"input_ids": torch.arange(2 * n).reshape(2, n) % 9} for n in (20, 30)]
FFNS = [nerve.FFNAdapter(i, "ffn", ffn[0], ffn[2]) for i, ffn in enumerate(MODEL.ffns)]


def first_half(batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return (torch.arange(ids.shape[1]) < ids.shape[1] // 2).expand(ids.shape)


def second_half(batch: dict[str, Tensor]) -> Tensor:
    return ~first_half(batch)


ONE_FFN_AT_A_TIME = {"memory": 7000}


def config_id(directory: Path, **how) -> str:
    nerve.measure(MODEL, BATCHES, into=directory, **how)
    return nerve.RunRecord.load(directory).config_id


COUNTS = torch.arange(9) + 1
OTHERS = [
    ({"ffns": FFNS[:1]}, {"ffns": FFNS[1:]}),
    ({"mask": first_half}, {"mask": second_half}),
    ({"mask": first_half}, {}),
    (
        {"mask": lambda batch: [first_half(batch), None]},
        {"mask": lambda batch: [None, first_half(batch)]},
    ),
    (
        {"groups": ["frequency"], "token_counts": COUNTS},
        {"groups": ["frequency"], "token_counts": COUNTS.flip(0)},
    ),
    ({}, {"spectra": False}),
]


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_measuring_something_else_is_another_run(tmp_path, one, other):
    """Neither repeats the other, and neither is resumed as the other."""
    assert config_id(tmp_path / "one", **one) != config_id(tmp_path / "other", **other)
    runs = nerve.load_runs(tmp_path)
    assert nerve.flag_runs(nerve.load_metrics(tmp_path), runs)["flag"].tolist() == ["ok", "ok"]
    for step in (0, 5):  # a step that is there, and another one
        with pytest.raises(StoreError, match=r"masks|measure\."):
            nerve.measure([(step, MODEL)], BATCHES, into=tmp_path / "one", resume=True, **other)
    assert nerve.load_metrics(tmp_path / "one")["step"].unique().tolist() == [0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"exclude": [3, 5]}, {"exclude": (5, 3, 3)}),
        ({"ffns": FFNS}, {"ffns": FFNS[::-1]}),
        ({"mask": first_half}, {"mask": lambda batch: first_half(batch).float()}),
        ({"mask": first_half}, {"mask": first_half, **ONE_FFN_AT_A_TIME}),
        # Neither of these changes what is measured.
        ({}, {**ONE_FFN_AT_A_TIME, "forward": lambda model, batch: model(**batch)}),
    ],
)
def test_measuring_the_same_in_other_words_is_the_same_run(tmp_path, one, other):
    assert config_id(tmp_path / "one", **one) == config_id(tmp_path / "other", **other)
    nerve.measure([(5, MODEL)], BATCHES, into=tmp_path / "one", resume=True, **other)
    assert nerve.load_metrics(tmp_path / "one")["step"].unique().tolist() == [0, 5]


def test_a_run_without_these_arguments_records_none_of_them(tmp_path):
    """So that its id stays as it was."""
    nerve.measure(MODEL, BATCHES, into=tmp_path)
    config = nerve.RunRecord.load(tmp_path).config
    assert sorted(config) == ["batches", "measure", "model", "weights"]
    assert sorted(config["measure"]) == [
        *("exclude", "mask", "only_labeled", "shortcut", "skip_first")
    ]


def test_a_mask_is_asked_once_for_each_batch(tmp_path):
    """It may take its masks one by one from those of a loader."""
    masks = iter([torch.ones(40).bool(), torch.zeros(20).bool()])
    net = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    batches = [torch.randn(n, 4) for n in (40, 20)]
    rows = nerve.measure(net, batches, into=tmp_path, mask=lambda batch: next(masks))
    assert rows["n_samples"].tolist() == [40]


def test_a_masked_series_is_resumed(tmp_path):
    """With the same masks; no step is loaded twice."""
    loaded: list[int] = []

    def load(step: int) -> nn.Module:
        loaded.append(step)
        return Net()

    series = [(step, partial(load, step)) for step in (0, 5, 9)]
    how = {"into": tmp_path / "run", "mask": second_half, "resume": True}
    nerve.measure(series[:2], BATCHES, **how)
    nerve.measure(series, iter(BATCHES), **how)
    assert loaded == [0, 5, 9]
    with pytest.raises(StoreError, match="measured on the same masks"):
        nerve.measure(series, BATCHES, **{**how, "mask": first_half})
    assert loaded == [0, 5, 9]
