import hashlib

import numpy as np
import pytest

from nerve.data import glyphs as glyphs_module
from nerve.data.glyphs import SIZE, TEST_FONTS, TRAIN_FONTS, glyphs
from nerve.data.images import ImageDataModule

AS_DRAWN = "fa84867254b6d650"


@pytest.fixture(scope="module")
def splits():
    return glyphs().read()


def square(low: float, high: float) -> np.ndarray:
    corners = np.array([[low, low], [high, low], [high, high], [low, high]])
    return np.stack([corners, np.roll(corners, -1, axis=0)], axis=1)


def drawn(edges: np.ndarray, turn=0.0, across=0.0, down=0.0) -> np.ndarray:
    """One image, in shares of pixels, of edges rotated by radians and shifted by pixels."""
    unit = np.array([turn / glyphs_module._MAX_TURN, across / 5, down / 5])
    return glyphs_module._drawn(edges, unit[:, None])[0] / 255


def test_a_pixel_is_the_share_of_it_that_the_shape_covers():
    """A square from 4.5 to 8.25 pixels from the center; scan lines resolve quarters of a pixel."""
    image = drawn(square(4.5, 8.25))
    edge = np.zeros(SIZE)
    edge[20], edge[21:24], edge[24] = 0.5, 1, 0.25
    np.testing.assert_allclose(image, np.outer(edge, edge), atol=0.003)


@pytest.mark.parametrize(("across", "down"), [(3, 0), (0, -2), (-5, 5)])
def test_a_shift_by_whole_pixels_moves_the_image(across, down):
    shifted = np.roll(drawn(square(-4.5, 3.25)), (down, across), (0, 1))
    np.testing.assert_array_equal(drawn(square(-4.5, 3.25), across=across, down=down), shifted)


@pytest.mark.parametrize("turn", [-0.6, 0.2, 0.5])
def test_a_turn_keeps_the_area_and_the_middle(turn):
    image = drawn(square(-6, 6), turn=turn)
    assert image.sum() == pytest.approx(144, abs=1)
    for axis in (0, 1):
        middle = (np.arange(SIZE) + 0.5) @ image.sum(axis=axis) / image.sum()
        assert middle == pytest.approx(16, abs=0.02)
    assert not np.allclose(image, drawn(square(-6, 6)))


def test_a_hole_is_empty_and_what_leaves_the_image_is_cut():
    ring = np.concatenate([square(-8, 8), square(-4, 4)[:, ::-1]])
    assert drawn(ring).sum() == pytest.approx(256 - 64, abs=0.5)
    assert drawn(square(10, 20)).sum() == pytest.approx(36, abs=0.5)


def test_every_letter_of_every_font_is_there_as_often(splits):
    for split, fonts, variants in zip(splits, (TRAIN_FONTS, TEST_FONTS), (12, 8), strict=True):
        assert split.images.shape == (len(fonts) * 52 * variants, 1, SIZE, SIZE)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        np.testing.assert_array_equal(np.bincount(split.labels), len(fonts) * variants)
        assert split.images.max(axis=(1, 2, 3)).min() > 100


def test_no_font_and_no_image_is_in_both_splits(splits):
    assert not set(TRAIN_FONTS) & set(TEST_FONTS)
    train, test = ({image.tobytes() for image in split.images} for split in splits)
    assert not train & test
    assert len(train) > 0.999 * len(splits[0].labels)


def test_the_images_are_the_same_on_every_machine(splits):
    """Independent of matplotlib's version, which does not draw them."""
    total = hashlib.sha256(b"".join(split.images.tobytes() for split in splits))
    assert total.hexdigest()[:16] == AS_DRAWN


def test_the_task_has_no_ceiling(splits):
    """A linear least-squares classifier is far from perfect on unseen fonts, and far above chance,
    1 in 52."""
    (train, labels), (test, answers) = splits
    features = np.linalg.qr(np.random.Generator(np.random.PCG64(0)).normal(size=(1024, 200)))[0]
    seen, unseen = (split.reshape(len(split), -1) @ features for split in (train, test))
    targets = np.eye(52)[labels] - 1 / 52
    weights = np.linalg.solve(seen.T @ seen + 1e5 * np.eye(200), seen.T @ targets)
    accuracy = np.mean((unseen @ weights).argmax(axis=1) == answers)
    assert 3 / 52 < accuracy < 0.5


def test_a_module_serves_them(splits, monkeypatch):
    monkeypatch.setattr(glyphs_module, "_read_glyphs", lambda: splits)
    module = ImageDataModule(glyphs(), batch_size=8, n_train_batches=2, seed=0)
    module.setup()
    assert (module.image_size, module.n_channels, module.n_classes) == (32, 1, 52)
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (8, 1, 32, 32)
    assert labels.shape == (8,)
