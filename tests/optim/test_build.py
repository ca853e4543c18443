"""Roles by name and owner, claims that are complete and exclusive, and the resulting groups."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from nerve.errors import ConfigError
from nerve.optim import (
    CombinedOptimizer,
    Part,
    Role,
    build_optimizer,
    parameter_roles,
)

ADAMW = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)
MUON = partial(torch.optim.Muon, lr=0.02, weight_decay=0.01)
ALL_ROLES = ("hidden", "embedding", "head", "vector")


class UnitRows(nn.Module):
    def forward(self, weight):
        return nn.functional.normalize(weight, dim=1)


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1,), 0.01))


class Network(nn.Module):
    """One parameter of each kind; shapes are equal on purpose, so that they reveal nothing."""

    def __init__(self, tied=False):
        super().__init__()
        self.token_embedding = nn.Embedding(4, 4)
        self.position = nn.Sequential(nn.Embedding(4, 4))
        self.patch_embedding = nn.Linear(4, 4)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.RMSNorm((4, 4))])
        self.up = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
        self.gate = parametrizations.spectral_norm(nn.Linear(4, 4, bias=False))
        self.down = nn.Linear(4, 4, bias=False)
        parametrize.register_parametrization(self.down, "weight", UnitRows())
        self.activation = Slope()
        self.head = nn.Linear(4, 4)
        if tied:
            self.head.weight = self.token_embedding.weight


def test_each_parameter_has_the_role_of_its_name_and_owner():
    assert parameter_roles(Network()) == {
        "token_embedding.weight": Role.EMBEDDING,
        "position.0.weight": Role.EMBEDDING,
        "patch_embedding.weight": Role.EMBEDDING,
        "patch_embedding.bias": Role.VECTOR,
        "attention.qkv.weight": Role.HIDDEN,
        "attention.qkv.bias": Role.VECTOR,
        "attention.head.weight": Role.HIDDEN,
        "attention.head.bias": Role.VECTOR,
        "norms.0.weight": Role.VECTOR,
        "norms.0.bias": Role.VECTOR,
        "norms.1.weight": Role.VECTOR,
        "up.parametrizations.weight.original0": Role.VECTOR,
        "up.parametrizations.weight.original1": Role.HIDDEN,
        "gate.parametrizations.weight.original": Role.HIDDEN,
        "down.parametrizations.weight.original": Role.HIDDEN,
        "activation.slope": Role.VECTOR,
        "head.weight": Role.HEAD,
        "head.bias": Role.VECTOR,
    }


def test_roles_cover_named_parameters_exactly():
    model = Network()
    assert list(parameter_roles(model)) == [name for name, _ in model.named_parameters()]


def test_a_tied_head_counts_once_as_the_embedding():
    roles = parameter_roles(Network(tied=True))
    assert roles["token_embedding.weight"] is Role.EMBEDDING
    assert "head.weight" not in roles


def test_a_constrained_head_stays_the_head():
    model = nn.Sequential()
    model.head = parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    assert list(parameter_roles(model).values()) == [Role.VECTOR, Role.HEAD]


def test_a_parameter_without_a_rule_is_named():
    model = Network()
    model.scale = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ConfigError, match=r"no rule applies to 'scale' of Network"):
        parameter_roles(model)


def test_one_part_gives_the_plain_optimizer():
    optimizer = build_optimizer(Network(), {"main": Part(ALL_ROLES, ADAMW)})
    assert type(optimizer) is torch.optim.AdamW


def test_several_parts_together_hold_every_parameter_once():
    model = Network(tied=True)
    optimizer = build_optimizer(
        model, {"matrices": Part(("hidden",), MUON), "rest": Part(ALL_ROLES[1:], ADAMW)}
    )
    assert isinstance(optimizer, CombinedOptimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}
    assert [type(part) for part in optimizer.parts.values()] == [
        torch.optim.Muon,
        torch.optim.AdamW,
    ]


def test_groups_carry_their_role_and_vectors_do_not_decay():
    optimizer = build_optimizer(Network(), {"main": Part(ALL_ROLES, ADAMW)})
    decays = {group["role"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"hidden": 0.1, "embedding": 0.1, "head": 0.1, "vector": 0.0}
    # Not a Role: a checkpoint must load with weights_only.
    assert {type(group["role"]) for group in optimizer.param_groups} == {str}


def test_a_role_that_the_model_lacks_makes_no_group():
    optimizer = build_optimizer(nn.Sequential(nn.Linear(2, 2)), {"main": Part(ALL_ROLES, ADAMW)})
    assert [group["role"] for group in optimizer.param_groups] == ["hidden", "vector"]


def test_an_unclaimed_parameter_is_named_with_the_parts():
    with pytest.raises(ConfigError, match=r"'head\.weight' \(head\) is claimed by none of main"):
        build_optimizer(Network(), {"main": Part(("hidden", "embedding", "vector"), ADAMW)})


@pytest.mark.parametrize(
    "parts",
    [
        {"main": Part(ALL_ROLES, ADAMW), "matrices": Part(("hidden",), MUON)},
        {"main": Part((*ALL_ROLES, "hidden"), ADAMW)},
    ],
    ids=["two parts", "one part twice"],
)
def test_a_parameter_claimed_twice_is_named_with_its_parts(parts):
    with pytest.raises(
        ConfigError, match=r"'attention\.qkv\.weight' \(hidden\) is claimed by main"
    ):
        build_optimizer(Network(), parts)


def test_a_part_with_nothing_to_update_is_refused():
    """Muon on a model without a hidden matrix fails before training; the error names its part."""
    model = nn.Sequential(nn.Embedding(4, 4))
    parts = {"matrices": Part(("hidden",), MUON), "rest": Part(ALL_ROLES[1:], ADAMW)}
    with pytest.raises(
        ConfigError, match=r"optimizer\.parts\.matrices updates hidden, .* embedding"
    ):
        build_optimizer(model, parts)


def test_no_part_is_refused():
    with pytest.raises(ConfigError, match="at least one part"):
        build_optimizer(Network(), {})


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"bets": (0.9, 0.95)}])
def test_what_an_optimizer_refuses_is_told_with_its_part(options):
    parts = {"main": Part(ALL_ROLES, partial(torch.optim.AdamW, **options))}
    with pytest.raises(ConfigError, match=r"optimizer\.parts\.main\.build failed: .*(-1\.0|bets)"):
        build_optimizer(Network(), parts)


def test_an_unknown_role_is_refused_with_the_good_ones():
    with pytest.raises(ConfigError, match="hidden, embedding, head, vector; got 'hiden'"):
        Part(("hiden",), ADAMW)


def test_a_part_without_roles_is_refused():
    with pytest.raises(ConfigError, match="at least one role"):
        Part((), ADAMW)
