"""Padding and positions that the mask or the shape of a batch does not show for the features of an
FFN: measured correctly, or refused."""

from typing import Any

import pytest
import torch
from by_hand import Plain, assert_measured
from torch import Tensor, nn

import nerve
from nerve.errors import MeasurementError

B, T, D, FF = 5, 6, 8, 20


class Net(nn.Module):
    """One FFN on tokens that `arrange` prepares; keeps its features."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, D)
        self.ffn = Plain(nn.Linear(D, FF), nn.Linear(FF, D)).double()

    def arrange(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.ffn(self.arrange(self.embedding(input_ids).double(), attention_mask))


class Registers(Net):
    def arrange(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return nn.functional.pad(x, (0, 0, 2, 0), value=3.0)


class Halved(Net):
    def arrange(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x[:, ::2]


class Unpadded(Net):
    def arrange(self, x: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return x[mask.bool()]


class BatchSecond(Net):
    def arrange(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x.transpose(0, 1)


class Windows(Net):
    def arrange(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x.reshape(-1, 3, D)


def seeded(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind().eval()


IDS = torch.randint(30, (B, T), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(B, T, dtype=torch.long)
MASK[1, 3:] = MASK[4, 2:] = 0
PADDED = {"input_ids": IDS, "attention_mask": MASK}


def features(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        pre = model.ffn.up(x)
        return pre, model.ffn.act(pre)


@pytest.mark.parametrize("kind", [Registers, Halved])
def test_padding_of_samples_that_are_not_the_tokens_is_refused(kind):
    model = seeded(kind)
    with pytest.raises(MeasurementError, match=r"registers, a prompt.*downsampled.*Give mask="):
        nerve.measure(model, [PADDED])
    full = {"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}
    with torch.no_grad():
        x = model.arrange(model.embedding(IDS).double(), None)
    (row,) = nerve.measure(model, [full]).to_dict("records")
    assert_measured(row, *features(model, x))


def test_such_samples_are_measured_with_a_mask_of_their_shape():
    model = seeded(Registers)

    def mask_of(batch: Any) -> Tensor:
        return nn.functional.pad(batch["attention_mask"], (2, 0), value=1)

    with torch.no_grad():
        x = model.arrange(model.embedding(IDS).double(), None)[mask_of(PADDED).bool()]
    (row,) = nerve.measure(model, [PADDED], mask=mask_of).to_dict("records")
    assert_measured(row, *features(model, x))


def test_a_model_that_drops_padding_itself_is_measured_without_a_mask():
    model = seeded(Unpadded)
    with pytest.raises(MeasurementError, match="drops padding itself, mask=lambda batch: None"):
        nerve.measure(model, [PADDED])
    (row,) = nerve.measure(model, [PADDED], mask=lambda batch: None).to_dict("records")
    with torch.no_grad():
        x = model.embedding(IDS).double()[MASK.bool()]
    assert_measured(row, *features(model, x))


BY_NAME = {"idx": IDS, "targets": IDS}
FORWARDS = {
    "tuple": ((IDS, IDS), lambda model, batch: model(batch[0])),
    "other names": (BY_NAME, lambda model, batch: model(batch["idx"])),
    "nested": ({"x": BY_NAME}, lambda model, batch: model(batch["x"]["idx"])),
}
SKIPPING: list[dict[str, Any]] = [{"skip_first": 1}, {"groups": ["halves"]}]


@pytest.mark.parametrize("how", SKIPPING)
@pytest.mark.parametrize("batch", FORWARDS)
@pytest.mark.parametrize("kind", [BatchSecond, Windows])
def test_positions_in_an_unknown_order_are_refused(tmp_path, kind, batch, how):
    """Of a batch whose tokens have no known name, features may lie in any order."""
    given, forward = FORWARDS[batch]
    with pytest.raises(MeasurementError, match=r"need samples \[sequence, position\]"):
        nerve.measure(seeded(kind), [given], forward=forward, into=tmp_path / "x", **how)


@pytest.mark.parametrize("batch", FORWARDS)
def test_positions_of_sequences_in_a_batch_of_any_kind_are_skipped(batch):
    model = seeded(Net)
    given, forward = FORWARDS[batch]
    (row,) = nerve.measure(model, [given], forward=forward, skip_first=1).to_dict("records")
    with torch.no_grad():
        x = model.embedding(IDS).double()[:, 1:]
    assert_measured(row, *features(model, x))


def test_positions_of_a_batch_without_tensors_are_refused():
    class Own:
        ids = IDS

    with pytest.raises(MeasurementError, match="got a Own without tensors"):
        nerve.measure(seeded(Net), [Own()], forward=lambda m, b: m(b.ids), skip_first=1)


PLACES = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(B, T)
PACKED = {
    "position_ids": {"input_ids": IDS, "position_ids": PLACES},
    "cu_seqlens": {"input_ids": IDS.reshape(1, -1), "cu_seqlens": torch.arange(0, B * T + 1, T)},
}


@pytest.mark.parametrize("how", [{"skip_first": 1}, {"groups": ["position"]}])
@pytest.mark.parametrize("name", PACKED)
def test_first_positions_of_packed_sequences_are_refused(tmp_path, name, how):
    with pytest.raises(MeasurementError, match=f"one sequence per row.*as {name} shows"):
        nerve.measure(seeded(Net), [PACKED[name]], forward=by_ids, into=tmp_path / "x", **how)


def by_ids(model: Net, batch: Any) -> Tensor:
    return model(batch["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padding_do_not_make_a_row_look_packed(side):
    mask = MASK if side == "right" else MASK.flip(1)
    places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    batch = {"input_ids": IDS, "attention_mask": mask, "position_ids": places}
    model = seeded(Net)
    (row,) = nerve.measure(model, [batch], forward=by_ids, skip_first=1).to_dict("records")
    with torch.no_grad():
        x = model.embedding(IDS).double()[mask.bool() & (mask.cumsum(1) > 1)]
    assert_measured(row, *features(model, x))


class OwnPadding(nn.Module):
    """Computes the mask of its padding from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, D)
        layer = nn.TransformerEncoderLayer(D, 2, FF, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)


PADDED_IDS = (IDS + 1) % 30 * MASK
WITH_ZEROS = PADDED_IDS + (PADDED_IDS == 0) * MASK
HIDDEN: dict[str, tuple[nn.Module, Any, Any]] = {
    "in a tuple": (Net(), (IDS, MASK), lambda model, batch: model(*batch)),
    "by another name": (
        Net(),
        {"tokens": IDS, "kept": MASK},
        lambda model, batch: model(batch["tokens"], attention_mask=batch["kept"]),
    ),
    "by the model": (OwnPadding(), WITH_ZEROS, None),
}


@pytest.mark.parametrize("source", ["measure", "heldout", "train"])
@pytest.mark.parametrize("name", HIDDEN)
def test_padding_that_only_the_model_sees_is_refused(tmp_path, name, source):
    """Its samples would count. In training, the names of the model's arguments show it."""
    model, batch, forward = HIDDEN[name]
    run = forward or (lambda model, batch: model(batch))
    how = {"ffns": nerve.find_ffns(model, batch, forward=run)}
    if source == "train" and name != "by the model":
        with nerve.watch(model, tmp_path, **how) as watched:
            run(model, batch).sum().backward()
            watched.step()
        assert nerve.load_metrics(tmp_path)["n_samples"].tolist() == [int(MASK.sum())]
        return

    def measured() -> None:
        if source == "measure":
            nerve.measure(model, [batch], forward=run, **how)
        elif source == "heldout":
            with nerve.watch(model, tmp_path, heldout=[batch], forward=run, **how):
                pass
        else:
            with nerve.watch(model.train(), tmp_path, **how):
                run(model, batch)

    with pytest.raises(MeasurementError, match="Padding must not be measured"):
        measured()
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_a_mask_that_excludes_nothing_or_is_causal_is_no_padding():
    model = seeded(Net)
    square = IDS[:, :B]
    for mask in (torch.ones_like(square), torch.ones(B, B).tril().long()):
        how = {"forward": lambda model, batch: model(*batch), "ffns": nerve.find_ffns(model, IDS)}
        rows = nerve.measure(model, [(square, mask)], **how)
        assert rows["n_samples"].tolist() == [B * B]


@pytest.mark.parametrize("given", [(IDS, MASK), ((IDS, IDS),)])
def test_a_loop_shows_the_order_of_positions_however_it_calls_its_model(tmp_path, given):
    """With several arguments, or with one that is a tuple."""

    class Taking(Net):
        def forward(self, first: Any, second: Any = None) -> Tensor:
            return super().forward(first if isinstance(first, Tensor) else first[0])

    torch.manual_seed(0)
    model = Taking()
    described = [nerve.FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    with nerve.watch(model, tmp_path, ffns=described, skip_first=1) as run:
        model(*given).sum().backward()
        run.step()
    with torch.no_grad():
        x = model.embedding(IDS).double()[:, 1:]
    assert_measured(nerve.load_metrics(tmp_path).iloc[0].to_dict(), *features(model, x))
