"""The problems: what they are made of, and that their losses are what they say."""

import gzip
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._problems import PROBLEMS
from kfqn_optax.bench._suite.lane import Evaluator
from kfqn_optax.bench._tasks import autoencoders, digits, image, poisson, regression, text
from kfqn_optax.bench._tasks import task as tasks
from kfqn_optax.bench._tasks.drawn_digits import draw_digits
from kfqn_optax.bench._tasks.folders import folder_of
from kfqn_optax.bench._tasks.table import TASKS
from kfqn_optax.bench._tasks.task import Task


def sizes(task: Task) -> list[tuple[int, int]]:
    return [(layer.in_dim, layer.out_dim) for layer in task.layers]


def test_problems_of_the_paper_are_all_there():
    assert set(PROBLEMS) < set(TASKS)


def test_evaluation_is_over_the_same_part_of_the_training_set_every_time(small, monkeypatch):
    task = autoencoders.autoencoder_task(small, small.load(None), batch_size=25)
    (batch,) = task.evaluation_batches()
    assert batch.shape == (110, 12)
    monkeypatch.setattr(tasks, "AT_ONCE", 30)  # 110 is no multiple
    batches = task._replace(evaluated=100).evaluation_batches()
    assert [len(batch) for batch in batches] == [30] * 3
    np.testing.assert_array_equal(np.concatenate(batches), batch[:90])


def test_scaled_autoencoder_reports_the_unscaled_loss(small):
    dataset = small.load(None)
    scaled = autoencoders.autoencoder_task(small, dataset, loss_scale=1e3)
    params, state = scaled.init(3)
    images = jnp.asarray(dataset.train)
    expected = small.train_loss(params, images)
    np.testing.assert_allclose(scaled.loss(params, images, state)[0], 1e3 * expected, rtol=1e-6)
    loss, metric = Evaluator(scaled)(params, state)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metric, small.test_loss(params, jnp.asarray(dataset.test)), rtol=1e-6)
    bright = autoencoders.autoencoder_task(small, dataset, input_scale=100.0)
    assert bright.loss(params, images, state)[0] > expected


def test_picture_has_a_held_out_test_and_four_layers():
    task = image.load_image()
    assert sizes(task) == [(18, 256), (256, 256), (256, 256), (256, 1)]
    assert task.examples == image.HEIGHT * image.WIDTH
    values = image.brightness(np.asarray(task.train[0]))
    assert 0.2 < values.std() < 0.6
    assert np.abs(values).max() < 1.5


def test_regression_target_has_unit_scale_and_uses_every_input():
    task = regression.load_regression()
    x, y = task.train
    assert abs(y.mean()) < 0.1
    assert 0.8 < y.std() < 1.2
    for column in range(regression.INPUTS):
        moved = x.copy()
        moved[:, column] += 0.5
        assert np.abs(regression.target(moved) - y).max() > 0.05
    assert task.batch_size == task.examples


def test_poisson_source_is_that_of_the_solution():
    points = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 2)), jnp.float32)
    one = lambda point: poisson.solution(point[None])[0]
    laplacian = jax.vmap(lambda point: jnp.trace(jax.hessian(one)(point)))(points)
    np.testing.assert_allclose(-laplacian, poisson.source(points), rtol=1e-3, atol=1e-3)
    edge = poisson._training_points(np.random.default_rng(0))["edge"]
    np.testing.assert_allclose(poisson.solution(edge), 0, atol=1e-5)
    for axis, end in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert np.sum(edge[:, axis] == end) == poisson.POINTS / 4


def test_drawn_digits_differ_by_class_and_repeat_by_seed():
    images, labels = draw_digits(600, 14, seed=0)
    assert images.shape == (600, 14, 14)
    assert images.dtype == np.float32
    assert set(labels) == set(range(10))
    np.testing.assert_array_equal(images, draw_digits(600, 14, seed=0)[0])
    means = np.stack([images[:300][labels[:300] == digit].mean(0) for digit in range(10)])
    distance = np.square(images[300:, None] - means[None]).sum((2, 3))
    assert 0.5 < np.mean(distance.argmin(1) == labels[300:]) < 0.99  # no line tells them all apart


def test_cnn_reads_halved_mnist_where_there_is_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 20)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
            values = rng.integers(0, 10, shape).astype(np.uint8)
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes()))
    train, test = digits._small_digits(tmp_path)
    assert train[0].shape == (30, 14, 14)
    assert test[1].shape == (20,)
    (images, _), _ = digits.load_labelled_mnist(tmp_path)
    np.testing.assert_allclose(train[0][3, 2, 5], images[3].reshape(28, 28)[4:6, 10:12].mean(), rtol=1e-6)


def test_folder_of_a_data_set_may_be_the_folder_itself(tmp_path):
    assert folder_of(None, "mnist") is None
    assert folder_of(tmp_path, "mnist") == tmp_path
    (tmp_path / "mnist").mkdir()
    assert folder_of(tmp_path, "mnist") == tmp_path / "mnist"
    with pytest.raises(UserError, match="no such folder"):
        folder_of(tmp_path / "nowhere", "mnist")


def test_text_is_sentences_of_the_grammar():
    sample = text.make_text(2_000, seed=0)
    assert sample == text.make_text(2_000, seed=0)
    assert set(sample) <= {*string.ascii_lowercase, " ", ".", ","}
    for symbol in text._GRAMMAR:
        assert symbol not in sample.replace(",", "").replace(".", "").split()
    assert ". " in sample


def test_scanned_transformer_stacks_its_blocks():
    task = text.load_text(blocks=3, scanned=True)
    assert any(layer.copies == (3,) for layer in task.layers)
    assert task.train.shape == (text.TRAIN, text.LENGTH + 1)
