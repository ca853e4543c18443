"""When a run saves."""

from dataclasses import dataclass, field

from nerve.config import require, require_count, require_reached, require_steps


@dataclass(frozen=True)
class CheckpointCadence:
    """When a run saves, beside its end and when it is asked to stop: at whichever is due first.

    Attributes:
        every_n_steps: optimizer steps from one checkpoint to the next; None for no such rule.
        every_n_minutes: minutes; None for no such rule.
        keep: optimizer steps after which the weights are kept for good; 0 is before training.

    Raises:
        ConfigError: for values that are not positive, and for steps that are not whole numbers.
    """

    every_n_steps: int | None = None
    every_n_minutes: int | float | None = None
    keep: list = field(default_factory=list)

    def __post_init__(self) -> None:
        require_count("checkpoint.every_n_steps", self.every_n_steps, or_null=True)
        minutes = self.every_n_minutes
        require(
            minutes is None or (isinstance(minutes, int | float) and minutes > 0),
            f"checkpoint.every_n_minutes must be null or a positive number; got {minutes!r}.",
        )
        require_steps("checkpoint.keep", self.keep, or_empty=True)

    def require_reached(self, max_steps: int) -> None:
        """Raises `ConfigError` for steps to keep that a run of `max_steps` steps does not do."""
        require_reached("checkpoint.keep", self.keep, max_steps)

    def is_due_at(self, step: int) -> bool:
        """Whether to save after `step`, whatever the time."""
        return bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0

    def is_due_after(self, seconds: float) -> bool:
        """Whether to save `seconds` after the last checkpoint, whatever the step."""
        return bool(self.every_n_minutes) and seconds >= 60 * (self.every_n_minutes or 0)
