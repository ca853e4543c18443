"""A measurement that stays is a run: its rows, its spectra, its loss, and what it was of."""

import pytest
import torch
from torch import Tensor, nn

import nerve
from nerve.errors import ConfigError, StoreError


class Net(nn.Module):
    """An FFN that tells its loss."""

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
    """The rows that are returned, the loss of the same pass, the eigenvalues, and the labels."""
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


def test_a_series_is_one_run_of_all_its_steps(tmp_path, model, batches):
    """Models as a loop loads them: the same module with other weights."""

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


def config_id(directory, model, batches, **how) -> str:
    nerve.measure(model, batches, into=directory, **how)
    return nerve.RunRecord.load(directory).config_id


def test_its_identity_is_weights_batches_and_what_was_asked(tmp_path, model, batches):
    """Not where it lies, nor which object the model is."""
    torch.manual_seed(0)
    again = Net()
    first = config_id(tmp_path / "first", model, batches)
    assert config_id(tmp_path / "again", again, batches) == first
    others = [
        config_id(tmp_path / "batches", model, batches[:1]),
        config_id(tmp_path / "how", model, batches, shortcut=False),
        config_id(tmp_path / "labels", model, batches, labels={"family": "mine"}),
    ]
    with torch.no_grad():
        model.ffn[0].bias[3] += 1e-3
    others.append(config_id(tmp_path / "weights", model, batches))
    assert len({first, *others}) == 5


def test_one_that_failed_begins_anew_and_one_that_is_done_stays(tmp_path, model, batches):
    def broken():
        yield 0, model
        raise ValueError("no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"):
        nerve.measure(broken(), batches, into=tmp_path)
    assert nerve.RunRecord.load(tmp_path).run_status == "failed"
    nerve.measure([(5, model)], batches, into=tmp_path)
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [5]
    with pytest.raises(StoreError, match="Choose another directory"):
        nerve.measure([(5, model)], batches, into=tmp_path)


@pytest.mark.parametrize(
    ("batches", "how", "words"),
    [
        (torch.zeros(3, 4), {}, "list of batches"),
        ({"x": torch.zeros(3, 4)}, {}, "list of batches"),
        ([torch.zeros(3, 4)], {"labels": {"weights": 1}}, "got weights"),
        ([torch.zeros(3, 4)], {"step": -1}, "step"),
        ([torch.zeros(3, 4)], {"spectra": "some"}, "spectra"),
    ],
)
def test_what_cannot_be_is_said_first(tmp_path, model, batches, how, words):
    with pytest.raises(ConfigError, match=words):
        nerve.measure(model, batches, into=tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()
