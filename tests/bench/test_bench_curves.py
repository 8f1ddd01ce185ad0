from pathlib import Path

import numpy as np
import pytest

from kfqn_optax.bench import _curves
from kfqn_optax.bench._curves import load_curves, make_curves
from kfqn_optax.bench._errors import UserError


@pytest.fixture(scope="module")
def dataset():
    return load_curves(None)


def pca_error(images: np.ndarray, components: int) -> float:
    """Squared error of each image, summed over its pixels, left by the best linear code."""
    centred = (images - images.mean(axis=0)).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(centred.T @ centred / len(images))
    return float(eigenvalues[:-components].sum())


def test_set_has_the_published_sizes_and_range(dataset):
    assert dataset.train.shape == (20_000, 784)
    assert dataset.test.shape == (10_000, 784)
    for images in dataset:
        assert images.dtype == np.float32
        assert images.min() >= 0
        assert images.max() == 1


def test_error_of_pca_is_that_of_the_original_set(dataset):
    assert 5.3 < pca_error(dataset.train[:5_000], 18) < 6.5


def test_strokes_stay_in_the_image(dataset):
    images = dataset.train.reshape(-1, 28, 28)
    border = [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]]
    assert np.max(border) < 0.02


def test_images_differ_and_are_the_same_again():
    images = make_curves(3_000, seed=1)  # more than one chunk
    assert len(np.unique(images, axis=0)) == 3_000
    np.testing.assert_array_equal(images, make_curves(3_000, seed=1))
    assert not np.array_equal(images, make_curves(3_000, seed=2))


def test_straight_stroke_is_just_full_along_its_middle():
    points = np.array([[[14, 6], [14, 14], [14, 22]]], np.float32)
    image = _curves._draw(points).reshape(28, 28)
    np.testing.assert_allclose(image[14, 9:20], 1, atol=0.01)
    profile = np.exp(-0.5 * ((np.arange(28) - 14) / _curves._TIP) ** 2)
    np.testing.assert_allclose(image[:, 14], profile, atol=0.01)
    assert image[14, :3].max() < 0.01
    assert image[14, 26:].max() < 0.01


def test_stroke_goes_through_its_three_points():
    points = np.array([[[6, 8], [20, 14], [9, 21]]], np.float32)
    image = _curves._draw(points).reshape(28, 28)
    assert image[20, 14] > 0.9  # inside the stroke
    assert image[6, 8] > 0.3  # its ends, where half of the ink is missing
    assert image[9, 21] > 0.3
    assert image[6, 21] < 0.1


def test_data_dir_is_refused():
    with pytest.raises(UserError, match="generated"):
        load_curves(Path("anywhere"))
