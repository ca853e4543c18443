"""The current locations of the classes and functions that a configuration names by `_target_`."""

from typing import Any

TARGETS = {
    path.rpartition(".")[2]: path
    for path in (
        "nerve.cli.sweep.check.CheckInPlaceOfRun",
        "nerve.data.corpus.python_source",
        "nerve.data.files.text_files",
        "nerve.data.glyphs.glyphs",
        "nerve.data.hub.hub_dataset",
        "nerve.data.hub.hub_images",
        "nerve.data.image_sets.cifar100",
        "nerve.data.image_sets.digits",
        "nerve.data.images.ImageDataModule",
        "nerve.data.text.TextDataModule",
        "nerve.optim.Adafactor",
        "nerve.optim.Dion",
        "nerve.optim.Muon",
        "nerve.training.loggers.CSVLogger",
        "nerve.training.loggers.WandbLogger",
    )
}
"""Everything that conf/ names below `nerve.`, by its last name. Modules move; configurations stored
earlier name the old locations."""

TRUSTED = ("nerve", "lightning", "torch", "pytorch_optimizer")
"""Packages whose classes and functions a configuration may call without a warning: all that conf/
names."""


def resolve_targets(values: Any) -> Any:
    """`values` with each `_target_` below `nerve.` at its current location; others are left as they
    are."""
    if isinstance(values, list):
        return [resolve_targets(value) for value in values]
    if not isinstance(values, dict):
        return values
    resolved = {key: resolve_targets(value) for key, value in values.items()}
    target = resolved.get("_target_")
    if isinstance(target, str) and target.startswith("nerve."):
        resolved["_target_"] = TARGETS.get(target.rpartition(".")[2], target)
    return resolved


def foreign_targets(values: Any) -> list[str]:
    """The targets in a configuration that belong neither to this project nor to the packages it
    trains with."""
    if isinstance(values, list):
        return sorted({target for value in values for target in foreign_targets(value)})
    if not isinstance(values, dict):
        return []
    inner = foreign_targets(list(values.values()))
    target = values.get("_target_")
    if isinstance(target, str) and target.partition(".")[0] not in TRUSTED:
        inner = sorted({*inner, target})
    return inner
