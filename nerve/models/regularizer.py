"""The spectral regularizer (ours): a term of the loss that flattens or sharpens spectra."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nerve.config import require, require_choice, require_layers
from nerve.nn.ffn import FeedForward
from nerve.sites_and_groups import SITES
from nerve.spectra.log_ratio import log_participation_ratio

REGULARIZERS = ("none", "participation_ratio")


@dataclass(frozen=True)
class Regularizer:
    """The term added to the training loss: `weight` · Σ log PR over FFNs.

    It is a sum, so that the pressure on a layer does not depend on how many others are included. PR
    does not depend on the scale of features, so the weight means the same in every layer.

    Attributes:
        name: one of `REGULARIZERS`.
        weight: a negative weight raises PR, a positive one lowers it.
        site: one of `SITES`, the features whose PR is used.
        layers: the layers whose FFNs are included; None for all.
        n_tokens: number of samples per FFN and micro-batch, spread evenly.

    Raises:
        ConfigError: for a value out of range, or one that would have no effect.
    """

    name: str = "none"
    weight: int | float = 0.0
    site: str = "post"
    layers: list | None = None
    n_tokens: int = 16_384

    def __post_init__(self) -> None:
        require_choice("regularizer.name", self.name, REGULARIZERS)
        require_choice("regularizer.site", self.site, SITES)
        require(
            self.name != "none" or self.weight == 0,
            f"regularizer.weight={self.weight} has no effect with regularizer.name=none. Use "
            "regularizer=participation_ratio.",
        )
        require(
            self.n_tokens >= 2,
            "regularizer.n_tokens must be at least 2, since one sample has no covariance; got "
            f"{self.n_tokens}.",
        )

    def ffns(self, model: nn.Module) -> list[FeedForward]:
        """The FFNs of a network on which it acts.

        Raises:
            ConfigError: for layers that the network does not have.
        """
        if self.name == "none":
            return []
        found = [module for module in model.modules() if isinstance(module, FeedForward)]
        require_layers("regularizer.layers", self.layers, sorted({ffn.layer for ffn in found}))
        return [ffn for ffn in found if self.layers is None or ffn.layer in self.layers]


class Penalty:
    """Computes the term of a `Regularizer` in a forward pass of a network, with hooks on its FFNs.

    The hooks must be in place before the network is compiled; they do nothing between `finish` and
    the next `start`.

    Args:
        model: the network.
        regularizer: the regularizer that acts on it.

    Raises:
        ConfigError: as in `Regularizer.ffns`.
    """

    def __init__(self, model: nn.Module, regularizer: Regularizer) -> None:
        self.regularizer = regularizer
        self._terms: list[Tensor] | None = None
        for ffn in regularizer.ffns(model):
            # The inputs of these two modules, so that the matrix that computes pre has no hook.
            behind = ffn.act if regularizer.site == "pre" else ffn.post
            behind.register_forward_pre_hook(self._take)

    def start(self) -> None:
        """Starts taking features."""
        self._terms = []

    def finish(self) -> Float[Tensor, ""]:
        """The term of the forward pass since `start`."""
        terms, self._terms = self._terms, None
        assert terms is not None
        return self.regularizer.weight * torch.stack(terms).sum()

    def _take(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._terms is not None:
            term = log_participation_ratio(arguments[0], self.regularizer.n_tokens)
            self._terms.append(term)
