"""`nerve-run model=mixer_…`: two FFNs per block, accuracy, and unsuitable data."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import nerve
from nerve.training.module import ImageClassifier

N_TEST = 364
SMALL = [
    "model=mixer_tiny",
    "model.n_layers=2",
    "model.d_model=24",
    "data.batch_size=50",
    "trainer.max_steps=5",
    "trainer.enable_progress_bar=false",
    "monitor.every_n_steps=2",
    "model.token_mixing.width=0.5",
    "ffn.width=4",
    "threads=1",
]


@pytest.fixture
def trained(monkeypatch) -> list[torch.nn.Module]:
    """The trained networks, in the order of the runs."""
    kept: list[torch.nn.Module] = []
    monkeypatch.setattr(ImageClassifier, "on_fit_end", lambda module: kept.append(module.model))
    return kept


def held_out_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Every fifth image of each class, standardized with the others, from scikit-learn's arrays."""
    bunch = load_digits()
    test = np.zeros(len(bunch.target), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(bunch.target == label)[::5]] = True
    rest = bunch.images[~test]
    images = (bunch.images[test] - rest.mean()) / rest.std()
    return torch.from_numpy(images[:, None]).float(), torch.from_numpy(bunch.target[test])


def write_cifar(folder: Path, n_train: int, n_test: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name, n in (("train", n_train), ("test", n_test)):
        content = {
            b"data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
            b"fine_labels": rng.integers(100, size=n).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(content))
    return folder


def test_a_run_leaves_two_rows_a_block_and_the_accuracy(run, trained, tmp_path):
    status, out, _ = run(
        *SMALL,
        "model.token_mixing.activation=relu",
        "trainer.enable_progress_bar=true",
        "hydra.run.dir=mine",
    )
    assert status == 0
    metrics = nerve.load_metrics(
        "mine", factors=["activation.name", "model.token_mixing.activation"]
    )
    assert (metrics.status == "ok").all()
    assert set(metrics["activation.name"]) == {"gelu"}
    assert set(metrics["model.token_mixing.activation"]) == {"relu"}
    for step in (0, 2, 4, 5):
        rows = metrics[metrics.step == step].set_index(["layer", "ffn"])
        mixings = ("token_mixing", "channel_mixing")
        assert sorted(rows.index) == sorted((i, name) for i in range(2) for name in mixings)
        # Samples are an image's channels for one, its patches for the other: 4 × 4 of 2 × 2 pixels.
        tokens, channels = rows.xs("token_mixing", level=1), rows.xs("channel_mixing", level=1)
        widths = ["d_in", "d_ff", "n_samples"]
        assert (tokens[widths] == [16, 24 // 2, N_TEST * 24]).all(axis=None)
        assert (channels[widths] == [24, 24 * 4, N_TEST * 16]).all(axis=None)
    assert set(metrics.step) == {0, 2, 4, 5}
    assert len(nerve.load_spectra("mine")) == 2 * len(metrics)
    assert metrics.groupby("step").tokens_seen.first().tolist() == [0, 100, 200, 250]

    images, labels = held_out_digits()
    (model,) = trained
    with torch.no_grad():
        logits = model.eval()(images)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    record = nerve.load_runs("mine").iloc[0]
    assert record["final.val_accuracy"] == pytest.approx(accuracy, rel=1e-6)
    loss = float(torch.nn.functional.cross_entropy(logits.double(), labels))
    assert record["final.val_loss"] == pytest.approx(loss, rel=1e-5)
    scalars = nerve.load_scalars("mine")
    accuracies = scalars[scalars.name == "val_accuracy"].set_index("step").value
    assert accuracies.index.tolist() == [2, 4, 5]
    assert accuracies[5] == pytest.approx(accuracy, rel=1e-6)

    assert f"validation accuracy: {accuracy:.4f}" in out
    assert re.search(r"0 token_mixing\s+\d.*\n.*0 channel_mixing\s+\d", out)
    assert re.search(r"images/s=[\d,]+", out)


def test_digits_are_learned_and_claim_1_holds_in_every_ffn(run):
    """Each nonlinearity spreads the variance: SE and PR rise, EEE falls. 80 steps of the preset,
    whose own number of steps reaches .98."""
    quiet = ["monitor.every_n_steps=80", "trainer.enable_progress_bar=false", "logger=none"]
    status, _, _ = run("model=mixer_tiny", "trainer.max_steps=80", "hydra.run.dir=mine", *quiet)
    assert status == 0
    assert nerve.load_runs("mine")["final.val_accuracy"][0] > 0.9
    metrics = nerve.load_metrics("mine")
    last = metrics[metrics.step == 80]
    assert len(last) == 8
    assert (last.se_post > last.se_pre).all()
    assert (last.pr_post > last.pr_pre).all()
    assert (last.eee_post < last.eee_pre).all()


def test_images_are_resized_and_other_optimizers_train_a_mixer(run):
    status, _, _ = run(
        *SMALL,
        "data.image_size=6",  # 3 × 3 patches of 2 × 2 pixels
        "data.n_heldout=40",
        "optimizer=sgd",
        "normalization=postln",
        "ffn=gated",
        "hydra.run.dir=mine",
    )
    assert status == 0
    metrics = nerve.load_metrics("mine")
    tokens = metrics[metrics.ffn == "token_mixing"]
    channels = metrics[metrics.ffn == "channel_mixing"]
    assert (tokens[["d_in", "n_samples"]] == [9, 40 * 24]).all(axis=None)
    assert (channels[["d_in", "n_samples"]] == [24, 40 * 9]).all(axis=None)
    assert (metrics.status == "ok").all()


def test_cifar_is_read_from_the_given_path(run, tmp_path):
    folder = write_cifar(tmp_path / "cifar-100-python", n_train=20, n_test=7)
    status, _, err = run(
        *SMALL,
        "data=cifar100",
        f"data.images.path={folder}",
        "data.batch_size=5",
        "model.patch_size=8",
        "trainer.max_steps=2",
        "hydra.run.dir=mine",
    )
    assert (status, err) == (0, "")
    metrics = nerve.load_metrics("mine")
    assert set(metrics[metrics.ffn == "token_mixing"].n_samples) == {7 * 24}
    assert set(metrics[metrics.ffn == "channel_mixing"].n_samples) == {7 * 16}
    block = (16 * 12 + 12) + (12 * 16 + 16) + (24 * 96 + 96) + (96 * 24 + 24) + 4 * 24
    embedding, head, norm = 3 * 64 * 24 + 24, 24 * 100 + 100, 2 * 24
    expected = embedding + 2 * block + norm + head
    assert nerve.load_runs("mine").n_parameters[0] == expected


BAD = [
    (["model.patch_size=3"], ["data.image_size=8", "model.patch_size=3"]),
    (["data.n_heldout=365"], ["data.n_heldout", "365", "364"]),
    (["data=cifar100", "data.images.path=/none.tar.gz"], ["there is no file /none.tar.gz"]),
    (["data=cifar100", "data.images.path={damaged}"], ["{damaged} is damaged or truncated"]),
]


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=lambda v: " ".join(v)[:50])
def test_unsuitable_images_fail_the_run_before_training(run, tmp_path, overrides, expected):
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(b"\x1f\x8b" + bytes(100))
    filled = [text.replace("{damaged}", str(damaged)) for text in overrides]
    quiet = ["trainer.enable_progress_bar=false", "threads=1"]
    status, out, err = run(*SMALL, *filled, *quiet)
    assert status == 1
    assert err.startswith("nerve-run: ")
    assert err.count("nerve-run: ") == 1
    assert "Traceback" not in err + out
    for text in expected:
        assert text.replace("{damaged}", str(damaged)) in err
    for record in tmp_path.glob("**/run.json"):
        values = json.loads(record.read_text())
        assert values["run_status"] == "failed"
        assert values["error"]["message"] in err
