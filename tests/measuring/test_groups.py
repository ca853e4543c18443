"""Groups and sites against NumPy: the group of each sample, and the spectrum of each group."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nerve
from nerve.errors import ConfigError, MeasurementError
from nerve.measuring.groups import REST, Divider, Grouped, frequency_classes
from nerve.measuring.streams import count_tokens
from nerve.models.gpt import GPT, GPTConfig
from nerve.nn.normalization import Normalization
from nerve.sites_and_groups import GROUPINGS

COUNTS = torch.tensor([40, 30, 10, 10, 5, 3, 1, 0])
ALL = tuple(GROUPINGS)


def by_hand(x: np.ndarray) -> dict[str, float]:
    """SE, PR, EEE and variance of samples `[N, D]`, from NumPy's eigenvalues."""
    values = np.linalg.eigvalsh(np.cov(x, rowvar=False)).clip(0)[::-1]
    p = values / values.sum()
    some = p[p > 0]
    cumulative = np.cumsum(p)
    steps = np.arange(1, len(p) + 1) / len(p)
    return {
        "se": -(some * np.log(some)).sum(),
        "pr": 1 / (p**2).sum(),
        "eee": 2 / len(p) * (cumulative - steps).sum(),
        "variance": values.sum(),
    }


def model(placement: str = "pre", **values: object) -> GPT:
    config = GPTConfig(
        n_layers=2, d_model=8, n_heads=2, seq_len=17, vocab_size=8,
        normalization=Normalization(placement=placement), **values,
    )  # fmt: skip
    return GPT(config, seed=0).eval()


def tokens(n: int = 24, seq_len: int = 17, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(COUNTS[:7].double(), n * seq_len, True, generator=generator).reshape(
        n, seq_len
    )


def divided(mask: Tensor | None = None, skip_first: int = 0, n: int = 24) -> dict:
    divider = Divider(Grouped(ALL, COUNTS), skip_first)
    return dict(divider.divide((n, 17), mask, tokens(n), 0))


# What belongs together


def test_the_parts_of_a_grouping_are_disjoint_and_contain_all_samples_that_count():
    mask = torch.rand(24, 17, generator=torch.Generator().manual_seed(0)) < 0.8
    for grouping, division in divided(mask).items():
        together = torch.cat(list(division.parts.values()))
        assert torch.equal(together.sort().values, mask.reshape(-1).nonzero()[:, 0]), grouping


@pytest.mark.parametrize("skip_first", [0, 3])
def test_positions_are_0_and_four_equal_parts_of_the_others(skip_first):
    parts = divided(skip_first=skip_first)["position"].parts
    length = 17 - skip_first
    place = {name: np.unique(rows.numpy() % length) for name, rows in parts.items()}
    sizes = {name: len(rows) for name, rows in parts.items()}
    if skip_first:  # 14 positions: 3, 4, 3, 4, of which three parts keep as many as the smallest
        assert set(parts) == {"q1", "q2", "q3", "q4", REST}
        assert {sizes[name] for name in ("q1", "q2", "q3", "q4")} == {3 * 24}
        assert sizes[REST] == 2 * 24
    else:
        assert place["0"].tolist() == [0]
        expected = {f"q{k + 1}": list(range(1 + 4 * k, 5 + 4 * k)) for k in range(4)}
        assert {name: place[name].tolist() for name in expected} == expected
        assert {sizes[name] for name in expected} == {4 * 24}
        assert sizes[REST] == 0


def test_position_0_is_the_first_token_after_padding():
    mask = torch.ones(24, 17, dtype=torch.bool)
    mask[:, :5] = False
    first = divided(mask)["position"].parts["0"]
    assert (first % 17).unique().tolist() == [5]


def test_with_skipped_positions_quarters_start_after_padding():
    """Every second sequence has 4 positions of padding, and the 3 tokens after it are skipped."""
    n_padding = 4 * (torch.arange(24) % 2)
    mask = (n_padding == 0)[:, None] | (torch.arange(17) >= n_padding[:, None] + 3)
    parts = divided(mask, skip_first=3)["position"].parts
    for quarter in range(4):
        rows = parts[f"q{quarter + 1}"]
        place = rows % 14 - n_padding[rows // 14]
        assert len(rows) > 0
        assert (place * 4 // 14 == quarter).all()


def test_like_0_has_one_other_position_of_each_sequence_spread_evenly():
    like = divided(n=170)["position"].others["like_0"]
    assert torch.equal(like // 17, torch.arange(170))
    places = np.bincount((like % 17).numpy(), minlength=17)
    assert places[0] == 0
    assert places[1:].min() >= 9  # of 170 / 16 = 10.6
    assert places[1:].max() <= 12


def test_frequency_classes_are_thirds_of_the_occurrences():
    """40 of 99 end after 33; 30 end after 66; the others follow."""
    assert frequency_classes(COUNTS).tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert frequency_classes(torch.tensor([1, 1, 1, 0])).tolist() == [0, 1, 2, 2]


def test_groups_by_frequency_have_equal_numbers_of_the_right_tokens():
    parts = divided()["frequency"].parts
    ids = tokens().reshape(-1)
    classes = frequency_classes(COUNTS)
    numbers = {name: len(parts[name]) for name in GROUPINGS["frequency"]}
    assert len(set(numbers.values())) == 1
    assert numbers["head"] == min(np.bincount(classes[ids].numpy(), minlength=3))
    for number, name in enumerate(GROUPINGS["frequency"]):
        assert (classes[ids[parts[name]]] == number).all()
        # Evenly spread: as many in each half of the batch, but for one.
        assert (
            abs(
                int((parts[name] < len(ids) // 2).sum()) - int((parts[name] >= len(ids) // 2).sum())
            )
            < 40
        )


def test_halves_alternate_between_sequences_across_batches():
    divider = Divider(Grouped(("halves",)))
    seen = [divider.divide((1, 4), None, None, first)["halves"].parts for first in range(3)]
    assert [len(parts["a"]) for parts in seen] == [4, 0, 4]
    of_images = divider.divide((6, 4), None, None, 0, per_sequence=3)["halves"].parts
    assert of_images["a"].tolist() == list(range(12))


# What is measured of it


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A GPT of two layers on three batches: its groups and sites, and its features by hand."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    gpt, batches = model(), [tokens(8, seed=seed) for seed in (1, 2, 3)]
    frame = nerve.measure(
        gpt, batches, into=folder, groups=ALL, token_counts=COUNTS,
        sites=("stream_in", "input", "output", "stream_out"),
    )  # fmt: skip
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, of: str):
        def hook(module, args, output):
            seen.setdefault(name, []).append((args[0] if of == "input" else output).detach())

        return hook

    for layer, block in enumerate(gpt.blocks):
        for site, module, of in (
            ("stream_in", block.ffn_norm, "input"), ("input", block.ffn.up, "input"),
            ("pre", block.ffn.up, "output"), ("post", block.ffn.down, "input"),
            ("output", block.ffn.down, "output"), ("stream_out", block, "output"),
        ):  # fmt: skip
            module.register_forward_hook(keep(f"{layer}/{site}", of))
    with torch.no_grad():
        for batch in batches:
            gpt(batch)
    features = {name: torch.cat(each).double().numpy() for name, each in seen.items()}
    return frame, nerve.load_groups(folder), features, torch.cat(batches)


def test_sites_are_those_of_the_features_by_hand(measured):
    _, groups, features, _ = measured
    rows = groups[groups["grouping"] == "all"].set_index(["layer", "site"])
    assert len(rows) == 12
    for layer in (0, 1):
        for site in ("stream_in", "input", "pre", "post", "output", "stream_out"):
            x = features[f"{layer}/{site}"]
            expected = by_hand(x.reshape(-1, x.shape[-1]))
            row = rows.loc[(layer, site)]
            assert row[list(expected)].tolist() == pytest.approx(list(expected.values()), rel=2e-5)
            assert (row["n_samples"], row["dim"]) == (24 * 17, x.shape[-1])


def test_groups_are_those_of_the_features_by_hand(measured):
    """Position 0, the third quarter of the others, and the first half, for pre and post."""
    _, groups, features, _ = measured
    chosen = {
        ("position", "0"): lambda x: x[:, 0],
        ("position", "q3"): lambda x: x[:, 9:13],
        ("halves", "b"): lambda x: x[1::2],
    }
    rows = groups.set_index(["layer", "site", "grouping", "group"])
    for layer in (0, 1):
        for site in ("pre", "post"):
            for (grouping, group), take in chosen.items():
                x = take(features[f"{layer}/{site}"])
                x = x.reshape(-1, x.shape[-1])
                row, expected = rows.loc[(layer, site, grouping, group)], by_hand(x)
                assert row["n_samples"] == len(x)
                assert row[list(expected)].tolist() == pytest.approx(
                    list(expected.values()), rel=2e-5
                )


def test_groups_by_frequency_are_compared_at_equal_numbers(measured):
    _, groups, features, ids = measured
    rows = groups[groups["grouping"] == "frequency"]
    assert rows.groupby(["layer", "site"])["n_samples"].nunique().eq(1).all()
    # The smallest third, batch by batch, is whole: it is measured as it is.
    classes = frequency_classes(COUNTS)[ids]
    counts = [np.bincount(part.reshape(-1).numpy(), minlength=3) for part in classes.split(8)]
    assert rows["n_samples"].iloc[0] == sum(count.min() for count in counts)
    (smallest,) = {int(count.argmin()) for count in counts}
    expected = by_hand(features["1/post"][(classes == smallest).numpy()])
    row = rows.set_index(["layer", "site", "group"]).loc[
        (1, "post", GROUPINGS["frequency"][smallest])
    ]
    assert row[list(expected)].tolist() == pytest.approx(list(expected.values()), rel=2e-5)


@pytest.mark.parametrize("groups", [("position",), ("frequency", "halves"), ("halves", "position")])
def test_groups_merge_to_the_row_of_all_samples(tmp_path, groups):
    """Up to rounding in float64, with a mask and skipped positions: only the covariances of the
    first grouping are accumulated for pre and post."""
    gpt, batches = model().double(), [tokens(8, seed=seed) for seed in (1, 2)]
    mask = torch.rand(8, 17, generator=torch.Generator().manual_seed(3)) < 0.7
    given = {"mask": lambda batch: mask, "skip_first": 2}
    alone = nerve.measure(gpt, batches, **given)
    counts = COUNTS if "frequency" in groups else None
    grouped = nerve.measure(
        gpt, batches, **given, into=tmp_path / "run", groups=groups, token_counts=counts
    )
    names = [name for name in alone if alone[name].dtype == float]
    np.testing.assert_allclose(grouped[names], alone[names], rtol=1e-9)
    assert grouped["n_samples"].tolist() == alone["n_samples"].tolist()


def test_16_bit_features_and_pre_itself_are_grouped_too(tmp_path):
    gpt, batches = model().bfloat16(), [tokens(8, seed=seed) for seed in (1, 2)]
    alone = nerve.measure(gpt, batches)
    grouped = nerve.measure(gpt, batches, into=tmp_path / "run", groups=["halves"])
    assert grouped["pr_pre"].tolist() == pytest.approx(alone["pr_pre"].tolist(), rel=1e-5)
    rows = nerve.load_groups(tmp_path / "run")
    assert set(rows["grouping"]) == {"all", "halves"}


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_stream_after_a_layer_is_the_stream_before_the_next(tmp_path, placement):
    """Without attention, whose output is set to zero."""
    gpt = model(placement)
    for block in gpt.blocks:
        block.attention.out.weight.data.zero_()
        block.attention.out.bias.data.zero_()
    nerve.measure(gpt, [tokens()], into=tmp_path / "run", sites=["stream_in", "stream_out"])
    rows = nerve.load_groups(tmp_path / "run").set_index(["layer", "site"])["pr"]
    if placement == "pre":
        assert rows[0, "stream_out"] == pytest.approx(rows[1, "stream_in"], rel=1e-6)
    else:  # a norm lies between
        assert rows[0, "stream_out"] == pytest.approx(rows[1, "stream_in"], rel=1e-3)


def test_a_description_can_declare_the_stream(tmp_path):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x)))) / 2

    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(8, 5, 6)
    ffn = nerve.FFNAdapter(
        0, "ffn", block.up, block.down,
        stream=(nerve.Site(block.norm, "input"), nerve.Site(block, "output")),
    )  # fmt: skip
    sites = ["stream_in", "stream_out"]
    nerve.measure(block, [x], ffns=[ffn], into=tmp_path / "run", sites=sites)
    rows = nerve.load_groups(tmp_path / "run").set_index("site")
    for site, features in (("stream_in", x), ("stream_out", block(x).detach())):
        expected = by_hand(features.reshape(-1, 6).double().numpy())
        assert rows.loc[site, list(expected)].tolist() == pytest.approx(
            list(expected.values()), rel=1e-5
        )


def test_a_warning_is_logged_if_the_stream_is_not_found(tmp_path, caplog):
    """Half of the output is added, which is not the sum of two tensors."""
    torch.manual_seed(0)
    up, down = nn.Linear(6, 12), nn.Linear(12, 6)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = up, down

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x))) / 2

    nerve.measure(
        Half(), [torch.randn(8, 5, 6)], into=tmp_path / "run", sites=["stream_in", "output"]
    )
    assert "ffn in layer 0: stream_in cannot be measured because " in caplog.text
    assert set(nerve.load_groups(tmp_path / "run")["site"]) == {"pre", "post", "output"}


def test_of_several_arguments_by_name_none_is_taken_for_the_stream(tmp_path, caplog):
    """The blocks receive the stream and a mask by name, and normalize in a function."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            normed = torch.nn.functional.layer_norm(hidden, (6,))
            return hidden + self.down(torch.relu(self.up(normed))) * mask

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(hidden=x, mask=torch.ones(()))
            return x

    given = {"into": tmp_path / "run", "sites": ["stream_in", "output"]}
    nerve.measure(Net(), [torch.randn(8, 5, 6)], **given)
    assert "ffn in layer 1: stream_in cannot be measured because " in caplog.text
    rows = nerve.load_groups(tmp_path / "run").query("layer == 1")
    assert set(rows["site"]) == {"pre", "post", "output"}


class TokenModel(nn.Module):
    """Takes a mapping, like models of transformers; its FFN receives the tokens flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(8, 6), nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        flat = self.norm(x).flatten(0, 1)
        return x + self.down(torch.relu(self.up(flat))).reshape(x.shape)


@pytest.mark.parametrize("heldout", [True, False])
def test_a_watched_loop_has_the_groups_of_measure(tmp_path, heldout):
    """With padded sequences that the FFN receives flattened; without given counts, the tokens are
    counted."""
    torch.manual_seed(0)
    net = TokenModel()
    mask = torch.ones(24, 17, dtype=torch.long)
    mask[::3, 9:] = 0
    batch = {"input_ids": tokens(), "attention_mask": mask}
    ffn = [nerve.FFNAdapter(0, "ffn", net.up, net.down)]
    sites = ["stream_in", "stream_out"] if heldout else ["input", "output"]
    given = {"groups": ALL, "sites": sites, "ffns": ffn}
    counts = torch.bincount(tokens()[mask == 1])
    nerve.measure(net, [batch], into=tmp_path / "measured", **given)
    source = {"heldout": [batch]} if heldout else {"token_counts": counts}
    with nerve.watch(net, tmp_path / "watched", **given, **source) as run:
        if not heldout:
            net(**batch).sum().backward()
            run.step()
    keys = ["site", "grouping", "group"]
    by_hand, watched = (
        nerve.load_groups(tmp_path / name).set_index(keys).sort_index()
        for name in ("measured", "watched")
    )
    assert watched.index.tolist() == by_hand.index.tolist()
    assert by_hand.loc[("pre", "position", "0"), "n_samples"] == 24
    assert by_hand.loc[("pre", "halves", "a"), "n_samples"] == 12 * 17 - 4 * 8
    numbers = ["n_samples", "se", "pr", "eee", "variance"]
    np.testing.assert_allclose(watched[numbers], by_hand[numbers], rtol=2e-5)


def test_a_mask_of_pairs_leaves_out_no_token_of_the_count():
    """Nor does an additive one: neither shows which tokens are padding."""
    ids = torch.tensor([[0, 2, 2], [1, 2, 0]])
    pairs = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    for mask in (pairs, torch.zeros(2, 3).log()):
        counts = count_tokens([{"input_ids": ids, "attention_mask": mask}])
        assert counts.tolist() == [2, 1, 3]
    padding = torch.tensor([[1, 1, 1], [1, 1, 0]])
    counts = count_tokens([{"input_ids": ids, "attention_mask": padding}])
    assert counts.tolist() == [1, 1, 3]


# What is refused


def test_samples_that_cannot_be_grouped_raise(tmp_path):
    gpt, given = model(), {"into": tmp_path / "run"}
    with pytest.raises(ConfigError, match="an entry of groups must be one of position"):
        nerve.measure(gpt, [tokens()], groups=["positions"], **given)
    with pytest.raises(ConfigError, match="must not repeat an entry"):
        nerve.measure(gpt, [tokens()], sites=["input", "input"], **given)
    with pytest.raises(ConfigError, match="Give into="):
        nerve.measure(gpt, [tokens()], groups=["halves"])
    mlp = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    with pytest.raises(MeasurementError, match="Groups need sequences"):
        nerve.measure(mlp, [torch.randn(30, 6)], groups=["halves"], **given)
    with pytest.raises(MeasurementError, match="need token ids"):
        nerve.measure(mlp, [torch.randn(3, 10, 6)], groups=["frequency"], **given)
