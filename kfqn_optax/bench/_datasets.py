"""What every data set is here: two float32 arrays of flattened images, one image a row.

The three sources are `_curves.py` (generated), `_mnist.py` (IDX files) and `_faces.py` (made from
photographs).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from kfqn_optax.bench._errors import UserError


class Dataset(NamedTuple):
    """Images to train on and images to test on, each of shape (count, pixels), float32."""

    train: np.ndarray
    test: np.ndarray


def require_folder(data_dir: Path) -> Path:
    """Return ``data_dir`` if it is a folder; a mistyped path gets its own message."""
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such folder")
    return data_dir
