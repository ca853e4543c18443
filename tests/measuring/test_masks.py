"""Padding never counts: a mask applies to the tokens that it belongs to, or raises."""

import re

import pandas as pd
import pytest
import torch
from by_hand import Plain, values
from torch import Tensor, nn

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.forward import evaluating

N, T, D = 5, 5, 6
"""As many sequences as positions: shapes tell nothing."""


def ffn() -> Plain:
    return Plain(nn.Linear(D, 16), nn.Linear(16, D))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, D)


class EncoderDecoder(Model):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = ffn(), ffn()

    def forward(self, input_ids, decoder_input_ids, **masks) -> Tensor:
        x, y = self.embedding(input_ids), self.embedding(decoder_input_ids)
        return self.encoder(x).mean() + self.decoder(y)

    def ffns(self) -> list[FFNAdapter]:
        return [
            FFNAdapter(0, "encoder", self.encoder.up, self.encoder.down),
            FFNAdapter(0, "decoder", self.decoder.up, self.decoder.down),
        ]

    def pre(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x, y = (self.embedding(batch[name]) for name in ("input_ids", "decoder_input_ids"))
        return {"encoder": self.encoder.up(x).detach(), "decoder": self.decoder.up(y).detach()}


def tokens(seed: int) -> Tensor:
    return torch.randint(3, 30, (N, T), generator=torch.Generator().manual_seed(seed))


def padding(*lengths: int) -> Tensor:
    return (torch.arange(T) < torch.tensor(lengths)[:, None]).long()


def assert_counts(row: dict, features: Tensor) -> None:
    n, pr, variance = values(features)
    assert row["n_samples"] == n
    assert row["pr_pre"] == pytest.approx(pr, rel=1e-5)
    assert row["variance_pre"] == pytest.approx(variance, rel=1e-5)


def by_name(rows) -> dict[str, dict]:
    return {row["ffn"]: row for row in rows.to_dict("records")}


@pytest.mark.parametrize("with_decoders", [False, True])
def test_each_stream_has_its_own_padding_even_with_equal_lengths(with_decoders):
    model, mask = EncoderDecoder().double(), padding(5, 2, 1, 3, 1)
    batch = {"input_ids": tokens(1), "decoder_input_ids": tokens(2), "attention_mask": mask}
    if with_decoders:
        batch["decoder_attention_mask"] = padding(1, 5, 5, 4, 5)
    rows = by_name(nerve.measure(model, [batch], ffns=model.ffns()))
    features = model.pre(batch)
    decoder = batch.get("decoder_attention_mask", torch.ones(N, T))
    assert_counts(rows["encoder"], features["encoder"][mask.bool()])
    assert_counts(rows["decoder"], features["decoder"][decoder.bool()])


def test_one_mask_for_all_raises_if_an_ffn_receives_other_tokens():
    model, mask = EncoderDecoder(), padding(5, 2, 1, 3, 1)
    batch = {"input_ids": tokens(1), "decoder_input_ids": tokens(2), "attention_mask": mask}
    with pytest.raises(MeasurementError, match="decoder in layer 0 receives another one"):
        nerve.measure(model, [batch], ffns=model.ffns(), mask=lambda b: b["attention_mask"])


@pytest.mark.parametrize("by", ["name", "order"])
def test_each_ffn_can_have_its_own_mask(by):
    model, mask = EncoderDecoder().double(), padding(5, 2, 1, 3, 1)
    batch = {"input_ids": tokens(1), "decoder_input_ids": tokens(2)}
    masks = {"encoder": None, "decoder": mask} if by == "name" else [None, mask]
    rows = by_name(nerve.measure(model, [batch], ffns=model.ffns(), mask=lambda _: masks))
    features = model.pre(batch)
    assert_counts(rows["encoder"], features["encoder"])
    assert_counts(rows["decoder"], features["decoder"][mask.bool()])


@pytest.mark.parametrize(
    ("masks", "match"),
    [
        ({"encoder": None}, "one entry for each FFN name .* decoder, encoder; got encoder"),
        ({"encoder": None, "decoder": None, "x": None}, "got decoder, encoder, x"),
        ([None], "one entry for each FFN .*, 2; got 1"),
        ([None, torch.ones(N, T + 1)], r"decoder in layer 0 has samples \(5, 5\), the mask is"),
    ],
)
def test_masks_that_do_not_match_the_ffns_raise(masks, match):
    model = EncoderDecoder()
    batch = {"input_ids": tokens(1), "decoder_input_ids": tokens(2)}
    with pytest.raises(MeasurementError, match=match):
        nerve.measure(model, [batch], ffns=model.ffns(), mask=lambda _: masks)


class Ordered(Model):
    """One FFN whose tokens have a given order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.ffn, self.order = ffn(), order

    def forward(self, input_ids: Tensor, **masks: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.order.startswith("positions"):
            x = x.transpose(0, 1)
        return self.ffn(x.flatten(0, 1) if self.order.endswith("flat") else x)

    def pre(self, input_ids: Tensor) -> Tensor:
        return self.ffn.up(self.embedding(input_ids)).detach()


ORDERS = ["sequences", "sequences, flat", "positions", "positions, flat"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_mask_follows_the_order_of_the_tokens(order, explicit):
    model, mask = Ordered(order).double(), padding(5, 2, 1, 3, 1)
    batch = {"input_ids": tokens(1), "attention_mask": mask}
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    given = {"mask": lambda b: b["attention_mask"]} if explicit else {}
    (row,) = nerve.measure(model, [batch], ffns=ffns, **given).to_dict("records")
    assert_counts(row, model.pre(batch["input_ids"])[mask.bool()])


@pytest.mark.parametrize("order", ORDERS)
def test_first_positions_special_tokens_and_unlabeled_tokens_are_excluded(order):
    model, mask = Ordered(order).double(), padding(5, 4, 5, 3, 1)
    ids = tokens(1)
    labels = ids.masked_fill(
        torch.rand(N, T, generator=torch.Generator().manual_seed(0)) > 0.8, -100
    )
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    special = ids[0, 2].item()
    (row,) = nerve.measure(
        model, [batch], ffns=ffns, exclude=[special], only_labeled=True, skip_first=1
    ).to_dict("records")
    counts = mask.bool() & (ids != special) & (labels != -100) & (torch.arange(T) >= 1)
    assert_counts(row, model.pre(ids)[counts])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("explicit", [False, True])
def test_first_positions_are_those_after_left_padding(order, explicit):
    """Equally many tokens of a sequence are skipped on whichever side it is padded."""
    model, left = Ordered(order).double(), padding(5, 4, 5, 3, 1).flip(1)
    ids = tokens(1)
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    batch = {"input_ids": ids, "attention_mask": left}
    given = {"mask": lambda b: b["attention_mask"]} if explicit else {}
    (row,) = nerve.measure(model, [batch], ffns=ffns, skip_first=2, **given).to_dict("records")
    assert_counts(row, model.pre(ids)[left.cumsum(1) > 2])


@pytest.mark.parametrize("is_padded", [False, True])
def test_samples_that_a_mask_excludes_are_no_padding_if_the_batch_shows_its_padding(is_padded):
    """A mask of completions, whose prompts hold the first positions, equals `only_labeled`."""
    model, ids = Ordered("sequences").double(), tokens(1)
    shown = padding(5, 4, 5, 3, 2).flip(1) if is_padded else torch.ones_like(ids)
    labels = ids.masked_fill(torch.arange(T) < 3, -100)
    batch = {"input_ids": ids, "attention_mask": shown, "labels": labels}
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]

    def completion(batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != -100) & batch["attention_mask"].bool()

    for how in ({"only_labeled": True}, {"mask": completion}):
        (row,) = nerve.measure(model, [batch], ffns=ffns, skip_first=1, **how).to_dict("records")
        counts = (labels != -100) & (shown.cumsum(1) > 1)
        assert_counts(row, model.pre(ids)[counts])


@pytest.mark.parametrize("attention", ["additive", "of pairs"])
def test_an_attention_mask_that_shows_no_padding_leaves_it_to_the_mask_of_the_caller(attention):
    model, ids = Ordered("sequences").double(), tokens(1)
    left = padding(3, 4, 5, 3, 1).flip(1)
    shown = torch.where(left == 1, 0.0, -torch.inf)
    batch = {"input_ids": ids, "kept": left}
    batch["attention_mask"] = shown if attention == "additive" else left[:, None, None].bool()
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    (row,) = nerve.measure(
        model, [batch], ffns=ffns, skip_first=1, mask=lambda batch: batch["kept"]
    ).to_dict("records")
    assert_counts(row, model.pre(ids)[left.cumsum(1) > 1])


@pytest.mark.parametrize("skip_first", [0, 1])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("explicit", [False, True])
def test_positions_are_those_of_the_sequence_whichever_tokens_count(explicit, side, skip_first):
    """`position_ratio` of tokens that count at random places, as in a masked language model, is
    that of the places at which they are."""
    generator = torch.Generator().manual_seed(5)
    model, n = Ordered("positions, flat").double(), 60
    first = torch.zeros(n, T, dtype=torch.long)
    first[:, skip_first] = 1  # a token that stands out, at one position
    lengths = torch.randint(3, T + 1, (n,), generator=generator) if side != "none" else T
    shown = (torch.arange(T) < torch.as_tensor(lengths).reshape(-1, 1)).expand(n, T).long()
    ids = torch.where(first == 1, 1, torch.randint(3, 30, (n, T), generator=generator))
    with torch.no_grad():
        model.embedding.weight[1] *= 20
    labels = ids.masked_fill(torch.rand(n, T, generator=generator) > 0.5, -100)
    counts = shown.bool() & (labels != -100) & (torch.arange(T) >= skip_first)
    pre = model.pre(ids)
    squares = (pre - pre[counts].mean(0)).square().sum(-1).where(counts, 0)
    expected = (squares.sum(0) / counts.sum(0)).nan_to_num().max() / squares[counts].mean()
    if side == "left":
        rolls = (T - shown.sum(1))[:, None]
        back = (torch.arange(T)[None] - rolls) % T
        ids, labels, shown = (each.gather(1, back) for each in (ids, labels, shown))
    batch = {"input_ids": ids, "attention_mask": shown, "labels": labels}
    how = {"only_labeled": True}
    if explicit:
        how = {"mask": lambda b: (b["labels"] != -100) & b["attention_mask"].bool()}
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    (row,) = nerve.measure(model, [batch], ffns=ffns, skip_first=skip_first, **how).to_dict(
        "records"
    )
    assert row["n_samples"] == counts.sum()
    assert row["position_ratio_pre"] == pytest.approx(float(expected), rel=1e-9)


def test_so_they_are_of_a_bare_batch_whose_mask_the_caller_gives():
    """There, the mask is all that shows the padding."""
    model, left = Ordered("sequences").double(), padding(5, 4, 5, 3, 1).flip(1)
    ids = tokens(1)
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    (row,) = nerve.measure(model, [ids], ffns=ffns, skip_first=2, mask=lambda batch: left).to_dict(
        "records"
    )
    assert_counts(row, model.pre(ids)[left.cumsum(1) > 2])


def test_a_model_that_views_its_labels_is_traced():
    """Like T5, which requires contiguous labels."""

    class Viewing(EncoderDecoder):
        def forward(self, input_ids, labels, **masks) -> Tensor:
            ids = labels.view(-1).clamp(min=0).view(labels.shape)
            return super().forward(input_ids, ids, **masks)

    model = Viewing().double()
    mask = padding(5, 4, 5, 3, 1)
    batch = {"input_ids": tokens(1), "attention_mask": mask, "labels": tokens(2)}
    rows = nerve.measure(model, [batch], ffns=model.ffns()).set_index("ffn")
    assert_counts(
        rows.loc["encoder"].to_dict(),
        model.encoder.up(model.embedding(tokens(1)))[mask.bool()].detach(),
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_padding_of_tokens_in_several_parts_raises(axis):
    """For a model that splits its batches or sequences; without padding, all samples count."""

    class Parts(Ordered):
        def forward(self, input_ids, **others) -> Tensor:
            x = self.embedding(input_ids)
            return torch.cat([self.ffn(part) for part in x.split(1, axis)], axis)

    model = Parts("sequences").double()
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down, n_runs=None)]
    batch = {"input_ids": tokens(1), "attention_mask": padding(5, 4, 5, 3, 1)}
    with pytest.raises(MeasurementError, match="several parts, whose order is unknown"):
        nerve.measure(model, [batch], ffns=ffns)
    (row,) = nerve.measure(model, [{"input_ids": tokens(1)}], ffns=ffns).to_dict("records")
    assert_counts(row, model.pre(tokens(1)))


@pytest.mark.parametrize("padded", [False, True])
def test_positions_are_those_of_sequences_in_any_layout(padded):
    """`position_ratio` is the same with sequences or positions first, flattened or not."""
    ids = torch.randint(3, 30, (20, T), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(20, T, dtype=torch.long)
    mask[3, 4] = 1 - padded
    found = []
    for order in ORDERS:
        model = Ordered(order).double()
        ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
        rows = nerve.measure(model, [{"input_ids": ids, "attention_mask": mask}], ffns=ffns)
        found.append(rows.position_ratio_post.item())
    assert found == pytest.approx([found[0]] * 4, rel=1e-9)
    assert found[0] > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("given", ["a bare tensor", "a mask that is None", "bare features"])
def test_first_positions_are_those_of_sequences_in_any_batch_format(order, given):
    """With as many sequences as positions, only a forward pass shows which axis is which."""
    model, ids = Ordered(order).double(), tokens(1)
    how = {"ffns": [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)], "skip_first": 1}
    expected, batch = model.pre(ids)[:, 1:], ids
    if given == "a mask that is None":
        batch, how["mask"] = {"input_ids": ids}, lambda batch: None
    elif given == "bare features":
        batch, model.embedding = model.embedding(ids).detach(), nn.Identity()
    (row,) = nerve.measure(model, [batch], **how).to_dict("records")
    assert_counts(row, expected)


def test_two_streams_of_three_tokens_keep_their_order():
    """If a stream were cut to one position, sequences and positions would look alike."""

    class Both(EncoderDecoder):
        def forward(self, input_ids, decoder_input_ids, **masks) -> Tensor:
            x, y = (self.embedding(ids).transpose(0, 1) for ids in (input_ids, decoder_input_ids))
            return self.encoder(x).mean() + self.decoder(y)

    model = Both().double()
    ids = tokens(1)[:3, :3]
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    batch |= {"attention_mask": mask, "decoder_attention_mask": mask.flip(0)}
    rows = by_name(nerve.measure(model, [batch], ffns=model.ffns()))
    pre = model.pre(batch)
    assert_counts(rows["encoder"], pre["encoder"][mask.bool()])
    assert_counts(rows["decoder"], pre["decoder"][mask.flip(0).bool()])
    two = {name: value[:, :2] for name, value in batch.items()}
    two["attention_mask"] = two["decoder_attention_mask"] = torch.tensor([[1, 1], [1, 0], [1, 1]])
    with pytest.raises(MeasurementError, match="at least three tokens"):
        nerve.measure(model, [two], ffns=model.ffns())


@pytest.mark.parametrize("value", [-torch.inf, -1e9, 2])
def test_masks_contain_only_0_and_1(value):
    model = Ordered("sequences")
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    additive = torch.zeros(N, T).masked_fill(padding(5, 2, 1, 3, 1) == 0, value)
    additive[0, 0] = 1 if value == 2 else 0
    text = re.escape("1 (or True) for the samples that count and 0 for padding")
    for mask in (None, lambda b: b["attention_mask"]):
        batch = {"input_ids": tokens(1), "attention_mask": additive}
        with pytest.raises(MeasurementError, match=text):
            nerve.measure(model, [batch], ffns=ffns, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_may_have_any_dtype(dtype):
    model, mask = Ordered("sequences").double(), padding(5, 2, 1, 3, 1)
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    batch = {"input_ids": tokens(1), "attention_mask": mask.to(dtype)}
    (row,) = nerve.measure(model, [batch], ffns=ffns).to_dict("records")
    assert_counts(row, model.pre(batch["input_ids"])[mask.bool()])


class WithImages(Model):
    """Patches of an image next to the text, as many as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.vision = ffn(), ffn()

    def forward(self, input_ids, pixels, attention_mask) -> Tensor:
        return self.ffn(self.embedding(input_ids)) + self.vision(pixels).mean()


def test_a_mask_of_tokens_does_not_apply_to_patches():
    model, mask = WithImages().double(), padding(5, 2, 1, 3, 1)
    pixels = torch.randn(N, T, D, dtype=torch.float64)
    batch = {"input_ids": tokens(1), "pixels": pixels, "attention_mask": mask}
    ffns = [
        FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down),
        FFNAdapter(0, "vision", model.vision.up, model.vision.down),
    ]
    rows = by_name(nerve.measure(model, [batch], ffns=ffns))
    assert rows["ffn"]["n_samples"] == mask.sum()
    assert rows["vision"]["n_samples"] == N * T


class Fixed(Ordered):
    def forward(self, input_ids: Tensor, **masks: Tensor) -> Tensor:
        if input_ids.shape[1] != T:
            raise ValueError("this model takes 5 positions")
        return super().forward(input_ids)


def test_a_model_that_cannot_run_on_the_trace_raises_with_the_fix():
    model = Fixed("sequences")
    batch = {"input_ids": tokens(1), "attention_mask": padding(5, 2, 1, 3, 1)}
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    with pytest.raises(MeasurementError, match=r"this model takes 5 positions.* with mask="):
        nerve.measure(model, [batch], ffns=ffns)
    rows = nerve.measure(model, [batch], ffns=ffns, mask=lambda b: [b["attention_mask"]])
    assert rows.n_samples.item() == 12


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_of_a_torch_transformer_is_excluded(batch_first):
    """Its fast path would bypass its modules and pack the tokens into nested tensors. With the
    batch first, its mask is found in the batch; otherwise it is given in the layout of the
    features."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 16, 0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).double().eval()
    x, mask = torch.randn(N, T, D).double(), padding(5, 2, 1, 3, 5)
    src = x if batch_first else x.transpose(0, 1)
    lying = mask if batch_first else mask.T
    ffns = [FFNAdapter(i, "ffn", each.linear1, each.linear2) for i, each in enumerate(model.layers)]
    batch = {"src": src, "src_key_padding_mask": mask == 0}
    given = {} if batch_first else {"mask": lambda _: {"ffn": lying}}
    rows = nerve.measure(model, [batch], ffns=ffns, **given)
    expected: list[Tensor] = []
    for each in model.layers:
        each.linear1.register_forward_hook(lambda module, args, output: expected.append(output))
    model.enable_nested_tensor = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    for row, features in zip(rows.to_dict("records"), expected, strict=True):
        assert_counts(row, features[lying.bool()])


@pytest.mark.parametrize("has_encoder", [True, False])
def test_padding_of_a_torch_decoder_is_excluded(has_encoder):
    """Beside an encoder with padding of its own; and alone, with what an encoder has returned."""
    torch.manual_seed(0)
    x, y = torch.randn(N, T + 2, D).double(), torch.randn(N, T, D).double()
    masks = torch.arange(T + 2) < torch.tensor([7, 2, 4, 7, 1])[:, None], padding(5, 2, 1, 3, 5)
    given = {"tgt": y, "tgt_key_padding_mask": masks[1] == 0}
    if has_encoder:
        model = nn.Transformer(D, 2, 1, 1, 16, batch_first=True).double()
        ffns, counts = [model.encoder.layers[0], model.decoder.layers[0]], masks
        given |= {"src": x, "src_key_padding_mask": masks[0] == 0}
    else:
        layer = nn.TransformerDecoderLayer(D, 2, 16, batch_first=True)
        model = nn.TransformerDecoder(layer, 2).double()
        ffns, counts = [*model.layers], (masks[1], masks[1])
        given |= {"memory": x, "memory_key_padding_mask": masks[0] == 0}
    kept: list[Tensor] = []
    rows = nerve.measure(model, [given]).to_dict("records")
    for each in ffns:
        each.linear1.register_forward_hook(lambda module, args, output: kept.append(output))
    with evaluating(model):
        model(**given)
    for row, features, mask in zip(rows, kept, counts, strict=True):
        assert_counts(row, features[mask.bool()])


def test_exclude_needs_token_ids_and_excludes_mask():
    model = Ordered("sequences")
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)]
    with pytest.raises(MeasurementError, match="need batches that are mappings"):
        nerve.measure(model, [tokens(1)], ffns=ffns, exclude=[3])
    with pytest.raises(MeasurementError, match="needs labels of the same shape as its tokens"):
        nerve.measure(model, [{"input_ids": tokens(1)}], ffns=ffns, only_labeled=True)
    embedded = {"inputs_embeds": torch.randn(N, T, D)}
    with pytest.raises(MeasurementError, match="needs input_ids; got none"):
        nerve.measure(model, [embedded], ffns=ffns, exclude=[3])
    with pytest.raises(MeasurementError, match="Leave out one or the other"):
        nerve.measure(model, [tokens(1)], ffns=ffns, exclude=[3], mask=lambda _: None)


def test_a_wrong_description_raises_the_same_error_with_any_mask():
    """Even if the trace, which is only needed for a mask, is the first to notice it."""
    model = EncoderDecoder()
    mask = padding(5, 2, 1, 3, 1)
    batch = {"input_ids": tokens(1), "decoder_input_ids": tokens(2), "attention_mask": mask}
    ffns = [FFNAdapter(0, "x", model.encoder.up, model.decoder.down)]
    with pytest.raises(MeasurementError, match="depend on pre only through the nonlinearity"):
        nerve.measure(model, [batch], ffns=ffns, mask=lambda b: [b["attention_mask"]])


def test_batches_with_other_streams_raise():
    model, mask = EncoderDecoder(), padding(5, 2, 1, 3, 1)
    batch = {"input_ids": tokens(1), "decoder_input_ids": tokens(2), "attention_mask": mask}
    embedded = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    ffns = model.ffns()
    with pytest.raises(MeasurementError, match="the same token streams"):
        nerve.measure(model, [batch, embedded], ffns=ffns)


class Rare(Ordered):
    """Runs its FFN only if there are more than two sequences."""

    def forward(self, input_ids: Tensor, **masks: Tensor) -> Tensor:
        return super().forward(input_ids) if len(input_ids) > 2 else input_ids


@pytest.mark.parametrize("explicit", [False, True])
def test_an_ffn_of_unknown_order_raises_with_a_mask(explicit):
    model, ids = Rare("positions, flat"), tokens(1)
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down, n_runs=None)]
    batch = {"input_ids": ids, "attention_mask": padding(5, 2, 1, 3, 1)}
    mask = (lambda b: b["attention_mask"]) if explicit else None
    with pytest.raises(MeasurementError, match="did not run on the two short sequences"):
        nerve.measure(model, [batch], ffns=ffns, mask=mask)
    assert nerve.measure(model, [{"input_ids": ids}], ffns=ffns).n_samples.item() == N * T
    few = {name: value[:2] for name, value in batch.items()}
    assert nerve.measure(model, [few], ffns=ffns, mask=mask).n_samples.item() == 0


@pytest.mark.parametrize("sizes", [(0, T), (N, 0)])
def test_an_empty_first_batch_has_no_samples_and_shows_no_order(sizes):
    model = ffn()
    empty, full = torch.zeros(*sizes, D), torch.randn(N, T, D)
    how = {"ffns": [FFNAdapter(0, "ffn", model.up, model.down)]}
    alone = nerve.measure(model, [full], **how)
    pd.testing.assert_frame_equal(nerve.measure(model, [empty, full], **how), alone)
    with pytest.raises(MeasurementError, match=r"it must have tokens; got .* Put a batch with"):
        nerve.measure(model, [empty, full], skip_first=1, **how)
