import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax.bench._models import Autoencoder, cross_entropy, half_squared_error, l2_term
from kfqn_optax.bench._problems import PROBLEMS


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("curves", [784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784]),
        ("mnist", [784, 1000, 500, 250, 30, 250, 500, 1000, 784]),
        ("faces", [625, 2000, 1000, 500, 30, 500, 1000, 2000, 625]),
    ],
)
def test_networks_are_the_published_ones(name, widths):
    params = jax.eval_shape(PROBLEMS[name].init, 0)
    shapes = [params[f"Dense_{i}"]["kernel"].shape for i in range(len(params))]
    assert shapes == list(itertools.pairwise(widths))


def test_code_and_output_are_linear_and_all_else_is_relu():
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    model = Autoencoder((6, 5, 4, 3))
    params = model.init(jax.random.key(0), x)["params"]
    expected = x
    for i in range(6):
        layer = params[f"Dense_{i}"]
        expected = expected @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])[None]
        expected = expected if i in (2, 5) else np.maximum(expected, 0)
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


def test_kernels_and_biases_start_uniform_within_the_root_of_fan_in():
    params = Autoencoder((300, 900)).init(jax.random.key(0), jnp.zeros((1, 300)))["params"]
    for layer in params.values():
        fan_in = layer["kernel"].shape[0]
        for values in (layer["kernel"], layer["bias"]):
            scaled = np.asarray(values) * np.sqrt(fan_in)
            assert 0.98 < np.abs(scaled).max() <= 1
            assert abs(np.std(scaled) - 3**-0.5) < 0.05
            assert abs(np.mean(scaled)) < 0.1


def test_seed_decides_the_start(small):
    leaf = lambda seed: np.asarray(small.init(seed)["Dense_1"]["kernel"])
    np.testing.assert_array_equal(leaf(1), leaf(1))
    assert not np.array_equal(leaf(1), leaf(2))


def test_losses_are_sums_over_pixels_of_each_image():
    rng = np.random.default_rng(0)
    outputs, images = rng.normal(size=(4, 9)), rng.uniform(size=(4, 9))
    p = 1 / (1 + np.exp(-outputs))
    entropy = -(images * np.log(p) + (1 - images) * np.log(1 - p)).sum(axis=1)
    arrays = jnp.asarray(outputs, jnp.float32), jnp.asarray(images, jnp.float32)
    np.testing.assert_allclose(cross_entropy(*arrays), entropy, rtol=1e-5)
    error = 0.5 * ((outputs - images) ** 2).sum(axis=1)
    np.testing.assert_allclose(half_squared_error(*arrays), error, rtol=1e-5)


def test_l2_term_counts_kernels_and_biases():
    params = {"a": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([12.0])}}
    np.testing.assert_allclose(l2_term(params), 0.5e-5 * 169, rtol=1e-6)


def test_training_loss_is_the_batch_mean_with_the_l2_term_and_test_loss_without(small):
    params = small.init(0)
    images = jnp.asarray(small.load(None).train[:3])
    outputs = small.model.apply({"params": params}, images)
    mean = np.mean(cross_entropy(outputs, images))
    np.testing.assert_allclose(small.test_loss(params, images), mean, rtol=1e-5)
    difference = small.train_loss(params, images) - small.test_loss(params, images)
    np.testing.assert_allclose(difference, l2_term(params), atol=1e-4)
