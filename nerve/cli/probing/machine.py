"""The device and dtype for probing a model."""

import torch

from nerve.config import require, require_choice
from nerve.errors import ConfigError, first_line

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def device_of(name: str | None) -> torch.device:
    """The device; by default a GPU if there is one.

    Raises:
        ConfigError: for a device that does not exist.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device must be a device of this machine, such as cpu or cuda; got {name!r} "
            f"({first_line(error)})."
        ) from error
    require(device.type != "meta", f"--device must hold weights; got {name!r}.")
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype; None for that of the weights.

    Raises:
        ConfigError: for another name.
    """
    if name is None:
        return None
    require_choice("--dtype", name, DTYPES)
    return DTYPES[name]
