"""A stored measurement is a run: its rows, its spectra, its loss, and its identity."""

import weakref
from collections import UserDict
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import nerve
from nerve.errors import ConfigError, MeasurementError, StoreError
from nerve.recording.digest import Digest


class Net(nn.Module):
    """An FFN that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor | int]:
        return {"loss": self.ffn(x).square().mean(), "n_targets": x.numel()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=generator) for n in (40, 20)]


def test_a_measurement_is_stored_as_a_run(tmp_path, model, batches):
    """With the returned rows, the loss of the same pass, the eigenvalues, and the labels."""
    rows = nerve.measure(model, iter(batches), into=tmp_path, step=7, labels={"family": "mine"})
    stored = nerve.load_metrics(tmp_path, factors=["family", "model"])
    assert stored["pr_post"].tolist() == rows["pr_post"].tolist()
    assert (stored["step"].tolist(), stored["family"].tolist()) == ([7], ["mine"])
    assert stored["model"].tolist() == ["Net"]
    losses = torch.stack([model(x)["loss"].detach() for x in batches])
    expected = float((losses * torch.tensor([2 / 3, 1 / 3])).sum())
    assert stored["val_loss"].tolist() == pytest.approx([expected], rel=1e-6)
    assert [len(each) for each in nerve.load_spectra(tmp_path)["eigenvalues"]] == [12, 12]
    (run,) = nerve.load_runs(tmp_path).to_dict("records")
    assert (run["run_status"], run["step"], run["measure.skip_first"]) == ("done", 7, 0)
    assert nerve.measure(model, batches)["pr_post"].tolist() == rows["pr_post"].tolist()


@pytest.mark.parametrize("how", [{}, {"groups": ["halves"]}])
def test_the_columns_are_those_of_the_stored_rows(tmp_path, model, how):
    """With the derived ones. Only halves say more about the samples than their number does."""
    rows = nerve.measure(model, [torch.randn(8, 10, 4)], into=tmp_path, **how)
    stored = nerve.load_metrics(tmp_path)
    of_the_run = ["run_id", "step", "tokens_seen", "train_loss", "val_loss", "lr"]
    of_the_run += ["run_status", "n_damaged_parts"]
    assert sorted(rows.columns) == sorted(stored.columns.difference(of_the_run))
    for name in rows.columns.difference(["sampling"] if how else []):
        assert rows[name].tolist() == stored[name].tolist()
    assert rows["sampling"].isna().all() == bool(how)


@pytest.mark.parametrize("is_series", [False, True])
def test_a_measurement_of_nothing_has_the_same_columns(tmp_path, model, batches, is_series):
    """So that code after it also works if all steps were measured before."""
    given = [(0, model)] if is_series else model
    rows = nerve.measure(given, batches, into=tmp_path)
    none = nerve.measure(given, batches, into=tmp_path, resume=True)
    assert (len(rows), len(none)) == (1, 0)
    assert none.dtypes.to_dict() == rows.dtypes.to_dict()
    assert list(none.columns) == list(rows.columns)
    pd.testing.assert_frame_equal(pd.concat([none, rows], ignore_index=True), rows)


def test_a_series_is_one_run_with_all_its_steps(tmp_path, model, batches):
    """Models as a loop loads them: the same module with different weights."""

    def checkpoints():
        for step in (0, 10, 30):
            with torch.no_grad():
                model.ffn[0].weight.mul_(1.0 + step)
            yield step, model

    rows = nerve.measure(checkpoints(), iter(batches), into=tmp_path, spectra=False)
    assert rows["step"].tolist() == [0, 10, 30]
    assert rows["pr_post"].nunique() == 3
    stored = nerve.load_metrics(tmp_path)
    assert stored["pr_post"].tolist() == rows["pr_post"].tolist()
    assert stored["run_id"].nunique() == 1
    with pytest.warns(nerve.IncompleteWarning, match="without spectra"):
        assert nerve.load_spectra(tmp_path).empty


def test_only_one_loaded_model_of_a_series_is_in_memory(tmp_path, batches, caplog):
    """Each is freed before the next one is loaded, even if log records are kept."""
    caplog.set_level("INFO")
    alive: list[weakref.ref[nn.Module]] = []

    def load() -> nn.Module:
        assert all(each() is None for each in alive)
        net = Net()
        alive.append(weakref.ref(net))
        return net

    nerve.measure([(step, load) for step in (0, 5)], batches, into=tmp_path)
    assert len(alive) == 2
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [0, 5]


def test_a_series_resumes_where_it_stopped(tmp_path, model, batches):
    """Interrupted at any step, or done and now longer: the same rows and config_id, and no step is
    loaded twice."""
    loaded: list[int] = []

    def series(*steps: int, broken: int | None = None):
        def load(step: int) -> nn.Module:
            if step == broken:
                raise KeyboardInterrupt
            loaded.append(step)
            torch.manual_seed(step)
            return Net()

        return [(step, partial(load, step)) for step in steps]

    how = {"labels": {"family": "mine"}, "fingerprints": {"corpus": "ab", "tokenizer": "cd"}}
    nerve.measure(series(0, 5, 9), batches, into=tmp_path / "whole", **how)
    loaded.clear()
    parts = tmp_path / "parts"
    for broken in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            nerve.measure(series(0, 5, 9, broken=broken), batches, into=parts, resume=True, **how)
    nerve.measure(series(0, 5), batches, into=parts, resume=True, **how)
    nerve.measure(series(0, 5, 9), batches, into=parts, resume=True, **how)
    assert loaded == [0, 5, 9]
    assert nerve.measure(series(0, 5, 9), batches, into=parts, resume=True, **how).empty
    whole, record = (nerve.RunRecord.load(tmp_path / name) for name in ("whole", "parts"))
    assert record.config_id == whole.config_id
    assert record.fingerprints == {"corpus": "ab", "tokenizer": "cd"}
    rows = [
        nerve.load_metrics(tmp_path / name).drop(columns="run_id") for name in ("whole", "parts")
    ]
    pd.testing.assert_frame_equal(*rows)
    other = {**how, "fingerprints": {"corpus": "ab", "tokenizer": "ef"}}
    with pytest.raises(StoreError, match=r"text\.tokenizer"):
        nerve.measure(series(0, 5, 9), batches, into=parts, resume=True, **other)
    loaded.clear()
    for step in (9, 12):  # even if no step is left, and before one is measured
        with pytest.raises(StoreError, match="the same batches"):
            nerve.measure(series(step), batches[:1], into=parts, resume=True, **how)
    assert not loaded


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_digest_covers_the_tensors_of_any_mapping(kind):
    """A tokenizer of transformers returns a `UserDict`."""

    def of(value: int) -> str:
        digest = Digest()
        digest.add_batch([kind(x=torch.tensor([value]), more=(kind(y=torch.ones(2)), "text"))])
        return str(digest)

    plain = Digest()
    plain.add([torch.tensor([1]), torch.ones(2)])
    assert of(1) == str(plain) != of(2)


def test_a_batch_that_the_model_does_not_accept_raises_an_error_with_the_fix(model):
    """As from a loader of features and targets, or a mapping with other names."""
    with pytest.raises(MeasurementError, match=r"forward=lambda model, batch: model\(batch\[0\]"):
        nerve.measure(model, [(torch.zeros(9, 4), torch.zeros(9))])
    with pytest.raises(MeasurementError, match=r"unexpected keyword.*model\(batch\['x'\]"):
        nerve.measure(model, [{"pixels": torch.zeros(9, 4)}])


def config_id(directory, model, batches, **how) -> str:
    nerve.measure(model, batches, into=directory, **how)
    return nerve.RunRecord.load(directory).config_id


def test_the_identity_is_weights_batches_and_arguments(tmp_path, model, batches):
    """Neither the directory nor the model object matters."""
    torch.manual_seed(0)
    again = Net()
    first = config_id(tmp_path / "first", model, batches)
    assert config_id(tmp_path / "again", again, batches) == first
    others = [
        config_id(tmp_path / "batches", model, batches[:1]),
        config_id(tmp_path / "how", model, batches, shortcut=False),
        config_id(tmp_path / "projected", model, batches, shortcut="projected"),
        config_id(tmp_path / "labels", model, batches, labels={"family": "mine"}),
    ]
    with torch.no_grad():
        model.ffn[0].bias[3] += 1e-3
    others.append(config_id(tmp_path / "weights", model, batches))
    assert len({first, *others}) == 6


def test_repeating_a_call_erases_nothing(tmp_path, model, batches):
    """Neither what a series has measured before it failed nor a run that is done."""

    def broken():
        yield 0, model
        yield 5, model
        raise ValueError("no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"):
        nerve.measure(broken(), batches, into=tmp_path)
    with pytest.raises(StoreError, match=r"failed, with 2 measured steps\. .*with resume=True, ch"):
        nerve.measure(broken(), batches, into=tmp_path)
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [0, 5]
    nerve.measure([(0, model), (9, model)], batches, into=tmp_path, resume=True)
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [0, 5, 9]
    with pytest.raises(StoreError, match=r"is done, .*hoose another directory"):
        nerve.measure([(5, model)], batches, into=tmp_path)


def test_a_measurement_that_failed_before_its_first_step_is_repeated(tmp_path, model, batches):
    """On other batches, too: nothing of it is kept."""

    def missing() -> nn.Module:
        raise ValueError("no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"):
        nerve.measure([(0, missing)], batches[:1], into=tmp_path)
    nerve.measure([(0, model)], batches, into=tmp_path)
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [0]


@pytest.mark.parametrize(
    ("batches", "how", "words"),
    [
        (torch.zeros(3, 4), {}, "list of batches"),
        ({"x": torch.zeros(3, 4)}, {}, "list of batches"),
        ("some text", {}, "list of batches"),
        ((torch.zeros(3, 4), torch.zeros(3).long()), {}, r"forward=lambda .* model\(batch\[0\]\)"),
        ([torch.zeros(3, 4)], {"labels": {"weights": 1}}, "got weights"),
        ([torch.zeros(3, 4)], {"memory": "much"}, "8GiB"),
        ([torch.zeros(3, 4)], {"step": -1}, "step"),
        ([torch.zeros(3, 4)], {"spectra": "some"}, "spectra"),
        ([torch.zeros(3, 4)], {"labels": ["a"]}, "labels must be a mapping by name.*got list"),
        ([torch.zeros(3, 4)], {"labels": {1: "a"}}, "labels must be a mapping by name"),
        ([torch.zeros(3, 4)], {"labels": {"lr": 1}}, r"got lr\. .*labels={'group': {'lr'"),
        ([torch.zeros(3, 4)], {"labels": {"js": 1, "pr_gain": 2}}, r"got js, pr_gain\."),
        ([torch.zeros(3, 4)], {"fingerprints": "ab"}, "fingerprints must be a mapping"),
        ([torch.zeros(3, 4)], {"fingerprints": {"corpora": "ab"}}, "Did you mean 'corpus'"),
        ([torch.zeros(3, 4)], {"fingerprints": {"corpus": 5}}, "got corpus=int 5"),
        ([torch.zeros(3, 4)], {"groups": "halves"}, "groups must be a list; got 'halves'"),
        ([torch.zeros(3, 4)], {"token_counts": torch.ones(3)}, "groups= has no frequency"),
        ([torch.zeros(3, 4)], {"layers": [0]}, "no argument layers.*find_ffns.*layers="),
        ([torch.zeros(3, 4)], {"shortcuts": True}, "Did you mean 'shortcut'"),
        (
            [torch.zeros(3, 4)],
            {"mask": torch.ones(3)},
            "mask must be a function.*got Tensor.*lambda",
        ),
        ([torch.zeros(3, 4)], {"forward": "call"}, "forward must be a function.*got str 'call'"),
        ([torch.zeros(3, 4)], {"exclude": 5}, "exclude must be a list of token ids.*got int 5"),
        ([torch.zeros(3, 4)], {"exclude": "ab"}, "exclude must be a list of token ids"),
        ([torch.zeros(3, 4)], {"ffns": [nn.Linear(4, 4)]}, "got one of Linear.*find_ffns"),
        ([torch.zeros(3, 4)], {"ffns": nn.Linear(4, 4)}, "descriptions of FFNs; got Linear"),
        ([torch.zeros(3, 4)], {"ffns": "*.mlp"}, "got str"),
    ],
)
def test_invalid_arguments_raise_before_anything_runs(tmp_path, model, batches, how, words):
    with pytest.raises(ConfigError, match=words):
        nerve.measure(model, batches, into=tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gpt2", r"torch module, or a series .* got str 'gpt2'.*nerve-probe"),
        ({"w": torch.zeros(2)}, "got dict"),
        (None, "got NoneType"),
        (torch.zeros(3), "got Tensor"),
        ([(0, "ckpt/a")], r"\(step, model\).*got \(step, str 'ckpt/a'\).*lambda"),
        ([Net()], r"\(step, model\).*got Net"),
        ([("0", Net())], "the step of an item"),
        ([(5, Net), (5, Net)], "step 5 appears twice"),
        ([(5, lambda: "ckpt/a")], "torch module; got str 'ckpt/a'"),
    ],
)
def test_an_argument_that_is_no_model_raises(batches, model, words):
    with pytest.raises(ConfigError, match=words):
        nerve.measure(model, batches)


def test_a_duplicate_step_ends_an_iterator_of_models(tmp_path, model, batches):
    """The earlier steps remain stored."""
    with pytest.raises(ConfigError, match="step 5 appears twice"):
        nerve.measure(iter([(5, model), (5, model)]), batches, into=tmp_path)
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [5]


@pytest.mark.parametrize(
    ("seed", "recorded"), [(3, 3), (np.int64(2**62), 2**62), (True, None), ("3", None), (0.5, None)]
)
def test_a_seed_among_the_labels_is_that_of_the_run(tmp_path, model, batches, seed, recorded):
    """So that comparisons pair runs by it."""
    nerve.measure(model, batches, into=tmp_path / "run", labels={"seed": seed})
    assert nerve.RunRecord.load(tmp_path / "run").seed == recorded


def test_a_step_without_a_run_raises(model, batches):
    with pytest.raises(ConfigError, match=r"step=10 without into=\. Leave it out"):
        nerve.measure(model, batches, step=10)
    for given in ({"labels": {"corpus": "mine"}}, {"fingerprints": {"corpus": "5a"}}):
        with pytest.raises(ConfigError, match=r"got corpus without into=\. Give into=, or leave"):
            nerve.measure(model, batches, **given)
    with pytest.raises(ConfigError, match=r"got False without into=\. Leave it out"):
        nerve.measure(model, batches, spectra=False)


def test_a_label_may_have_the_name_of_a_group_or_of_what_each_run_records(tmp_path, model, batches):
    """Both have another column: neither takes the place of a result."""
    labels = {"host": "a", "ffn": {"width": 3}}
    nerve.measure(model, batches, into=tmp_path, labels=labels)
    (run,) = nerve.load_runs(tmp_path).to_dict("records")
    assert (run["config.host"], run["ffn.width"]) == ("a", 3)
    assert nerve.load_metrics(tmp_path, ["config.host", "ffn.width"])["ffn.width"].tolist() == [3]


def test_skipping_all_positions_raises(model):
    """Only the longest sequence must have positions left; shorter ones may have none."""
    short, long = torch.randn(2, 3, 4), torch.randn(2, 16, 4)
    assert nerve.measure(model, [short, long], skip_first=15)["n_samples"].tolist() == [2]
    with pytest.raises(MeasurementError, match="skip_first=16 for sequences of at most 16"):
        nerve.measure(model, [short, long], skip_first=16)


def test_ffns_are_chosen_with_find_ffns(model, batches):
    """As described in docs/own-model.md, because there is no select= here."""
    model.other = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    found = nerve.find_ffns(model, batches[0], select="ffn")
    assert len(nerve.measure(model, batches, ffns=found)) == 1
