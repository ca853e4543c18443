"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

from collections.abc import Collection, Sequence

from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.accumulator import Accumulator, Side, eigenproblems
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra, GroupEigenproblem
from nerve.measuring.ffns import FFNAdapter, pool_of
from nerve.measuring.groups import NOT_GROUPED, Grouped
from nerve.measuring.masks import ALL, Chosen
from nerve.measuring.probe import Probe
from nerve.measuring.reduction import reduce
from nerve.measuring.samples import Samples
from nerve.progress import Progress, unseen

Pools = dict[tuple[int, str], Accumulator]
"""For each layer and name, the samples of all FFNs that are pooled under it, such as all experts of
a layer; they have a row of their own."""


class Measurement:
    """Accumulates the covariances of every FFN's features over forward passes.

    Between `start()` and `stop()` each forward pass of the model is measured; `finish_forward()`
    must follow each of them.

    Args:
        probe: taps the FFNs to measure; installed by the caller.
        shortcut: whether pre may be computed from the covariance of the FFN's input, C_pre =
            W C_x Wᵀ, where that is as exact and cheaper (float32 and float64 features); `projected`
            does so for 16-bit features, too, leaving out their own rounding if that is less than
            5e-5 of the variance; otherwise pre itself is used.
        skip_first: number of positions to skip at the beginning of each sequence.
        grouped: groups of the samples that are measured separately, too.
        sites: the sites to measure around the FFNs, some of `nerve.sites_and_groups.AROUND`; the
            probe must tap them, except for `input`.
        pools: by layer and name, the pools of an earlier measurement, which are continued; new
            ones are added.
        open_pools: layer and name of pools that a later measurement continues: they have no
            eigenproblem yet.

    Raises:
        MeasurementError: for a `skip_first` that is not a nonnegative integer.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        shortcut: bool | str = True,
        skip_first: int = 0,
        grouped: Grouped = NOT_GROUPED,
        sites: Collection[str] = (),
        pools: Pools | None = None,
        open_pools: Collection[tuple[int, str]] = (),
    ) -> None:
        if type(skip_first) is not int or skip_first < 0:
            raise MeasurementError(
                f"skip_first must be a number of positions, 0 or more; got {skip_first!r}."
            )
        self._probe = probe
        self._samples = Samples(probe, skip_first, grouped)
        self._sites = sites
        self._has_parts = bool(grouped.groupings or sites)
        self._n_forwards = 0
        self._of = [Accumulator(ffn, shortcut=shortcut) for ffn in probe.ffns]
        self._pools = _pools_of(self._of, {} if pools is None else pools)
        self._open_pools = open_pools
        self._is_pooled = False

    def start(self, chosen: Chosen = ALL) -> None:
        """Starts measuring forward passes, with the samples that count.

        Raises:
            MeasurementError: for a mask with values other than 0 and 1, or one without an FFN.
        """
        self._samples.start(chosen)
        self._probe.start(self._accumulate, self._take_site if self._sites else None)

    def stop(self) -> None:
        """Stops measuring; allowed at any time."""
        self._probe.stop()

    def finish_forward(self) -> None:
        """Ends one forward pass; raises `MeasurementError` for an FFN that did not run as often as
        its description says."""
        self._probe.finish_forward()
        for of in self._of:
            of.finish_forward()
        self._n_forwards += 1
        self._samples.finish_forward()

    def require_positions(self) -> None:
        """Raises `MeasurementError` if `skip_first` leaves no position of any sequence."""
        self._samples.require_positions()

    def reduce(self) -> None:
        """Combines the samples of all processes; each process then has the eigenproblems of its
        share.

        Every process must call it, even one that has measured nothing.
        """
        self._n_forwards = reduce(self._rows(), self._n_forwards)

    def eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[FFNEigenproblem]:
        """The eigenproblems to solve: one for each FFN, in the order given, and one for each pool,
        after its last FFN.

        Args:
            share, n_shares: selects every `n_shares`-th eigenproblem, starting with number `share`,
                as the share of one of several processes.

        Raises:
            MeasurementError: if nothing was measured.
        """
        return eigenproblems(self._rows()[share::n_shares], self._n_forwards)

    def group_eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[GroupEigenproblem]:
        """The eigenproblems of groups and sites of the same FFNs. The arguments are those of
        `eigenproblems`."""
        if not self._has_parts:
            return []
        mine = self._rows()[share::n_shares]
        return [problem for each in mine for problem in each.group_eigenproblems()]

    @property
    def products(self) -> set[str]:
        """The products that were used for the covariances of all FFNs (`nerve.spectra.product`)."""
        covariances = [each for of in self._of for each in of.covariances.values()]
        return {name for covariance in covariances for name in covariance.products}

    def spectra(self, progress: Progress = unseen) -> list[FFNSpectra]:
        """Solves the eigenproblems, one after the other. Raises as `eigenproblems` does."""
        eigenproblems = self.eigenproblems()
        solved: list[FFNSpectra] = []
        for eigenproblem in eigenproblems:
            progress("eigenproblems", len(solved), len(eigenproblems))
            solved.append(eigenproblem.solve())
        return solved

    def _accumulate(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        of = self._of[index]
        of.see(inputs, pre)
        takes_input = self._takes_input(index)
        features: dict[Side, Tensor] = {"input": inputs} if of.of_input or takes_input else {}
        taken = self._samples.taken(index, inputs, features | {"pre": pre, "post": post})
        if takes_input:
            of.parts.add_site("input", taken.features["input"], taken.mask)
        of.add(*taken)
        if index in self._pools:
            self._pools[index].add_shares(taken.features, taken.mask, taken.unpadded)

    def _takes_input(self, index: int) -> bool:
        return "input" in self._sites and self._probe.sites[index][0].of == "output"

    def _take_site(self, index: int, name: str, features: Tensor) -> None:
        """Adds the features of a site around an FFN."""
        self._of[index].parts.add_site(name, *self._samples.taken_around(index, features))

    def _rows(self) -> list[Accumulator]:
        """The accumulators of FFNs and pools in the order of rows; pools are complete from the
        first call on."""
        pools = [
            pool
            for pool in dict.fromkeys(self._pools.values())
            if (pool.ffn.layer, pool.ffn.name) not in self._open_pools
        ]
        last = {pool: index for index, pool in self._pools.items()}
        if not self._is_pooled:
            self._is_pooled = True
            for each in self._of:
                each.merge_groups()
            for index, pool in self._pools.items():
                pool.merge(self._of[index])
        rows: list[Accumulator] = []
        for index, each in enumerate(self._of):
            rows.append(each)
            rows += [pool for pool in pools if last[pool] == index]
        return rows


def _pools_of(members: Sequence[Accumulator], pools: Pools) -> dict[int, Accumulator]:
    """For the index of each FFN, the accumulator of its pool, which is added to `pools` if new."""
    found = {}
    for index, member in enumerate(members):
        ffn, name = member.ffn, pool_of(member.ffn)
        if name is not None:
            pool = FFNAdapter(ffn.layer, name, ffn.pre, ffn.post, n_runs=None)
            key = (ffn.layer, name)
            found[index] = pools.setdefault(key, Accumulator(pool, shortcut=False))
    return found
