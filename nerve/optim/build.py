"""Which optimizer updates which parameter: roles, claims and parameter groups."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nerve.config import require, require_choice, require_type
from nerve.errors import ConfigError
from nerve.optim.combined import CombinedOptimizer


class Role(StrEnum):
    """The role of a parameter in the network, which determines the optimizer that suits it.

    - `hidden`: weight matrices between hidden representations (attention, FFN and mixing
      projections), and the tensors that a constraint stores instead.
    - `embedding`: tables of token and position vectors, and the projection of image patches.
    - `head`: the weight of the output layer.
    - `vector`: gains, biases, slopes and the magnitudes of weight normalization. They do not map
      one space to another, and so get no weight decay and no orthonormalized update.
    """

    HIDDEN = "hidden"
    EMBEDDING = "embedding"
    HEAD = "head"
    VECTOR = "vector"


@dataclass(frozen=True)
class Part:
    """The roles that one optimizer updates, and how to build it.

    Attributes:
        roles: names of `Role`, at least one.
        build: takes the parameter groups and returns the optimizer, for example
            `functools.partial(torch.optim.AdamW, lr=3e-3)`.

    Raises:
        ConfigError: for no role, or one that is not a `Role`.
    """

    roles: Sequence[str]
    build: Callable[[list[dict[str, Any]]], Optimizer]

    def __post_init__(self) -> None:
        require_type("roles of optimizer.parts", self.roles, list)
        require(len(self.roles) > 0, "a part of optimizer.parts needs at least one role; got none.")
        for role in self.roles:
            require_choice("a role of optimizer.parts", role, list(Role))
        object.__setattr__(self, "roles", tuple(str(role) for role in self.roles))


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each parameter, by the names of `model.named_parameters()`.

    The role follows from the name and the owning module, not from the number of dimensions: a
    weight-norm magnitude is a matrix with one column, and an embedding is a matrix that only looks
    up rows. A tied tensor appears once, with its first name. A tensor stored by a parametrization
    has the role of the tensor that it computes, except the magnitude of weight normalization
    (`original0`).

    Raises:
        ConfigError: for a parameter to which no rule applies.
    """
    return {name: _role(model, name) for name, _ in model.named_parameters()}


_PARAMETRIZED = re.compile(r"(?:(.+)\.)?parametrizations\.([^.]+)\.original(\d*)")


def _role(model: nn.Module, name: str) -> Role:
    match = _PARAMETRIZED.fullmatch(name)
    if match:
        path, tensor, index = match[1] or "", match[2], match[3]
        if index == "0":
            return Role.VECTOR
    else:
        path, _, tensor = name.rpartition(".")
    module = model.get_submodule(path)
    if tensor in ("bias", "slope") or isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return Role.VECTOR
    if isinstance(module, nn.Embedding) or path.rpartition(".")[2] == "patch_embedding":
        return Role.EMBEDDING
    if isinstance(module, nn.Linear) and tensor == "weight":
        return Role.HEAD if path.partition(".")[0] == "head" else Role.HIDDEN
    raise ConfigError(
        f"Every parameter must have a role ({', '.join(Role)}); no rule applies to {name!r} of "
        f"{type(module).__name__}. Make it the weight of an nn.Linear or nn.Embedding, or add a "
        "rule to nerve.optim.build."
    )


def build_optimizer(model: nn.Module, parts: Mapping[str, Part]) -> Optimizer:
    """The optimizer whose parts together update every parameter of `model` exactly once.

    Each part gets one parameter group for each role that it claims, with the role's name under
    `role` and, for `vector`, a weight decay of 0. With one part, its optimizer is returned itself;
    with several, a `CombinedOptimizer`.

    Args:
        model: the network; all its parameters must be claimed.
        parts: name to `Part`, in the order in which they step.

    Raises:
        ConfigError: for a parameter claimed by no part or by two, a part with nothing to update, or
            values that its optimizer rejects.
    """
    built = _built(parts, _groups(model, parts))
    return CombinedOptimizer(built) if len(built) > 1 else next(iter(built.values()))


def check_parts(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """Makes the checks of `build_optimizer`, for a model that may be on the meta device.

    The optimizers are built with a single number in place of each group's parameters.

    Raises:
        ConfigError: as in `build_optimizer`.
    """
    groups = _groups(model, parts)
    for group in (group for its_groups in groups.values() for group in its_groups):
        shape = (1,) if group["role"] == Role.VECTOR else (1, 1)
        group["params"] = [nn.Parameter(torch.zeros(shape))]
    _built(parts, groups)


def _groups(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, list[dict[str, Any]]]:
    """The parameter groups of each part."""
    require(len(parts) > 0, "optimizer.parts needs at least one part; got none.")
    roles = parameter_roles(model)
    _require_one_claim(roles, parts)
    parameters = dict(model.named_parameters())
    of_parts: dict[str, list[dict[str, Any]]] = {}
    for part_name, part in parts.items():
        groups = of_parts[part_name] = []
        for role in part.roles:
            members = [parameters[name] for name, its_role in roles.items() if its_role == role]
            if members:
                # A plain string: checkpoints are read with weights_only, which rejects enums.
                group: dict[str, Any] = {"params": members, "role": str(role)}
                groups.append(group | ({"weight_decay": 0.0} if role == Role.VECTOR else {}))
        if not groups:
            raise ConfigError(
                f"optimizer.parts.{part_name} updates {', '.join(part.roles)}, and the model "
                f"has no such parameter; it has {', '.join(sorted(set(roles.values())))}. "
                "Remove the part or give it other roles."
            )
    return of_parts


def _built(
    parts: Mapping[str, Part], groups: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Optimizer]:
    built: dict[str, Optimizer] = {}
    for name, part in parts.items():
        try:
            built[name] = part.build(groups[name])
        except Exception as error:  # optimizers raise all kinds of errors for a bad value
            raise ConfigError(f"optimizer.parts.{name}.build failed: {error}") from error
    return built


def _require_one_claim(roles: Mapping[str, Role], parts: Mapping[str, Part]) -> None:
    for name, role in roles.items():
        claims = [part_name for part_name, part in parts.items() for r in part.roles if r == role]
        if len(claims) != 1:
            raise ConfigError(
                f"Each parameter must belong to exactly one part of optimizer.parts; {name!r} "
                f"({role}) is claimed by {', '.join(claims) or 'none'} of {', '.join(parts)}. "
                f"List {role!r} in the roles of one part."
            )
