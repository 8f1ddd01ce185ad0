"""Digits as on a seven-segment display, slanted, shifted, of varying thickness and noisy."""

import numpy as np

# Ends of the segments, as (right, down) in units of half the height of a digit.
_SEGMENTS = np.array(
    [
        [[-0.5, -1], [0.5, -1]],  # top
        [[-0.5, -1], [-0.5, 0]],  # upper left
        [[0.5, -1], [0.5, 0]],  # upper right
        [[-0.5, 0], [0.5, 0]],  # middle
        [[-0.5, 0], [-0.5, 1]],  # lower left
        [[0.5, 0], [0.5, 1]],  # lower right
        [[-0.5, 1], [0.5, 1]],  # bottom
    ]
)
_LIT = ["012456", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356"]


def draw_digits(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, side, side) in [0, 1] and their labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    lit = np.array([[str(segment) in digit for segment in range(7)] for digit in _LIT])[labels]
    size = rng.uniform(0.6, 0.8, (count, 1, 1, 1))
    slant = rng.uniform(-0.4, 0.4, (count, 1, 1))
    ends = size * _SEGMENTS[None] + rng.uniform(-0.15, 0.15, (count, 1, 1, 2))
    ends[..., 0] -= slant * ends[..., 1]
    axis = np.linspace(-1, 1, side)
    pixels = np.stack(np.meshgrid(axis, axis, indexing="xy"), axis=-1).reshape(-1, 2)
    ink = np.zeros((count, len(pixels)))
    width = rng.uniform(0.08, 0.16, (count, 1))
    for segment in range(7):
        distance = _distance(pixels, ends[:, segment, 0], ends[:, segment, 1])
        stroke = np.exp(-0.5 * (distance / width) ** 2) * lit[:, segment, None]
        ink = np.maximum(ink, stroke)
    images = np.clip(ink + rng.normal(0, 0.35, ink.shape), 0, 1).astype(np.float32)
    return images.reshape(count, side, side), labels.astype(np.int32)


def _distance(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of every pixel (pixels, 2) to each image's segment from ``start`` to ``end`` (count, 2)."""
    along = end - start
    offset = pixels[None] - start[:, None]
    share = np.einsum("npk,nk->np", offset, along) / np.square(along).sum(1)[:, None]
    nearest = np.clip(share, 0, 1)[..., None] * along[:, None]
    return np.linalg.norm(offset - nearest, axis=-1)
