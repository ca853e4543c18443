"""Networks, built from the layers in `nerve.nn` and initialized."""

from nerve.models.build import MODELS, Skeleton, build_model, model_design
from nerve.models.initialization import scale_pre
from nerve.models.regularizer import Penalty, Regularizer

__all__ = [
    "MODELS",
    "Penalty",
    "Regularizer",
    "Skeleton",
    "build_model",
    "model_design",
    "scale_pre",
]
