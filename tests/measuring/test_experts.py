"""Experts: each an FFN of its own, found by the parameter that is multiplied or in a list, as
unfused by hand in NumPy."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from by_hand import Plain
from torch import Tensor, nn

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.measuring.routing import origins

transformers.logging.set_verbosity_error()

D, FF, N, TOP, VOCAB = 8, 12, 5, 2, 32
IDLE = 0

FAMILIES = {
    "mixtral": ("MixtralConfig", {"num_local_experts": N, "intermediate_size": FF}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": N, "moe_intermediate_size": FF, "shared_expert_intermediate_size": 10},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": N, "moe_intermediate_size": FF, "head_dim": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": N, "intermediate_size": FF}),
}


def model_of(family: str) -> Any:
    """A tiny random model in float64, of whose experts the first gets no token: among the logits of
    the others, those of v, -v, u and -u, two are always above its own, 0."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts_per_tok=TOP,
        vocab_size=VOCAB,
        max_position_embeddings=32,
        **values,
    )
    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = transformers.AutoModel.from_config(config).double().eval()
    for layer in model.layers:
        with torch.no_grad():
            for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                weight.normal_()
            v, u = torch.randn(2, D, dtype=torch.float64)
            layer.mlp.gate.weight.copy_(torch.stack([torch.zeros_like(v), v, -v, u, -u]))
    return model


def batches_of(*, padded: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, VOCAB, (4, 7), generator=generator)
        lengths = torch.tensor([[7], [3], [5], [7 if not padded else 1]])
        mask = (torch.arange(7) < lengths).long() if padded else torch.ones_like(ids)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def by_hand(model: Any, batches: list[dict[str, Tensor]]) -> list[list[dict[str, np.ndarray]]]:
    """Features before and after the nonlinearity of each expert of each layer, in NumPy, from what
    the router says and what the mixture gets."""
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
                layer.mlp.gate.register_forward_hook(choose),
            ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        counts = batch["attention_mask"].reshape(-1).bool().numpy()
        for i, layer in enumerate(model.layers):
            both = layer.mlp.experts.gate_up_proj.detach().numpy()
            for e in range(N):
                x = given[i][(chosen[i] == e).any(1) & counts]
                gate, up = np.split(x @ both[e].T, 2, axis=1)
                seen[i][e]["pre"].append(gate)
                seen[i][e]["post"].append(gate / (1 + np.exp(-gate)) * up)
    return [
        [{side: np.concatenate(parts) for side, parts in each.items()} for each in layer]
        for layer in seen
    ]


def assert_row(row: dict[str, Any], features: dict[str, np.ndarray]) -> None:
    """A row has the values of these features, to 1e-9, or says why it has none."""
    n = len(features["pre"])
    assert (row["n_samples"], row["d_ff"], row["d_in"]) == (n, FF, D)
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
    """Each expert, one without tokens, all of them pooled; counts are the router's."""
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
        assert_row(rows.loc[layer, "experts"].to_dict(), together)
    dense = {"mlp_shared_expert"} if family == "qwen2_moe" else set()
    names = {*(f"expert_{e}" for e in range(N)), "experts", *dense}
    assert set(rows.index.get_level_values("ffn")) == names


def test_a_model_that_takes_all_products_at_once_does_so_afterwards():
    """And its router has sent as many tokens to each expert as were measured."""
    model, batches = model_of("mixtral").float(), batches_of(padded=False)
    before = model(**batches[0]).last_hidden_state
    chosen = [[], []]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, a, output, i=i: chosen[i].append(output[2]))
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


def test_what_is_found_names_the_parameter_and_the_pool():
    found = nerve.find_ffns(model_of("mixtral"), batches_of(padded=False)[0])
    table = found.table()
    assert found.unclear == []
    assert table["pre"][3] == f"layers.0.mlp.experts.gate_up_proj[3][0:{FF}]"
    assert table["post"][3] == "layers.0.mlp.experts.down_proj[3]"
    assert set(table["pool"]) == {"experts"}
    assert table["n_runs"].isna().all()


def test_left_out_positions_are_left_out_of_experts():
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


class Mixture(nn.Module):
    """Sends each token to the expert that a projection chooses, if any."""

    def __init__(self, experts: nn.Module, n: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.router, self.experts, self.n, self.scaled = nn.Linear(D, n), experts, n, scaled

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = self.router(tokens).argmax(-1)
        given = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = torch.where(chosen == index)[0]
            if len(rows):
                given[rows] = expert(tokens[rows] * (2 if self.scaled else 1))
        return x + given.reshape(x.shape)


class Net(nn.Module):
    """Embeds tokens, and runs two mixtures."""

    def __init__(self, mixtures: list[nn.Module]) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(VOCAB, D), nn.ModuleList(mixtures)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        x = x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None]
        for block in self.blocks:
            x = block(x)
        return x


def listed(**how: Any) -> Net:
    torch.manual_seed(3)
    with torch.random.fork_rng():
        mixtures: list[nn.Module] = []
        for _ in range(2):
            ffns = nn.ModuleList(Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(3))
            mixtures.append(Mixture(ffns, 3, **how))
        net = Net(mixtures).double().eval()
        with torch.no_grad():  # of equal weights and the larger bias: the third gets nothing
            for mixture in mixtures:
                mixture.router.weight[2] = mixture.router.weight[1]
                mixture.router.bias[2] = mixture.router.bias[1] - 1
    return net


@pytest.mark.parametrize("padded", [False, True])
def test_experts_in_a_list_are_experts_and_no_layers(padded):
    """Also one that gets no token in the pass that looks for FFNs."""
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


def test_beside_padding_an_expert_whose_tokens_cannot_be_told_is_refused():
    """The mixture multiplies them first: then they are not those that the mixture got."""
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
    with pytest.raises(MeasurementError, match="tokens as its mixture got them"):
        nerve.measure(net, batches_of(padded=True), ffns=ffns)


# Stacked parameters of one's own


class Stacked(nn.Module):
    """A mixture over slices, multiplied as `x @ W[e] + b[e]`."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__()
        self.router, self.together = nn.Linear(D, 3), together
        self.up = nn.Parameter(torch.randn(3, D, FF))
        self.up_bias = nn.Parameter(torch.randn(3, FF))
        self.down = nn.Parameter(torch.randn(3, FF, D))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = self.router(tokens).argmax(-1)
        given = torch.zeros_like(tokens)
        if self.together:
            h = torch.relu(torch.einsum("nd,edf->enf", tokens, self.up))
            every = torch.einsum("enf,efd->end", h, self.down)
            return x + every[chosen, torch.arange(len(tokens))].reshape(x.shape)
        for e in range(3):
            rows = torch.where(chosen == e)[0]
            h = torch.relu(tokens[rows] @ self.up[e] + self.up_bias[e])
            given[rows] = h @ self.down[e]
        return x + given.reshape(x.shape)


def test_a_bias_that_is_added_to_the_product_belongs_to_pre():
    """Its covariance does not know, the mean's share does."""
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


def test_experts_whose_products_nothing_shows_are_named():
    """Beside an FFN that is found: measured without them, but not silently."""
    torch.manual_seed(0)
    dense = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    net = Net([dense, Stacked(together=True)]).double().eval()
    found = nerve.find_ffns(net, batches_of(padded=False)[0])
    assert [(ffn.layer, ffn.name) for ffn in found] == [(0, "ffn")]
    assert len(found.unclear) == 1
    assert f"model.blocks.1: up (3, {D}, {FF}), down (3, {FF}, {D})" in found.unclear[0]


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
