import gzip
import struct

import numpy as np
import pytest

from kfqn_optax.bench import _mnist
from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._mnist import load_mnist

TRAIN_IMAGES = "train-images-idx3-ubyte"


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        TRAIN_IMAGES: rng.integers(0, 256, (5, 28, 28)),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 5),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 28, 28)),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 3),
    }


@pytest.fixture
def folder(arrays, tmp_path):
    for name, array in arrays.items():
        (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def check(dataset, arrays):
    expected = arrays[TRAIN_IMAGES].reshape(5, 784) / 255
    np.testing.assert_allclose(dataset.train, expected, rtol=1e-6)
    np.testing.assert_allclose(dataset.test * 255, arrays["t10k-images-idx3-ubyte"].reshape(3, 784))
    assert dataset.train.dtype == dataset.test.dtype == np.float32


def test_plain_files_are_read(folder, arrays):
    check(load_mnist(folder), arrays)


def test_gzip_files_are_read(folder, arrays):
    for name in arrays:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    check(load_mnist(folder), arrays)


def changed(content: bytes, at: int, value: int) -> bytes:
    return content[:at] + bytes([value]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-1], "3919 values, its header promises 5x28x28"),
        (lambda content: content + b"\0", "3921 values"),
        (lambda content: content[:10], "no IDX file"),
        (lambda content: b"", "starts with nothing"),
        (lambda content: changed(content, 3, 1), "starts with 00000801, expected 00000803"),
        (lambda content: changed(content, 2, 0x0D), "starts with 00000d03"),
        (lambda content: idx(np.zeros((5, 14, 14))), "14x14, expected 28x28"),
        (lambda content: idx(np.zeros((6, 28, 28))), "6 images, .* 5 labels"),
        (lambda content: gzip.compress(content)[:-20], "cannot be read"),
        (lambda content: gzip.compress(content)[:5], "cannot be read"),
        (lambda content: changed(gzip.compress(content), 20, 0xFF), "cannot be read"),
    ],
)
def test_spoiled_file_is_named_with_what_is_wrong(folder, spoil, message):
    path = folder / TRAIN_IMAGES
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        load_mnist(folder)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named_with_where_it_was_looked_for(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte") as error:
        load_mnist(folder)
    assert str(folder) in str(error.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_mnist(tmp_path / "nowhere")


def test_files_are_downloaded_once(folder, arrays, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source"
    source.mkdir()
    for name in arrays:
        (source / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    monkeypatch.setattr(_mnist, "SOURCE", source.as_uri() + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check(load_mnist(None), arrays)
    assert capsys.readouterr().err.count("downloading") == 4
    check(load_mnist(None), arrays)
    assert "downloading" not in capsys.readouterr().err


def test_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(_mnist, "SOURCE", (tmp_path / "nowhere").as_uri() + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot download .*pass --data-dir"):
        load_mnist(None)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
