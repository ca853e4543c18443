import numpy as np
import pytest
import torch

from nerve.data.batches import ShuffledOrder
from nerve.data.image_sets import ImageSet, LabeledImages, digits
from nerve.data.images import FlippedOrder, ImageDataModule
from nerve.errors import ConfigError, DataError

VALUES = {"batch_size": 4, "n_train_batches": 10, "seed": 0}


def random_images(n: int, seed: int) -> LabeledImages:
    rng = np.random.default_rng(seed)
    images = rng.integers([10, 60, 200], [20, 160, 250], size=(n, 6, 6, 3), dtype=np.uint8)
    return LabeledImages(np.moveaxis(images, -1, 1).copy(), np.arange(n) % 5)


@pytest.fixture
def image_set() -> ImageSet:
    splits = random_images(12, 0), random_images(9, 1)
    return ImageSet("random", n_classes=5, flips=True, read=lambda: splits)


@pytest.fixture
def make(image_set):
    def make(images=image_set, **changes):
        module = ImageDataModule(images, **(VALUES | changes))
        module.setup()
        return module

    return make


def normalized(images: np.ndarray, train: np.ndarray) -> np.ndarray:
    mean = train.mean(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    std = train.std(axis=(0, 2, 3), keepdims=True, dtype=np.float64)
    return (images - mean) / std


def test_held_out_images_are_the_test_set_normalized_by_training_statistics(make, image_set):
    train, test = image_set.read()
    batches = list(make().val_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_allclose(
        images.numpy(), normalized(test.images, train.images), rtol=1e-5, atol=1e-6
    )
    assert labels.tolist() == test.labels.tolist()


def test_shapes_and_types_are_those_stated(make):
    module = make()
    for images, labels in [*module.train_dataloader(), *module.val_dataloader()]:
        assert images.shape == (
            len(labels),
            module.n_channels,
            module.image_size,
            module.image_size,
        )
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.is_contiguous()
    assert (module.n_channels, module.image_size, module.n_classes) == (3, 6, 5)


def test_training_images_are_the_originals_or_their_mirror_images(make, image_set):
    train, _ = image_set.read()
    expected = normalized(train.images, train.images).astype(np.float32)
    n_mirrored = 0
    batches = list(make(n_train_batches=30).train_dataloader())
    for image, label in zip(
        *(torch.cat(parts).numpy() for parts in zip(*batches, strict=True)), strict=True
    ):
        same = [np.allclose(image, original, atol=1e-5) for original in expected]
        mirrored = [np.allclose(image, original[..., ::-1], atol=1e-5) for original in expected]
        assert sum(same) + sum(mirrored) == 1
        assert train.labels[np.argmax(np.add(same, mirrored))] == label
        n_mirrored += sum(mirrored)
    assert 40 < n_mirrored < 80  # of 120; within 3.6 standard deviations, and the seed is fixed


def test_a_set_that_may_not_be_mirrored_is_not(make, image_set):
    train, _ = image_set.read()
    module = make(ImageSet("upright", 5, flips=False, read=image_set.read), batch_size=12)
    images = next(iter(module.train_dataloader()))[0].numpy()
    expected = normalized(train.images, train.images)
    order = ShuffledOrder(12, 12, seed=0).indices(0)
    np.testing.assert_allclose(images, expected[order], rtol=1e-5, atol=1e-6)


def test_mirroring_is_a_function_of_seed_and_batch_and_leaves_the_order():
    order = FlippedOrder(ShuffledOrder(12, 8, seed=3))
    again = FlippedOrder(ShuffledOrder(12, 8, seed=3))
    for i in (5, 0, 5, 11):
        np.testing.assert_array_equal(order.indices(i), again.indices(i))
        np.testing.assert_array_equal(
            order.indices(i) % 12, ShuffledOrder(12, 8, seed=3).indices(i)
        )
    mirrored = np.stack([order.indices(i) // 12 for i in range(200)])
    assert set(mirrored.ravel()) == {0, 1}
    assert len({tuple(row) for row in mirrored}) > 100
    assert 0.45 < mirrored.mean() < 0.55


def test_a_resumed_loader_goes_on_with_the_same_images(make):
    whole = list(make().train_dataloader())
    resumed = make().train_dataloader()
    resumed.load_state_dict({"position": 6})
    for (images, labels), (expected, expected_labels) in zip(resumed, whole[6:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


def test_a_part_of_the_test_set_is_spread_over_it_whatever_the_seed(make, image_set):
    _, test = image_set.read()
    module = make(n_heldout=3, seed=5)
    labels = torch.cat([labels for _, labels in module.val_dataloader()])
    assert labels.tolist() == test.labels[[0, 3, 6]].tolist()
    assert module.n_heldout == 3
    assert module.fingerprints == make(n_heldout=3).fingerprints


def test_images_are_resized_to_the_size_asked_for(make):
    module = make(image_size=4)
    assert module.image_size == 4
    for small, large in zip(module.val_dataloader(), make().val_dataloader(), strict=True):
        assert small[0].shape[1:] == (3, 4, 4)
        expected = torch.nn.functional.interpolate(
            large[0], (4, 4), mode="bilinear", antialias=True, align_corners=False
        )
        assert torch.equal(small[0], expected)


def test_fingerprints_tell_apart_what_differs(make, image_set):
    original = make().fingerprints
    assert set(original) == {"corpus", "heldout"}
    other = ImageSet(
        "other", 5, flips=True, read=lambda: (random_images(12, 9), image_set.read()[1])
    )
    assert make(other).fingerprints["corpus"] != original["corpus"]
    assert make(other).fingerprints["heldout"] == original["heldout"]
    assert make(n_heldout=4).fingerprints["heldout"] != original["heldout"]
    assert make(image_size=4).fingerprints["heldout"] != original["heldout"]


def test_digits_have_the_stated_sizes():
    module = ImageDataModule(digits(), batch_size=64, n_train_batches=2, seed=0)
    module.prepare_data()
    module.setup()
    described = module.describe()
    assert described["n_train_images"] == 1797 - described["n_test_images"]
    assert described["n_heldout_images"] == described["n_test_images"] == module.n_heldout
    assert (module.n_channels, module.image_size, module.n_classes) == (1, 8, 10)
    images = torch.cat([images for images, _ in module.val_dataloader()])
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heldout": 0}, "data.n_heldout must be null or at least 1; got 0"),
        ({"image_size": 0}, "data.image_size must be null or at least 1; got 0"),
    ],
)
def test_values_out_of_range_are_errors_that_name_them(image_set, changes, message):
    with pytest.raises(ConfigError, match=message):
        ImageDataModule(image_set, **(VALUES | changes))


def test_more_held_out_images_than_there_are_is_an_error_with_both_numbers(make):
    with pytest.raises(DataError, match="got 10, and random has 9"):
        make(n_heldout=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, labels: (images, labels + 1), r"between 0 and n_classes - 1.*from 1 to 5"),
        (lambda images, labels: (images, labels - 1), r"range from -1 to 3 with n_classes=5"),
        (lambda images, labels: (images[0], labels), r"those of random have the shape \[3, 6, 6\]"),
        (lambda images, labels: (images[..., :5], labels), "6 x 5 pixels. Set data.image_size"),
        (lambda images, labels: (images, labels[1:]), r"with 11 labels"),
        (lambda images, labels: (images[:0], labels[:0]), r"\[0, 3, 6, 6\], with 0 labels"),
    ],
)
def test_images_of_another_form_are_refused_before_training(make, change, message):
    """Wrong labels would end the run in the loss, with an error of torch or of CUDA."""
    splits = LabeledImages(*change(*random_images(12, 0))), random_images(9, 1)
    with pytest.raises(DataError, match=message):
        make(ImageSet("random", n_classes=5, flips=True, read=lambda: splits))


def test_images_that_are_not_square_are_resized_if_a_size_is_given(make):
    splits = tuple(
        LabeledImages(split.images[:, :, :4].copy(), split.labels)
        for split in (random_images(12, 0), random_images(9, 1))
    )
    wide = ImageSet("wide", n_classes=5, flips=True, read=lambda: splits)
    for size in (6, 4, 3):
        images, _ = next(iter(make(wide, image_size=size).train_dataloader()))
        assert images.shape[1:] == (3, size, size)
        assert images.isfinite().all()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (np.s_[:, :1], "same channels; those of random have 3 and 1"),
        (np.s_[:, :, :4, :4], "same size; those of random have 6 and 4 .* Set data.image_size"),
    ],
)
def test_test_images_of_another_shape_are_refused(make, part, message):
    """Broadcasting would turn gray images into colored ones."""
    test = random_images(9, 1)
    splits = random_images(12, 0), LabeledImages(test.images[part].copy(), test.labels)
    with pytest.raises(DataError, match=message):
        make(ImageSet("random", n_classes=5, flips=True, read=lambda: splits))


def test_test_images_of_another_size_are_resized_if_a_size_is_given(make):
    test = random_images(9, 1)
    small = LabeledImages(test.images[:, :, :4, :4].copy(), test.labels)
    module = make(ImageSet("two", 5, False, lambda: (random_images(12, 0), small)), image_size=6)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        assert next(iter(loader))[0].shape[1:] == (3, 6, 6)


def test_a_constant_channel_is_refused(make):
    """Divided by its standard deviation, it would be NaN."""
    train = random_images(12, 0)
    train.images[:, 1] = 7
    module = make(ImageSet("gray", 5, flips=False, read=lambda: (train, random_images(9, 1))))
    with pytest.raises(DataError, match="channel 1 of gray is constant"):
        next(iter(module.val_dataloader()))


def test_asking_before_setup_is_an_error_that_says_so(image_set):
    with pytest.raises(DataError, match=r"Call setup\(\)"):
        _ = ImageDataModule(image_set, **VALUES).n_channels
