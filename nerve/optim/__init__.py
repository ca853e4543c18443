"""Optimizers and schedules: parameter roles, combined optimizers, batched Adafactor, Dion and Muon,
learning rates."""

from nerve.optim.adafactor import Adafactor
from nerve.optim.build import (
    Part,
    Role,
    build_optimizer,
    check_parts,
    parameter_roles,
)
from nerve.optim.combined import CombinedOptimizer
from nerve.optim.dion import Dion
from nerve.optim.muon import Muon
from nerve.optim.schedule import Schedule

__all__ = [
    "Adafactor",
    "CombinedOptimizer",
    "Dion",
    "Muon",
    "Part",
    "Role",
    "Schedule",
    "build_optimizer",
    "check_parts",
    "parameter_roles",
]
