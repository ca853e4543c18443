"""A user's LightningModule is measured at its own updates, or the fit says that it is not."""

import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from processes import together
from support import Batches, KeepWeights
from torch import Tensor, nn

import nerve
from nerve.errors import ConfigError, MeasurementError

N_BATCHES = 8
METRICS = ["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"]


class Net(nn.Module):
    """One residual FFN between two projections."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Module(L.LightningModule):
    """Returns the loss of a batch of pairs in the requested form."""

    def __init__(self, returns: str = "mapping") -> None:
        super().__init__()
        self.model = Net()
        self.returns = returns

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> object:
        return self.told(self.loss(batch), batch)

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> object:
        return self.told(self.loss(batch), batch)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.model(batch[0]) - batch[1]).square().mean()

    def told(self, loss: Tensor, batch: tuple[Tensor, Tensor]) -> object:
        mapping = {"loss": loss, "n_targets": batch[1].numel()}
        return {"mapping": mapping, "tensor": loss, "loss": {"loss": loss}, "none": None}[
            self.returns
        ]

    def configure_optimizers(self) -> object:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TwoOptimizers(Module):
    """Both optimizers step once per batch, like those of two parts of one model."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> object:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return self.told(self.loss(batch).detach(), batch)  # after an update: not measured

    def configure_optimizers(self) -> object:
        parts = self.model.up, self.model.down
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]


class OwnAccumulation(Module):
    """Steps after every second batch, also with an optimizer that Lightning does not wrap."""

    def __init__(self, is_wrapped: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.is_wrapped = is_wrapped

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> object:
        loss = self.loss(batch)
        loss.backward()
        optimizer = self.optimizers(use_pl_optimizer=self.is_wrapped)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss, "n_targets": batch[1].numel()}


def pairs(n: int = N_BATCHES, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    values = torch.randn(n, 2, 32, 4, generator=torch.Generator().manual_seed(seed))
    return [(x, y) for x, y in values]


def fit(directory: Path, module: L.LightningModule, *loaders, trainer=None, **monitor) -> list[int]:
    """Trains over the batches once; returns the measured steps."""
    options = {"max_epochs": 1, "callbacks": []} | (trainer or {})
    options["callbacks"] = [nerve.SpectralMonitor(directory, **monitor), *options["callbacks"]]
    fitted = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    fitted.fit(module, *(loaders or (Batches(pairs()), Batches(pairs(2, seed=9)))))
    return nerve.load_metrics(directory)["step"].tolist()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(
    ("loaders", "trainer"),
    [
        ((Batches(pairs()),), {}),
        ((Batches(pairs()), Batches(pairs(2))), {"limit_val_batches": 0}),
    ],
    ids=["no loader", "limited to none"],
)
def test_a_fit_without_validation_measures_training_and_refuses_held_out(
    tmp_path, loaders, trainer
):
    with pytest.raises(ConfigError, match=r"measures the validation batches.*source='train'"):
        fit(tmp_path / "held-out", Module(), *loaders, trainer=trainer, every_n_steps=3)
    where = tmp_path / "train"
    steps = fit(where, Module(), *loaders, trainer=trainer, every_n_steps=3, source="train")
    assert steps == [0, 3, 6]
    rows = nerve.load_metrics(where)
    assert rows["val_loss"].isna().all()
    assert rows["train_loss"].isna().tolist() == [True, False, False]


@pytest.mark.filterwarnings("ignore:Total length of")  # Lightning's own word of it
def test_an_empty_validation_loader_is_refused_before_the_first_step(tmp_path):
    kept = KeepWeights()
    with pytest.raises(ConfigError, match=r"first validation loader, which has none"):
        fit(
            tmp_path,
            Module(),
            Batches(pairs()),
            Batches(()),
            trainer={"callbacks": [kept]},
            every_n_steps=3,
        )
    assert not kept.after


@pytest.mark.parametrize("source", ["heldout", "train"])
@pytest.mark.parametrize("name", ["two", "own", "bypassing"])
def test_labels_count_updates_of_the_weights(tmp_path, name, source):
    """With two optimizers, with manual accumulation, and with an optimizer step that Lightning does
    not see."""
    module = {
        "two": TwoOptimizers,
        "own": OwnAccumulation,
        "bypassing": lambda: OwnAccumulation(is_wrapped=False),
    }[name]()
    after: list[dict[str, Tensor]] = []

    class Keep(L.Callback):
        def on_train_start(self, *args):
            self.on_train_batch_end()

        def on_train_batch_end(self, *args):
            weights = {k: v.clone() for k, v in module.model.state_dict().items()}
            if not after or any(not torch.equal(v, after[-1][k]) for k, v in weights.items()):
                after.append(weights)

    steps = fit(tmp_path, module, trainer={"callbacks": [Keep()]}, every_n_steps=3, source=source)
    n, each = (8, 1) if name == "two" else (4, 2)
    assert len(after) == n + 1, "training was cut off"
    cadence = [step for step in range(n) if step % 3 == 0]
    assert steps == (cadence if source == "train" else [*cadence, n])
    rows = nerve.load_metrics(tmp_path).set_index("step")
    for step in steps:
        module.model.load_state_dict(after[step])
        batches = pairs()[each * step : each * (step + 1)] if source == "train" else pairs(2, 9)
        by_hand = nerve.measure(module.model, [x for x, _ in batches]).iloc[0]
        np.testing.assert_array_equal(rows.loc[step, METRICS].astype(float), by_hand[METRICS])
    assert rows["lr"].tolist() == [0.1] * len(rows)
    if name != "two":
        assert rows.loc[3, "tokens_seen"] == 3 * 2 * 32 * 4


def test_a_manual_fit_goes_on_from_its_checkpoint_with_its_own_count(tmp_path):
    """Lightning's number is twice that."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.fit_loop.total_batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "five.ckpt")

    class Resumable(Batches):
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    for path in (None, tmp_path / "five.ckpt"):
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=1,
            callbacks=[nerve.SpectralMonitor(tmp_path, every_n_steps=3), Save()],
        )
        loaders = Resumable(pairs()), Batches(pairs(2, seed=9))
        trainer.fit(TwoOptimizers(), *loaders, ckpt_path=path)
        rows = nerve.load_metrics(tmp_path)
        assert rows["step"].tolist() == [0, 3, 6, 8]


class BuildsLate(Module):
    """Builds its model, or only something next to it, when Lightning asks for it."""

    def __init__(self, before: nn.Module | None, late: nn.Module) -> None:
        super().__init__()
        self.model, self._late = before, [late]

    def configure_model(self) -> None:
        if self._late:
            setattr(self, "model" if self.model is None else "late", self._late.pop())


@pytest.mark.parametrize("before", [None, Net()])
def test_ffns_that_are_built_after_the_search_are_not_left_out_silently(tmp_path, before):
    message = "FFNs are found before setup and configure_model" + (
        r".* also those that end with late\.down\. Build"
        if before
        else ".*Build the model in __init__"
    )
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, BuildsLate(before, Net()))
    assert not [*tmp_path.rglob("*.parquet")]


def test_a_head_may_be_built_after_the_search(tmp_path):
    fit(tmp_path, BuildsLate(Net(), nn.Linear(4, 3)))
    assert set(nerve.load_metrics(tmp_path)["ffn"]) == {"ffn"}


def test_of_several_validation_loaders_the_first_is_measured(tmp_path):
    one, other = Batches(pairs(2, seed=9)), Batches(pairs(3, seed=8))
    fit(tmp_path / "one", Module(), Batches(pairs()), one, every_n_steps=4)
    with pytest.warns(UserWarning, match="a single validation loader, the first of these 2"):
        fit(tmp_path / "two", Module(), Batches(pairs()), [one, other], every_n_steps=4)
    one, two = (nerve.load_metrics(tmp_path / name) for name in ("one", "two"))
    columns = ["step", "n_samples", "val_loss", *METRICS]
    np.testing.assert_array_equal(one[columns], two[columns])


def test_losses_are_as_known_as_the_steps_tell(tmp_path):
    """A tensor or an entry `loss` is a mean with weight 1; without a loss, none is stored."""
    rows = {}
    for returns in ("mapping", "tensor", "loss", "none"):
        module = Module(returns)
        if returns == "none":  # which Lightning takes as a step without a backward pass
            module.training_step = lambda batch, batch_idx: None
            warnings.filterwarnings("ignore", "`training_step` returned `None`")
        fit(tmp_path / returns, module, every_n_steps=4)
        rows[returns] = nerve.load_metrics(tmp_path / returns)
    assert rows["mapping"]["tokens_seen"].tolist() == [0, 4 * 128, 8 * 128]
    for returns in ("tensor", "loss"):
        assert (rows[returns]["tokens_seen"] == 0).all()
        losses = ["train_loss", "val_loss", "pr_post"]
        np.testing.assert_allclose(rows[returns][losses], rows["mapping"][losses], rtol=1e-12)
    assert rows["none"][["train_loss", "val_loss"]].isna().all(axis=None)
    assert (rows["none"]["status"] == "ok").all()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("source", ["heldout", "train"])
@pytest.mark.parametrize(
    ("monitor", "expected"),
    [
        ({"every_n_steps": None, "steps": [5, 0, 1]}, [0, 1, 5]),
        ({"every_n_steps": 3, "steps": [1, 100]}, [0, 1, 3, 6]),
        ({"every_n_steps": None, "steps": "log:4"}, [0, 1, 2, 4]),
        ({"every_n_steps": None, "steps": [2]}, [2]),
    ],
    ids=["list", "union", "log", "not at first"],
)
def test_steps_are_measured_wherever_they_lie(tmp_path, monitor, expected, source, accumulate):
    loaders = Batches(pairs(N_BATCHES * accumulate)), Batches(pairs(2, seed=9))
    trainer = {"accumulate_grad_batches": accumulate}
    steps = fit(tmp_path, Module(), *loaders, trainer=trainer, source=source, **monitor)
    assert steps == (expected if source == "train" else [*expected, N_BATCHES])
    rows = nerve.load_metrics(tmp_path)
    assert rows["tokens_seen"].tolist() == [step * accumulate * 128 for step in steps]
    assert (rows["n_samples"] == (32 * accumulate if source == "train" else 64)).all()


@pytest.mark.filterwarnings("ignore:Runs without metrics")
def test_steps_that_are_never_reached_are_said_at_the_start_or_at_the_end(tmp_path):
    """At the end if the number of updates is not known in advance."""
    never = {"every_n_steps": None, "steps": [50], "source": "train"}
    kept = KeepWeights()
    with pytest.raises(ConfigError, match=r"would measure nothing: it ends at step 8"):
        fit(tmp_path / "a", Module(), trainer={"callbacks": [kept]}, **never)
    assert not kept.after
    with pytest.warns(UserWarning, match="measured nothing in 4 weight updates"):
        fit(tmp_path / "b", OwnAccumulation(), **never)
    with pytest.raises(ConfigError, match=r"log:4 needs the last step.*Give a list"):
        fit(tmp_path / "c", OwnAccumulation(), every_n_steps=None, steps="log:4")


def in_two_processes(rank: int, folder: str) -> None:
    for source in ("heldout", "train"):
        directory = Path(folder, source)
        monitor = nerve.SpectralMonitor(directory, every_n_steps=None, steps=[1, 3], source=source)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_steps=4,
            accumulate_grad_batches=2,
            use_distributed_sampler=False,
            callbacks=[monitor],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        half = slice(16 * rank, 16 * (rank + 1))
        train = Batches((x[half], y[half]) for x, y in pairs())
        trainer.fit(Module(), train, Batches(pairs(2, seed=9)))


def test_steps_are_measured_in_two_processes_that_accumulate(tmp_path):
    together(in_two_processes, 2, tmp_path)
    for source, steps in (("heldout", [1, 3, 4]), ("train", [1, 3])):
        rows = nerve.load_metrics(tmp_path / source)
        assert rows["step"].tolist() == steps
        assert rows["n_samples"].tolist() == [64] * len(steps)
        one = {"trainer": {"accumulate_grad_batches": 2}, "source": source}
        fit(tmp_path / f"{source}-one", Module(), every_n_steps=None, steps=[1, 3], **one)
        alone = nerve.load_metrics(tmp_path / f"{source}-one")
        columns = ["step", "tokens_seen", "train_loss", "val_loss", *METRICS]
        np.testing.assert_allclose(rows[columns], alone[columns], rtol=1e-4)


class Language(nn.Module):
    """Tokens and their mask as keyword arguments, as in transformers models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.net, self.head = nn.Embedding(9, 4), Net(), nn.Linear(4, 9)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.head(self.net(self.embed(input_ids)))
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss}


class Fitted(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Language()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> object:
        return self.model(**batch)

    validation_step = training_step

    def configure_optimizers(self) -> object:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("source", ["heldout", "train"])
@pytest.mark.parametrize(
    "how", [{}, {"exclude": [0, 3]}, {"only_labeled": True}, {"exclude": [1], "skip_first": 1}]
)
def test_the_tokens_that_count_are_those_of_measure(tmp_path, source, how):
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()
    tokens = torch.randint(9, (3, 8), generator=torch.Generator().manual_seed(3))
    labels = tokens.masked_fill((mask == 0) | (tokens > 6), -100)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    expected = nerve.measure(Language(), [batch], **how).iloc[0]
    assert expected["n_samples"] < 24
    loaders = Batches([batch]), Batches([batch])
    fit(tmp_path, Fitted(), *loaders, every_n_steps=9, source=source, **how)
    row = nerve.load_metrics(tmp_path).iloc[0]
    assert row["n_samples"] == expected["n_samples"]
    np.testing.assert_allclose(row[METRICS].astype(float), expected[METRICS].astype(float), 1e-6)


def test_tokens_cannot_be_left_out_of_batches_that_do_not_name_them(tmp_path):
    with pytest.raises(MeasurementError, match=r"need batches that are mappings"):
        fit(tmp_path, Module(), every_n_steps=9, exclude=[0])
