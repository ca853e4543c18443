"""Networks, assembled from the layers in `nerve.nn` and initialised."""

from nerve.models.build import MODELS, build_model, model_design
from nerve.models.initialization import scale_pre

__all__ = ["MODELS", "build_model", "model_design", "scale_pre"]
