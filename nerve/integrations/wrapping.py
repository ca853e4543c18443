"""The module inside a distributed or compiled model, and the device of its weights."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nerve.config import require
from nerve.errors import MeasurementError


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside wrappers for distribution or compilation."""
    require(
        not isinstance(model, DataParallel),
        "DataParallel runs copies of a model, which cannot be measured; use "
        "DistributedDataParallel.",
    )
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
            continue
        compiled = getattr(model, "_orig_mod", None)  # of torch.compile
        if not isinstance(compiled, nn.Module):
            return model
        model = compiled


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or one of its modules is compiled, so that its hooks must stay as they
    are."""
    return any(
        hasattr(each, "_orig_mod") or each._compiled_call_impl is not None
        for each in model.modules()
    )


def device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise MeasurementError(
            f"A model to watch needs weights; {type(model).__name__} has none. Watch the module "
            "that is trained."
        )
    return parameter.device
