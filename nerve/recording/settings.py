"""What is measured of a model while it trains, and when."""

from dataclasses import dataclass, field

from nerve.config import require, require_choice, require_count, require_several
from nerve.metric_names import AROUND, GROUPS


@dataclass(frozen=True)
class MonitorSettings:
    """The values of `monitor` that decide what a run measures.

    Attributes:
        every_n_steps: optimizer steps from one measurement to the next.
        source: `heldout` takes the features of the validation batches, in eval mode: one forward
            pass gives the loss and the spectra. `train` takes those of every micro-batch of the
            training step that follows, in train mode; the last step has no row then.
        spectra: whether eigenvalues are stored beside the metrics; `auto` for d_ff up to 1024.
        layers: the layers to measure; None for all.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper.
        skip_first: leaves so many positions at the beginning of each sequence out of the features,
            not of the loss.
        groups: groupings of the samples, of `position`, `frequency` and `halves`, whose groups are
            measured by themselves as well.
        groups_every: groups and sites are measured with every so many-th measurement, the first
            among them.
        sites: of `stream_in`, `input`, `output` and `stream_out` those that are measured as well.

    Raises:
        ConfigError: for a value out of range.
    """

    every_n_steps: int = 25
    source: str = "heldout"
    spectra: bool | str = "auto"
    layers: list | None = None
    shortcut: bool = True
    skip_first: int = 0
    groups: list = field(default_factory=list)
    groups_every: int = 1
    sites: list = field(default_factory=list)

    def __post_init__(self) -> None:
        require_count("monitor.every_n_steps", self.every_n_steps)
        require_choice("monitor.source", self.source, ("heldout", "train"))
        require(
            self.spectra in (True, False, "auto"),
            f"monitor.spectra must be true, false or auto; got {self.spectra!r}.",
        )
        require_count("monitor.skip_first", self.skip_first, least=0)
        require_several("monitor.groups", self.groups, GROUPS)
        require_several("monitor.sites", self.sites, AROUND)
        require_count("monitor.groups_every", self.groups_every)
