import os
from pathlib import Path

import numpy as np
import pytest

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._faces import cut_patches, load_faces, make_faces

FOLDER = os.environ.get("KFQN_FACES_DIR")


def photographs(count: int = 40) -> np.ndarray:
    """Noise with a gradient: no two alike, no pixel constant."""
    rng = np.random.default_rng(0)
    gradient = np.broadcast_to(np.arange(92) // 2, (count, 112, 92))
    return (rng.integers(0, 200, gradient.shape) + gradient).astype(np.uint8)


def save(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "orl_faces.npz", **arrays)
    return folder


def planes(image: np.ndarray, patches: int) -> np.ndarray:
    """The plane that fits each patch of ``image``: slope down, slope right, value in the middle."""
    grid = np.arange(25) - 12.0
    down, right = (axis.ravel() for axis in np.meshgrid(grid, grid, indexing="ij"))
    values = cut_patches(image[None].astype(np.uint8), patches, np.random.default_rng(3))
    design = np.stack([down, right, np.ones(625)], axis=1)
    fit, residuals, *_ = np.linalg.lstsq(design, values.T.astype(np.float64), rcond=None)
    assert residuals.max() < 1e-3  # bilinear interpolation is exact on a plane
    return fit


def test_patches_are_turned_enlarged_and_placed_within_the_published_ranges():
    rows, columns = np.meshgrid(np.arange(112), np.arange(92), indexing="ij")
    by_row, by_column = planes(rows, 2_000), planes(columns, 2_000)
    np.testing.assert_allclose(by_column[0], -by_row[1], atol=1e-3)  # a rotation,
    np.testing.assert_allclose(by_column[1], by_row[0], atol=1e-3)  # not a shear or a mirror
    scale = 3 / np.hypot(by_row[0], by_row[1])
    angle = np.degrees(np.arctan2(by_row[1], by_row[0]))
    for values, low, high in [
        (scale, 1.4, 1.8),
        (angle, -90, 90),
        (by_row[2], 55.5 - 8, 55.5 + 8),
        (by_column[2], 45.5 - 8, 45.5 + 8),
    ]:
        slack = 0.01 * (high - low)
        assert low - slack / 10 <= values.min() < low + slack
        assert high - slack < values.max() <= high + slack / 10


def test_statistics_are_those_of_the_training_set():
    train, test = make_faces(photographs(), np.arange(40), patches=8)
    assert train.shape == (25 * 8, 625)
    assert test.shape == (10 * 8, 625)
    assert train.dtype == test.dtype == np.float32
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    half_squared_error = 0.5 * np.square(train, dtype=np.float64).sum(axis=1).mean()
    np.testing.assert_allclose(half_squared_error, 312.5, rtol=1e-5)
    assert np.abs(test.mean(axis=0)).max() > 0.01


def test_no_person_is_in_both_sets():
    plain = np.repeat(np.arange(40, dtype=np.uint8), 2)  # two photographs of each, all of one grey
    images = np.broadcast_to(plain[:, None, None], (80, 112, 92))
    train, test = make_faces(images, plain + 1, patches=3)
    train_people, test_people = ({round(v, 3) for v in x[:, 0].tolist()} for x in (train, test))
    assert len(train_people) == 25
    assert len(test_people) == 10
    assert not train_people & test_people
    assert len(train) == 25 * 2 * 3


def test_file_gives_414_patches_of_each_photograph(tmp_path):
    folder = save(tmp_path, images=photographs(), subject=np.arange(40))
    train, test = load_faces(folder)
    assert len(train) == 25 * 414
    assert len(test) == 10 * 414


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": photographs()}, "subject"),
        ({"pictures": photographs(), "subject": np.arange(40)}, "images"),
        (
            {"images": photographs()[:, :64], "subject": np.arange(40)},
            r"expected \(n, 112, 92\)",
        ),
        ({"images": photographs() / 255, "subject": np.arange(40)}, "float64"),
        ({"images": photographs(), "subject": np.arange(39)}, r"40 images .* \(39,\)"),
        ({"images": photographs(), "subject": np.arange(40) % 7}, "7 people .* expected 40"),
        ({"images": np.array([None]), "subject": np.arange(40)}, "cannot be read"),
    ],
)
def test_wrong_content_is_named(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message) as error:
        load_faces(save(tmp_path, **arrays))
    assert str(tmp_path / "orl_faces.npz") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil", [lambda c: c[:-999], lambda c: c[:99], lambda c: b""])
def test_truncated_file_is_named(tmp_path, spoil):
    save(tmp_path, images=photographs(), subject=np.arange(40))
    path = tmp_path / "orl_faces.npz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="cannot be read as an npz archive"):
        load_faces(tmp_path)


def test_npy_under_the_name_of_an_npz_is_named(tmp_path):
    with (tmp_path / "orl_faces.npz").open("wb") as file:
        np.save(file, photographs(1))
    with pytest.raises(UserError, match="cannot be read as an npz archive"):
        load_faces(tmp_path)


def test_corrupt_content_is_named(tmp_path):
    save(tmp_path, images=photographs(), subject=np.arange(40))
    path = tmp_path / "orl_faces.npz"
    content = bytearray(path.read_bytes())
    content[5_000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as an npz archive"):
        load_faces(tmp_path)


def test_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(UserError, match="--data-dir FOLDER"):
        load_faces(None)
    with pytest.raises(UserError, match="no such folder"):
        load_faces(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"orl_faces\.npz is not in"):
        load_faces(tmp_path)


@pytest.mark.skipif(not FOLDER, reason="KFQN_FACES_DIR does not name the folder of the photographs")
def test_error_of_pca_on_the_photographs_is_near_that_of_the_original_set():
    train, _ = load_faces(Path(FOLDER or ""))
    eigenvalues = np.linalg.eigvalsh((train.T @ train / len(train)).astype(np.float64))
    assert 120 < eigenvalues[:-30].sum() < 150
