"""Where the classes and functions are that a configuration names by `_target_`."""

from typing import Any

TARGETS = {
    path.rpartition(".")[2]: path
    for path in (
        "nerve.cli.experiment.check.CheckInPlaceOfRun",
        "nerve.data.corpus.python_source",
        "nerve.data.files.text_files",
        "nerve.data.hub.hub_dataset",
        "nerve.data.hub.hub_images",
        "nerve.data.image_sets.cifar100",
        "nerve.data.image_sets.digits",
        "nerve.data.images.ImageDataModule",
        "nerve.data.text.TextDataModule",
        "nerve.optim.Dion",
        "nerve.training.loggers.CSVLogger",
        "nerve.training.loggers.WandbLogger",
    )
}
"""All that conf/ names below `nerve.`, by its last name. Modules move; a configuration that was
stored before names them where they were."""


def resolve_targets(values: Any) -> Any:
    """`values` with each `_target_` below `nerve.` where it is now; others are left as they are."""
    if isinstance(values, list):
        return [resolve_targets(value) for value in values]
    if not isinstance(values, dict):
        return values
    resolved = {key: resolve_targets(value) for key, value in values.items()}
    target = resolved.get("_target_")
    if isinstance(target, str) and target.startswith("nerve."):
        resolved["_target_"] = TARGETS.get(target.rpartition(".")[2], target)
    return resolved
