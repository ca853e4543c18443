"""The part of a Lightning module that takes its batches shows which of their tokens count."""

import lightning as L
import pytest
import torch
from mixtures import batches_of, model_of
from support import Batches
from torch import Tensor

import nerve


class Mixture(L.LightningModule):
    """Itself, it takes no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of("mixtral")
        self.model.set_experts_implementation("eager")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).last_hidden_state.square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


# It is in eval mode, as for `nerve.measure`.
@pytest.mark.filterwarnings("ignore:.*module.* in eval mode")
def test_padding_of_stacked_experts_does_not_count(tmp_path):
    pytest.importorskip("transformers", minversion="5", reason="earlier ones stack no experts")
    module, batches = Mixture(), batches_of(padded=True)
    ffns = nerve.find_ffns(module.model, batches[0])
    expected = nerve.measure(module.model, batches, ffns=ffns)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[nerve.SpectralMonitor(tmp_path, ffns=ffns, every_n_steps=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(batches), Batches(batches))
    rows = nerve.load_metrics(tmp_path).query("step == 0")
    assert rows["n_samples"].tolist() == expected["n_samples"].tolist()
