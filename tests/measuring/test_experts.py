"""Experts: each is an FFN of its own, found in a stacked parameter or in a list, and compared with
NumPy."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import Plain
from mixtures import (
    FAMILIES,
    FF,
    IDLE,
    TOP,
    D,
    N,
    Net,
    Stacked,
    batches_of,
    listed,
    model_of,
    router_of,
)
from torch import Tensor, nn

import nerve
from nerve.errors import MeasurementError, NotFiniteError
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.measuring.routing import counted_of, origins


def unfused(mixture: Any, e: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features of one expert, before and after the nonlinearity."""
    experts = mixture.experts
    both = experts.gate_up_proj[e].detach().numpy()
    if hasattr(experts, "gate_up_proj_bias"):  # of gpt-oss: in turns, and a product with up + 1
        values = x @ both + experts.gate_up_proj_bias[e].detach().numpy()
        gate, up = values[:, ::2], values[:, 1::2].clip(-experts.limit, experts.limit)
        cut = gate.clip(max=experts.limit)
        return gate, (up + 1) * cut / (1 + np.exp(-experts.alpha * cut))
    gate, up = np.split(x @ both.T, 2, axis=1)
    return gate, gate / (1 + np.exp(-gate)) * up


def by_hand(model: Any, batches: list[dict[str, Tensor]]) -> list[list[dict[str, np.ndarray]]]:
    """The features of each expert of each layer before and after the nonlinearity, in NumPy, from
    the router's choices and the mixture's input."""
    seen: list[list[dict[str, list[np.ndarray]]]] = [
        [{"pre": [], "post": []} for _ in range(N)] for _ in model.layers
    ]
    for batch in batches:
        given: dict[int, np.ndarray] = {}
        chosen: dict[int, np.ndarray] = {}
        handles = []
        for i, layer in enumerate(model.layers):

            def take(module, args, i=i, given=given):
                given[i] = args[0].reshape(-1, D).numpy()

            def choose(module, args, output, i=i, chosen=chosen):
                chosen[i] = output[2].numpy()

            handles += [
                layer.mlp.register_forward_pre_hook(take),
                router_of(layer.mlp).register_forward_hook(choose),
            ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        counts = batch["attention_mask"].reshape(-1).bool().numpy()
        for i, layer in enumerate(model.layers):
            for e in range(N):
                x = given[i][(chosen[i] == e).any(1) & counts]
                for side, features in zip(("pre", "post"), unfused(layer.mlp, e, x), strict=True):
                    seen[i][e][side].append(features)
    return [
        [{side: np.concatenate(parts) for side, parts in each.items()} for each in layer]
        for layer in seen
    ]


def assert_row(row: dict[str, Any], features: dict[str, np.ndarray], d_in: int = D) -> None:
    """A row has the values of these features, to 1e-9, or a status that says why it has none."""
    n = len(features["pre"])
    assert (row["n_samples"], row["d_ff"], row["d_in"]) == (n, FF, d_in)
    if n < 2:
        assert row["status"] == "too_few_samples"
        return
    assert row["status"] == "ok"
    for side, x in features.items():
        values = np.linalg.eigvalsh(np.cov(x.T)).clip(0)
        p = values / values.sum()
        found = p[p > 1e-14]
        expected = {
            "variance": values.sum(),
            "pr": values.sum() ** 2 / np.square(values).sum(),
            "se": -(found * np.log(found)).sum(),
            "mean_share": len(x) * np.square(x.mean(0)).sum() / np.square(x).sum(),
        }
        for name, value in expected.items():
            assert row[f"{name}_{side}"] == pytest.approx(value, rel=1e-9), (row["ffn"], name, side)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_measured_as_unfused_by_hand(family, padded):
    """Each expert, one without tokens, and all of them pooled; the counts are the router's."""
    model, batches = model_of(family), batches_of(padded=padded)
    rows = nerve.measure(model, batches).set_index(["layer", "ffn"])
    model.set_experts_implementation("eager")  # grouped products know no float64
    for layer, experts in enumerate(by_hand(model, batches)):
        for e, features in enumerate(experts):
            assert_row(rows.loc[layer, f"expert_{e}"].to_dict(), features)
        assert len(experts[IDLE]["pre"]) == 0
        assert sum(len(each["pre"]) for each in experts) == TOP * sum(
            int(batch["attention_mask"].sum()) for batch in batches
        )
        together = {s: np.concatenate([each[s] for each in experts]) for s in ("pre", "post")}
        assert_row(rows.loc[layer, "experts"].to_dict(), together, d_in=N * D)
    dense = {"mlp_shared_expert"} if family == "qwen2_moe" else set()
    names = {*(f"expert_{e}" for e in range(N)), "experts", *dense}
    assert set(rows.index.get_level_values("ffn")) == names


def test_a_fused_implementation_is_restored_afterwards():
    """Its router then sends as many tokens to each expert as were measured."""
    model, batches = model_of("mixtral").float(), batches_of(padded=False)
    before = model(**batches[0]).last_hidden_state
    chosen = [[], []]
    hooks = [
        router_of(layer.mlp).register_forward_hook(
            lambda m, a, output, i=i: chosen[i].append(output[2])
        )
        for i, layer in enumerate(model.layers)
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    rows = nerve.measure(model, batches).set_index(["layer", "ffn"])
    for layer in range(2):
        load = torch.bincount(torch.cat(chosen[layer]).flatten(), minlength=N).tolist()
        measured = [rows.loc[(layer, f"expert_{e}"), "n_samples"] for e in range(N)]
        assert measured == load
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(model(**batches[0]).last_hidden_state, before)


def test_found_experts_name_the_parameter_and_the_pool():
    found = nerve.find_ffns(model_of("mixtral"), batches_of(padded=False)[0])
    table = found.table()
    assert found.unclear == []
    assert table["pre"][3] == f"layers.0.mlp.experts.gate_up_proj[3][0:{FF}]"
    assert table["post"][3] == "layers.0.mlp.experts.down_proj[3]"
    assert set(table["pool"]) == {"experts"}
    assert table["n_runs"].isna().all()
    note = (
        "MixtralExperts: runs with its plain implementation instead of grouped_mm during "
        "measurement."
    )
    assert found.notes == [note]
    assert note in repr(found)


def test_skipped_positions_are_skipped_in_experts():
    """`skip_first` equals a mask without the first position."""
    model, batches = model_of("olmoe"), batches_of(padded=True)
    rows = nerve.measure(model, batches, skip_first=1)
    masks = [batch["attention_mask"].bool() for batch in batches]
    for mask in masks:
        mask[:, 0] = False
    known = {id(batch): mask for batch, mask in zip(batches, masks, strict=True)}
    first = batches[0]

    def mask_of(batch):
        if id(batch) in known:
            return known[id(batch)]
        full = torch.ones_like(batch["input_ids"], dtype=torch.bool)  # two equal, short sequences
        full[:, 0] = False
        return full

    assert id(first) in known
    by_mask = nerve.measure(model, batches, mask=mask_of)
    columns = ["layer", "ffn", "n_samples", "pr_pre", "pr_post", "variance_post"]
    np.testing.assert_array_equal(rows["n_samples"], by_mask["n_samples"])
    for name in columns[3:]:
        np.testing.assert_allclose(rows[name], by_mask[name], rtol=1e-12)


# Experts in a list


@pytest.mark.parametrize("padded", [False, True])
def test_experts_in_a_list_are_not_layers(padded):
    """Including an expert without tokens in the pass that searches for FFNs."""
    net, batches = listed(), batches_of(padded=padded)
    kept: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    rows = nerve.measure(net, batches).set_index(["layer", "ffn"])
    for layer, mixture in enumerate(net.blocks):
        for batch in batches:
            with torch.no_grad():
                x = net.embedding(batch["input_ids"])
                x = x + torch.linspace(0, 1, 7, dtype=x.dtype)[:, None]
                for block in net.blocks[:layer]:
                    x = block(x)
                chosen = mixture.router(x).argmax(-1)
                for e, expert in enumerate(mixture.experts):
                    u = expert.up(x[(chosen == e) & (batch["attention_mask"] == 1)])
                    kept.setdefault((layer, e), []).append((u, u.relu()))
    for (layer, e), parts in kept.items():
        pre, post = (torch.cat(sides).numpy() for sides in zip(*parts, strict=True))
        assert_row(rows.loc[layer, f"expert_{e}"].to_dict(), {"pre": pre, "post": post})
    assert rows.loc[(0, "expert_2"), "n_samples"] == 0
    assert len(rows) == 8


def test_an_expert_whose_tokens_are_unknown_raises_with_padding():
    """The mixture scales the tokens first, so the expert does not receive what the mixture
    received."""
    net = listed(scaled=True)
    ffns = [
        nerve.FFNAdapter(
            layer,
            f"expert_{e}",
            expert.up,
            expert.down,
            n_runs=None,
            tokens=nerve.Site(mixture, "input", axis=-1),
        )
        for layer, mixture in enumerate(net.blocks)
        for e, expert in enumerate(mixture.experts)
    ]
    nerve.measure(net, batches_of(padded=False), ffns=ffns)
    with pytest.raises(MeasurementError, match="tokens exactly as its mixture received them"):
        nerve.measure(net, batches_of(padded=True), ffns=ffns)


@pytest.mark.parametrize("make", [listed, lambda: model_of("olmoe")])
def test_a_watched_loop_records_experts_like_measure(tmp_path, make):
    """With padding; an expert without tokens has a row with a status."""
    model, batches = make(), batches_of(padded=True)
    expected = nerve.measure(model, batches)
    with nerve.watch(
        model,
        tmp_path,
        every_n_steps=1,
        heldout=batches,
        forward=lambda model, batch: model(**batch),
    ) as run:
        run.step()
    rows = nerve.load_metrics(tmp_path)
    first = rows[rows["step"] == 0].reset_index(drop=True)
    assert first["ffn"].tolist() == expected["ffn"].tolist()
    assert first["n_samples"].tolist() == expected["n_samples"].tolist()
    np.testing.assert_allclose(first["pr_post"], expected["pr_post"], rtol=1e-12)
    assert "too_few_samples" in set(first["status"])


# Stacked parameters of one's own


def test_a_bias_that_is_added_to_the_product_belongs_to_pre():
    """The covariance does not show the bias, but the share of the mean does."""
    torch.manual_seed(0)
    net, batches = Net([Stacked()]).double().eval(), batches_of(padded=True)
    rows = nerve.measure(net, batches).set_index("ffn")
    block, parts = net.blocks[0], [[], [], []]
    with torch.no_grad():
        for batch in batches:
            x = net.embedding(batch["input_ids"])
            x = x + torch.linspace(0, 1, 7, dtype=x.dtype)[:, None]
            chosen = block.router(x).argmax(-1)
            for e in range(3):
                counted = x[(chosen == e) & (batch["attention_mask"] == 1)]
                parts[e].append(counted @ block.up[e] + block.up_bias[e])
    for e in range(3):
        u = torch.cat(parts[e])
        assert_row(rows.loc[f"expert_{e}"].to_dict(), {"pre": u.numpy(), "post": u.relu().numpy()})


def test_experts_whose_products_are_hidden_are_named():
    """Next to an FFN that is found: the experts are not measured, but not silently."""
    torch.manual_seed(0)
    dense = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    net = Net([dense, Stacked(together=True)]).double().eval()
    found = nerve.find_ffns(net, batches_of(padded=False)[0])
    assert [(ffn.layer, ffn.name) for ffn in found] == [(0, "ffn")]
    assert len(found.unclear) == 1
    assert f"model.blocks.1: up (3, {D}, {FF}), down (3, {FF}, {D})" in found.unclear[0]


def test_experts_that_have_diverged_are_named():
    model = model_of("mixtral")
    (name, *_), (weight, *_) = zip(
        *(each for each in model.named_parameters() if each[0].endswith("gate_up_proj")),
        strict=True,
    )
    weight.data[:, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=rf"those of model\.{re.escape(name)}\[\d\] are not"):
        nerve.find_ffns(model, batches_of(padded=False)[0])


def test_a_training_step_is_not_replaced_by_the_plain_implementation():
    model, batch = model_of("mixtral"), batches_of(padded=False)[0]
    probe = Probe(nerve.find_ffns(model, batch))
    measurement = Measurement(probe)
    probe.install()
    measurement.start()
    with pytest.raises(MeasurementError, match="set_experts_implementation"):
        model.train()(**batch)
    measurement.stop()
    model.set_experts_implementation("eager")
    measurement.start()
    model.train()(**batch)
    measurement.finish_forward()
    probe.remove()
    assert sum(each.n_samples for each in measurement.spectra()) == 2 * 2 * TOP * 28


# Which tokens


def test_rows_are_found_among_equal_ones():
    source = torch.tensor([[1.0, 2], [3, 4], [1, 2], [5, torch.nan], [-0.0, 0]])
    index, partly = origins(source[[3, 2, 4]], source)
    assert index.tolist() == [3, 0, 4]
    assert (partly >= 0).tolist() == [True, False, True, False, False]
    assert origins(torch.tensor([[0.0, 0]]), source) is None
    assert origins(source[[1, 1]], source) is None


def test_equal_rows_that_an_expert_received_in_part_must_count_alike():
    """Also for many sets of equal rows, such as tokens without positions, whose pairs would not fit
    into memory."""
    source = torch.arange(4.0).repeat_interleave(3)[:, None]
    rows = source[[0, 1, 3, 9, 10, 11]]  # two of three, one of three, none, all
    counts = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1, 1]).bool()
    assert counted_of(rows, source, counts, "it").tolist() == [1, 1, 0, 0, 1, 1]
    for changed in (2, 4):
        unclear = counts.clone()
        unclear[changed] ^= True
        with pytest.raises(MeasurementError, match="some of several identical tokens"):
            counted_of(rows, source, unclear, "it")
    many = torch.arange(30_000.0).repeat_interleave(2)[:, None]
    counted = counted_of(many[::2], many, torch.ones(60_000, dtype=torch.bool), "it")
    assert counted.all()


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_on_a_gpu_agree_with_a_cpu(family):
    """In float64 with padding; and with the model's own implementation in bfloat16, grouped, for
    which a GPU needs rows of a multiple of 16 bytes."""
    model, batches = model_of(family, ff=16), batches_of(padded=True)
    expected = nerve.measure(model, batches)
    model.cuda()
    there = [{name: each.cuda() for name, each in batch.items()} for batch in batches]
    rows = nerve.measure(model, there)
    assert rows["n_samples"].tolist() == expected["n_samples"].tolist()
    for name in ("pr_pre", "pr_post", "variance_post", "mean_share_post"):
        np.testing.assert_allclose(rows[name], expected[name], rtol=1e-6)
    model.bfloat16()
    before = model(**there[0])
    rows = nerve.measure(model, there, memory="1MiB")
    pooled = rows[rows["ffn"] == "experts"]
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert pooled["n_samples"].tolist() == [TOP * n_tokens] * 2
    assert torch.equal(model(**there[0]).last_hidden_state, before.last_hidden_state)
