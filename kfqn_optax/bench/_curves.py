"""CURVES: 28x28 images, each of one smooth stroke, generated in the process.

"Generated from three randomly chosen points in two dimensions" is all that is published about
the original set. Here three points are drawn uniformly in a box around the centre. The parabola
through them (at t = 0, 1/2, 1) is drawn by a pen with a Gaussian tip, which lays down ink in
proportion to the length of its path: the middle of a straight stroke is just full, which is 1.
The size of the box and the width of the tip are free; they are chosen such that the error of
PCA with 18 components is that of the original set (a test checks it). The box is small enough
that the parabola, which can overshoot its points by an eighth of the box, stays in the image.

The losses are not comparable with those published for the original set.
"""

from pathlib import Path

import numpy as np

from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._errors import UserError

SIDE = 28
TRAIN, TEST = 20_000, 10_000
_BOX = (4.8, 22.2)  # in pixels; the centre of the image is at 13.5
_TIP = 1.0  # standard deviation of the pen's tip, in pixels
_DABS = 64  # points of the path at which ink is laid down
_CHUNK = 2_000  # images drawn at once: bounds the memory


def load_curves(data_dir: Path | None) -> Dataset:
    """Generate the training and the test set, the same in every run."""
    if data_dir is not None:
        raise UserError("--data-dir: curves are generated in the process; leave the option out")
    images = make_curves(TRAIN + TEST, seed=0)
    return Dataset(images[:TRAIN], images[TRAIN:])


def make_curves(count: int, seed: int) -> np.ndarray:
    """Return ``count`` images in [0, 1] of shape (count, 784)."""
    points = np.random.default_rng(seed).uniform(*_BOX, size=(count, 3, 2)).astype(np.float32)
    images = np.empty((count, SIDE * SIDE), np.float32)
    for start in range(0, count, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        images[chunk] = _draw(points[chunk])
    return images


def _draw(points: np.ndarray) -> np.ndarray:
    """Draw the strokes through ``points`` (count, 3, 2).

    A Gaussian tip is a product of a row profile and a column profile, so the sum over the path is
    one small matrix product for each image.
    """
    t = (np.arange(_DABS, dtype=np.float32) + 0.5) / _DABS
    through = np.stack([(2 * t - 1) * (t - 1), 4 * t * (1 - t), t * (2 * t - 1)], axis=1)
    slope = np.stack([4 * t - 3, 4 - 8 * t, 4 * t - 1], axis=1)
    path = through @ points  # (count, dabs, 2)
    length = np.linalg.norm(slope @ points, axis=-1, keepdims=True) / _DABS

    pixels = np.arange(SIDE, dtype=np.float32)
    profile = np.exp(-0.5 * np.square((path[..., None] - pixels) / _TIP))  # (count, dabs, 2, side)
    rows = profile[:, :, 0] * length / (_TIP * np.sqrt(2 * np.pi, dtype=np.float32))
    ink = rows.transpose(0, 2, 1) @ profile[:, :, 1]
    return np.minimum(ink, 1).reshape(len(points), -1)
