"""The devices that a run asks for, read from its values alone: torch takes seconds to import."""

from collections.abc import Mapping, Sequence
from typing import Any


def n_devices_of(trainer: Mapping[str, Any]) -> int | None:
    """How many there are on each node; None where Lightning is to find out.

    Args:
        trainer: values of the group `trainer`.
    """
    devices = trainer["devices"]
    if isinstance(devices, int | str) and str(devices).isdigit():
        return int(devices)
    return None if isinstance(devices, str) or not isinstance(devices, Sequence) else len(devices)
