"""FACES: 25x25 patches made from the 400 ORL photographs of 40 people.

Published of the original set: 414 patches a photograph, rotated by up to +-90 degrees, scaled
by 1.4 to 1.8, cropped and subsampled; people split 25/5/10 into training, validation and test;
zero mean for each pixel, then one scalar such that the mean pixel variance is 1. Left open, and
chosen here:

* angle and scale are uniform; so is the centre of the crop, within +-8 pixels of the photograph's;
* the crop of the enlarged photograph is 75x75, of which every third pixel of every third row is
  kept, so that the error of PCA with 30 components is near that of the original set. With these
  numbers the crop never leaves the photograph;
* values between the pixels of the photograph are interpolated bilinearly;
* people are taken in the order of their numbers; the validation set is not used and not made.

The losses are not comparable with those published for the original set.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from kfqn_optax.bench._datasets import Dataset, require_folder
from kfqn_optax.bench._errors import UserError

FILE = "orl_faces.npz"
PATCHES = 414  # of each photograph
SIDE = 25
TRAIN_PEOPLE, VALIDATION_PEOPLE, TEST_PEOPLE = 25, 5, 10
_PHOTOGRAPH = (112, 92)
_ANGLE, _SCALE, _OFFSET, _STRIDE = np.pi / 2, (1.4, 1.8), 8.0, 3
_CHUNK = 4_000  # patches made at once: bounds the memory


def load_faces(data_dir: Path | None) -> Dataset:
    """Make the training and the test patches, the same in every run."""
    if data_dir is None:
        raise UserError(f"faces: pass --data-dir FOLDER, the folder that holds {FILE}")
    photographs, people = read_photographs(require_folder(data_dir) / FILE)
    return make_faces(photographs, people, PATCHES)


def read_photographs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the photographs (count, 112, 92) and the number of the person on each."""
    if not path.is_file():
        raise UserError(f"{path.name} is not in {path.parent}; pass the folder that holds it as --data-dir")
    try:
        with path.open("rb") as file, np.load(file) as archive:
            images, people = archive["images"], archive["subject"]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; expected arrays 'images' and 'subject'") from error
    except (OSError, EOFError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an npz archive: {error}") from error
    if images.dtype != np.uint8 or images.shape[1:] != _PHOTOGRAPH:
        raise UserError(
            f"{path}: images are {images.shape} of {images.dtype}, expected (n, 112, 92) of uint8"
        )
    if people.shape != images.shape[:1]:
        raise UserError(f"{path}: {len(images)} images but subject has shape {people.shape}")
    expected = TRAIN_PEOPLE + VALIDATION_PEOPLE + TEST_PEOPLE
    if len(np.unique(people)) != expected:
        raise UserError(f"{path}: {len(np.unique(people))} people in subject, expected {expected}")
    return images, people


def make_faces(photographs: np.ndarray, people: np.ndarray, patches: int, seed: int = 0) -> Dataset:
    """Cut ``patches`` of each photograph, split by person, normalise by the training statistics."""
    rng = np.random.default_rng(seed)
    names = np.unique(people)
    train_people, test_people = names[:TRAIN_PEOPLE], names[-TEST_PEOPLE:]
    train = cut_patches(photographs[np.isin(people, train_people)], patches, rng)
    test = cut_patches(photographs[np.isin(people, test_people)], patches, rng)

    mean = train.mean(axis=0, dtype=np.float64).astype(np.float32)
    train -= mean
    test -= mean
    variance = np.einsum("ij,ij->i", train, train).mean(dtype=np.float64) / train.shape[1]
    train /= np.float32(np.sqrt(variance))
    test /= np.float32(np.sqrt(variance))
    return Dataset(train, test)


def cut_patches(photographs: np.ndarray, patches: int, rng: np.random.Generator) -> np.ndarray:
    """Return random patches of each photograph, (photographs * patches, 625), float32."""
    source = np.repeat(np.arange(len(photographs)), patches)
    angle = rng.uniform(-_ANGLE, _ANGLE, len(source))
    scale = rng.uniform(*_SCALE, len(source))
    offset = rng.uniform(-_OFFSET, _OFFSET, (2, len(source)))
    result = np.empty((len(source), SIDE * SIDE), np.float32)
    for start in range(0, len(source), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        rows, columns = _positions(angle[chunk], scale[chunk], offset[:, chunk])
        result[chunk] = _bilinear(photographs, source[chunk], rows, columns)
    return result


def _positions(angle: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the photograph each pixel of a patch lies: rows and columns, (patches, 625) each."""
    grid = (np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2) * _STRIDE
    down, right = (axis.ravel() for axis in np.meshgrid(grid, grid, indexing="ij"))
    cos = (np.cos(angle) / scale).astype(np.float32)[:, None]
    sin = (np.sin(angle) / scale).astype(np.float32)[:, None]
    centre = (offset + (np.array(_PHOTOGRAPH) - 1)[:, None] / 2).astype(np.float32)[..., None]
    return centre[0] + cos * down + sin * right, centre[1] - sin * down + cos * right


def _bilinear(
    photographs: np.ndarray, source: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Interpolate the photographs ``source`` (patches,) at the positions (patches, pixels)."""
    height, width = photographs.shape[1:]
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    below, beside = rows - top, columns - left
    corner = (source[:, None] * height + top) * width + left
    flat = photographs.reshape(-1)
    upper = flat[corner] * (1 - beside) + flat[corner + 1] * beside
    lower = flat[corner + width] * (1 - beside) + flat[corner + width + 1] * beside
    return upper * (1 - below) + lower * below
