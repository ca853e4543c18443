"""The state of a measurement for one FFN besides all its samples: groups of them, and sites around
it."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nerve.measuring.eigenproblem import GroupEigenproblem
from nerve.measuring.ffns import FFN
from nerve.measuring.groups import OVERLAPPING, REST, Division
from nerve.sites_and_groups import GROUP_SITES, GROUPINGS, POOLED
from nerve.spectra import StreamingCovariance


class Key(NamedTuple):
    """The subject of a covariance: a site (or the FFN's input, instead of pre), and a group of its
    samples; `POOLED` twice for all of them."""

    side: str
    grouping: str = POOLED
    group: str = POOLED


class Parts:
    """The covariances of groups of an FFN's samples, and of sites around it.

    Those of the first grouping, including its rest, are merged exactly into the covariance of all
    samples, which therefore need not be accumulated separately. For further groupings the rest is
    dropped.

    Attributes:
        covariances: the covariances by key.
    """

    def __init__(self) -> None:
        self.covariances: dict[Key, StreamingCovariance] = {}

    def covariance(
        self, key: Key, dim: int, device: torch.device, product: str | None = None
    ) -> StreamingCovariance:
        """The covariance of a key, created without samples, accumulated with `product`."""
        if key not in self.covariances:
            self.covariances[key] = StreamingCovariance(dim, device=device, product=product)
        return self.covariances[key]

    def add_site(self, name: str, features: Tensor, mask: Tensor | None) -> None:
        """Adds samples of a site around the FFN, `[*samples, width]`."""
        self.covariance(Key(name), features.shape[-1], features.device).update(features, mask)

    def add(
        self,
        side: str,
        features: Tensor,
        divisions: Mapping[str, Division],
        product: str | None = None,
    ) -> None:
        """Adds the samples of a run, `[*samples, width]`, group by group."""
        rows = features.reshape(-1, features.shape[-1])
        for number, (grouping, division) in enumerate(divisions.items()):
            for group, chosen in (division.parts | division.others).items():
                if group == REST and number:
                    continue
                key = Key(side, grouping, group)
                covariance = self.covariance(key, rows.shape[-1], rows.device, product)
                covariance.update(rows.index_select(0, chosen))

    def merged(
        self, side: str, grouping: str, into: StreamingCovariance | None
    ) -> StreamingCovariance | None:
        """The covariance of all samples: those accumulated as such, plus all groups of a grouping.

        This uses up the rest. None if there is nothing.
        """
        target = self.covariances.pop(Key(side, grouping, REST), None)
        if into is not None:
            if target is not None:
                into.merge(target)
            target = into
        for key, covariance in self.covariances.items():
            if key[:2] != (side, grouping) or key.group in OVERLAPPING:
                continue
            if target is None:
                target = StreamingCovariance(covariance.dim, device=covariance.device)
            target.merge(covariance)
        return target

    def project(self, weight: Tensor, bias: Tensor | None) -> None:
        """Uses pre itself for groups from now on; what was accumulated from the input is
        converted."""
        for key in [key for key in self.covariances if self._is_input_of_group(key)]:
            of_input = self.covariances.pop(key)
            self.covariances[key._replace(side="pre")] = of_input.projected(weight, bias)

    def eigenproblems(self, ffn: FFN, weight: Tensor | None) -> Iterator[GroupEigenproblem]:
        """The eigenproblems, site by site and group by group.

        Args:
            ffn: the FFN.
            weight: W of pre = W x + b, if groups are of the input x.
        """
        for key in sorted(self.covariances, key=_place):
            if key.group == REST:
                continue
            covariance = self.covariances[key]
            of_input = self._is_input_of_group(key)
            assert weight is not None or not of_input
            yield GroupEigenproblem(
                layer=ffn.layer,
                ffn=ffn.name,
                site="pre" if of_input else key.side,
                grouping=key.grouping,
                group=key.group,
                n_samples=covariance.n_samples,
                dim=len(weight) if of_input and weight is not None else covariance.dim,
                matrix=covariance.scatter() if of_input else covariance.eigenproblem(),
                weight=weight if of_input else None,
            )

    @staticmethod
    def _is_input_of_group(key: Key) -> bool:
        return key.side == "input" and key.grouping != POOLED


def _place(key: Key) -> tuple[int, int, int]:
    """The position in the order of the catalog."""
    grouping = -1 if key.grouping == POOLED else list(GROUPINGS).index(key.grouping)
    names = (*GROUPINGS.get(key.grouping, (POOLED,)), REST)
    return GROUP_SITES.index(key.side), grouping, names.index(key.group)
