"""Labeled images as batches for a classifier."""

import hashlib
from functools import cached_property
from types import NoneType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nerve.config import require, require_type
from nerve.data.batches import (
    Batch,
    BatchDataModule,
    BatchLoader,
    HeldOutBatches,
    Order,
    ShuffledOrder,
    random_bits,
)
from nerve.data.image_sets import ImageSet, LabeledImages
from nerve.errors import DataError


class FlippedOrder:
    """An order in which item n_items + k stands for the mirror image of item k.

    Each appearance of an item is mirrored with probability one half, as a pure function of
    (seed, batch index), whatever the number of processes.
    """

    def __init__(self, order: ShuffledOrder) -> None:
        self.batch_size = order.batch_size
        self._order = order

    def indices(self, i: int) -> np.ndarray:
        """The items of batch `i`, int64 `[batch_size]`, below 2 n_items."""
        # The last number of the key makes these bits differ from those of the permutations.
        mirrored = random_bits(self.batch_size, self._order.seed, i, 1) >> np.uint64(63)
        return self._order.indices(i) + self._order.n_items * mirrored.astype(np.int64)


class ImageDataModule(BatchDataModule):
    """Batches of images float32 `[batch, channels, size, size]` and labels int64 `[batch]`.

    Each channel is shifted and scaled to mean 0 and variance 1 over the training images. Training
    images are mirrored at random if the set allows it. The held-out set is spread evenly over the
    test images and does not depend on `seed`.

    Args:
        images: the image set.
        batch_size: images per micro-batch, over all processes.
        n_train_batches: length of the training loader.
        seed: only determines the order of training and the mirroring.
        n_heldout: number of test images in the held-out set; None for all.
        image_size: pixels per side to which images are resized (bilinear, antialiased); None keeps
            their size.

    Raises:
        ConfigError: for values out of range.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        batch_size: int,
        n_train_batches: int,
        seed: int,
        n_heldout: int | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, n_train_batches=n_train_batches, seed=seed)
        for key, value in (("n_heldout", n_heldout), ("image_size", image_size)):
            require_type(f"data.{key}", value, int, NoneType)
            require(
                value is None or value >= 1, f"data.{key} must be null or at least 1; got {value}."
            )
        self.images = images
        self._n_heldout = n_heldout
        self._image_size = image_size
        self._splits: tuple[LabeledImages, LabeledImages] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads the images; may be called again.

        Raises:
            DataError: if they cannot be read, do not have the form of `LabeledImages`, or if
                `n_heldout` exceeds the test set.
        """
        if self._splits is not None:
            return
        train, test = self.images.read()
        for split in (train, test):
            _require_valid(split, self.images)
            _require_square(split, self.images, self._image_size)
        _require_alike(train, test, self.images, self._image_size)
        if self._n_heldout is not None and self._n_heldout > len(test.labels):
            raise DataError(
                f"data.n_heldout must not exceed the number of test images; got {self._n_heldout}, "
                f"and {self.images.name} has {len(test.labels)}. Lower it, or set it to null for "
                "all."
            )
        self._splits = train, test

    def train_dataloader(self) -> BatchLoader[Batch]:
        """`n_train_batches` shuffled batches; the loader's state resumes exactly."""
        return self._train_loader(self._fetch_train, self._order)

    def val_dataloader(self) -> HeldOutBatches[Batch]:
        """The held-out images, in the same batches each time; the last may be smaller."""
        return self._heldout_batches(self._fetch_heldout, self.n_heldout)

    @property
    def image_size(self) -> int:
        """Pixels per side of the images in a batch."""
        return self._image_size or self._train.images.shape[-1]

    @property
    def n_channels(self) -> int:
        """Color channels of an image."""
        return self._train.images.shape[1]

    @property
    def n_classes(self) -> int:
        """Labels are 0 to `n_classes` - 1."""
        return self.images.n_classes

    @property
    def n_heldout(self) -> int:
        """Number of images in the held-out set."""
        return len(self._heldout.labels)

    @property
    def n_heldout_targets(self) -> int:
        """Number of targets that the validation loss is averaged over: images."""
        return self.n_heldout

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes that must be equal for losses to be comparable: of all images, and of the held-out
        ones."""
        size = str(self.image_size).encode()
        return {
            "corpus": _fingerprint(size, *self._train, *self._test),
            "heldout": _fingerprint(size, *self._heldout),
        }

    def describe(self) -> dict[str, int | float | str]:
        """Counts, for the log."""
        n_train = len(self._train.labels)
        return {
            "corpus": self.images.name,
            "n_train_images": n_train,
            "n_test_images": len(self._test.labels),
            "n_heldout_images": self.n_heldout,
            "n_train_epochs": self.n_train_batches * self.batch_size / n_train,
            "n_classes": self.n_classes,
            "n_channels": self.n_channels,
            "image_size": self.image_size,
        }

    @property
    def _train(self) -> LabeledImages:
        return self._both_splits()[0]

    @property
    def _test(self) -> LabeledImages:
        return self._both_splits()[1]

    def _both_splits(self) -> tuple[LabeledImages, LabeledImages]:
        if self._splits is None:
            raise DataError("The data must be set up first. Call setup().")
        return self._splits

    @cached_property
    def _heldout(self) -> LabeledImages:
        n_test = len(self._test.labels)
        n_heldout = n_test if self._n_heldout is None else self._n_heldout
        spread = np.arange(n_heldout) * n_test // n_heldout
        return LabeledImages(self._test.images[spread], self._test.labels[spread])

    @cached_property
    def _order(self) -> Order:
        order = ShuffledOrder(len(self._train.labels), self.batch_size, self.seed)
        return FlippedOrder(order) if self.images.flips else order

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training images, float32
        `[channels, 1, 1]`."""
        levels = np.arange(256)
        images = self._train.images.swapaxes(0, 1).reshape(self.n_channels, -1)
        counts = np.stack([np.bincount(channel, minlength=256) for channel in images])
        shares = counts / images.shape[1]
        mean = shares @ levels
        std = np.sqrt(np.sum(shares * (levels - mean[:, None]) ** 2, axis=1))
        if not std.all():
            raise DataError(
                "Each channel is divided by its standard deviation over the training images; "
                f"channel {np.argmin(std)} of {self.images.name} is constant. Use "
                "images in which it varies."
            )
        return _per_channel(mean), _per_channel(std)

    def _fetch_train(self, indices: np.ndarray) -> Batch:
        mirrored, items = np.divmod(indices, len(self._train.labels))
        images, labels = self._normalized(self._train, items)
        flipped = torch.from_numpy(mirrored == 1)[:, None, None, None]
        return torch.where(flipped, images.flip(-1), images), labels

    def _fetch_heldout(self, indices: np.ndarray) -> Batch:
        return self._normalized(self._heldout, indices)

    def _normalized(self, split: LabeledImages, items: np.ndarray) -> Batch:
        mean, std = self._mean_and_std
        images = (torch.from_numpy(split.images[items]).float() - mean) / std
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = interpolate(images, size, mode="bilinear", antialias=True)
        return images, torch.from_numpy(split.labels[items])


def _require_valid(split: LabeledImages, images: ImageSet) -> None:
    shape, labels = split.images.shape, split.labels
    if len(shape) != 4 or labels.shape != shape[:1] or not len(labels):
        raise DataError(
            "Images must have the shape [n, channels, height, width], each with a label; those of "
            f"{images.name} have the shape {list(shape)}, with {labels.size} labels."
        )
    if labels.min() < 0 or labels.max() >= images.n_classes:
        raise DataError(
            f"Labels must lie between 0 and n_classes - 1; those of {images.name} range from "
            f"{labels.min()} to {labels.max()} with n_classes={images.n_classes}. Set "
            "data.images.n_classes, or choose another label column."
        )


def _require_square(split: LabeledImages, images: ImageSet, image_size: int | None) -> None:
    *_, height, width = split.images.shape
    if image_size is None and height != width:
        raise DataError(
            f"Images must be square; those of {images.name} have {height} x {width} pixels. Set "
            "data.image_size, to which they are resized."
        )


def _require_alike(
    train: LabeledImages, test: LabeledImages, images: ImageSet, image_size: int | None
) -> None:
    (n, *size), (n_test, *size_test) = train.images.shape[1:], test.images.shape[1:]
    if n != n_test:
        raise DataError(
            f"Training and test images must have the same channels; those of {images.name} have "
            f"{n} and {n_test}. Convert them."
        )
    if image_size is None and size != size_test:
        raise DataError(
            f"Training and test images must have the same size; those of {images.name} have "
            f"{size[0]} and {size_test[0]} pixels per side. Set data.image_size, to which they are "
            "resized."
        )


def _per_channel(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))[:, None, None]


def _fingerprint(first: bytes, *arrays: np.ndarray) -> str:
    total = hashlib.sha256(first)
    for array in arrays:
        total.update(
            f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
        )
    return total.hexdigest()[:16]
