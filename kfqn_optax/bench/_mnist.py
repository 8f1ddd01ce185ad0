"""MNIST: the four IDX files, gzip or not, from a given folder or downloaded once into a cache."""

import gzip
import os
import sys
import tempfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np

from kfqn_optax.bench._datasets import Dataset, require_folder
from kfqn_optax.bench._errors import UserError

SOURCE = "https://storage.googleapis.com/cvdf-datasets/mnist/"
SIDE = 28
_PARTS = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_GZIP_START = b"\x1f\x8b"


def load_mnist(data_dir: Path | None) -> Dataset:
    """Read the images in [0, 1]. The labels are read to check that the files belong together."""
    return Dataset(*(images for images, _ in load_labelled_mnist(data_dir)))


def load_labelled_mnist(data_dir: Path | None) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Images in [0, 1], (count, 784), and labels (count,), to train on and to test on."""
    folder = _cached_download() if data_dir is None else require_folder(data_dir)
    return tuple(_read_part(folder, prefix) for prefix in _PARTS.values())


def _read_part(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images_path = _find(folder, f"{prefix}-{_IMAGES}")
    labels_path = _find(folder, f"{prefix}-{_LABELS}")
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if images.shape[1:] != (SIDE, SIDE):
        raise UserError(f"{images_path}: images of {images.shape[1]}x{images.shape[2]}, expected 28x28")
    if len(images) != len(labels):
        raise UserError(
            f"{images_path} has {len(images)} images, {labels_path.name} {len(labels)} labels: "
            "they do not belong together"
        )
    return images.reshape(len(images), -1).astype(np.float32) / 255, labels.astype(np.int32)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{name} (or {name}.gz) is not in {folder}; all four files are at {SOURCE}")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, which has a magic number, the shape, then the values."""
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_START):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read, download it again: {error}") from error
    magic, header = bytes([0, 0, 8, dimensions]), 4 + 4 * dimensions
    if not content.startswith(magic) or len(content) < header:
        raise UserError(
            f"{path} is no IDX file of {dimensions}-dimensional bytes: "
            f"it starts with {content[:4].hex() or 'nothing'}, expected {magic.hex()}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(int)
    if len(content) - header != shape.prod():
        raise UserError(
            f"{path} is truncated or has a wrong header: {len(content) - header} values, "
            f"its header promises {'x'.join(map(str, shape))}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _cached_download() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "kfqn_optax" / "mnist"
    for prefix in _PARTS.values():
        for kind in (_IMAGES, _LABELS):
            path = folder / f"{prefix}-{kind}.gz"
            if not path.exists():
                _download(SOURCE + path.name, path)
    return folder


def _download(url: str, path: Path) -> None:
    """Fetch one file, which gets its name only when complete: a broken download leaves none."""
    print(f"downloading {url} to {path.parent}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
            partial.write(content)
        Path(partial.name).replace(path)
    except (OSError, HTTPException) as error:
        raise UserError(
            f"cannot download {url} to {path.parent} ({error}); "
            "fetch the four files by hand and pass --data-dir FOLDER"
        ) from error
