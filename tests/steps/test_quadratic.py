"""The quadratic rule: its coefficients against NumPy, its damping, and training with every kind of side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax._steps.quadratic import minimum, shortened


def model_value(matrix, slopes, c):
    return c @ slopes + 0.5 * c @ matrix @ c


@pytest.mark.parametrize("seed", range(5))
def test_the_coefficients_minimise_the_model(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 2)) * np.array([[1.0], [1e-3]])
    matrix, slopes = root @ root.T, rng.normal(size=2)
    with jax.enable_x64(True):
        got = np.asarray(minimum(jnp.asarray(matrix), jnp.asarray(slopes)))
    np.testing.assert_allclose(got, -np.linalg.solve(matrix, slopes), rtol=1e-8)


def test_units_of_the_directions_do_not_matter():
    matrix, slopes = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([-1.0, 0.3])
    units = np.array([1e6, 1e-7])
    plain = minimum(jnp.float32(matrix), jnp.float32(slopes))
    scaled = minimum(jnp.float32(matrix * np.outer(units, units)), jnp.float32(slopes * units))
    np.testing.assert_allclose(scaled * units, plain, rtol=1e-4)


def test_parallel_directions_and_a_missing_one_leave_the_first_alone():
    first = jnp.array([-0.5, 0.0])
    parallel = minimum(jnp.array([[4.0, 8.0], [8.0, 16.0]]), jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(parallel, first)
    np.testing.assert_allclose(minimum(jnp.array([[4.0, 0], [0, 0]]), jnp.array([2.0, 0])), first)
    np.testing.assert_array_equal(minimum(jnp.zeros((2, 2)), jnp.zeros(2)), 0)


@pytest.mark.parametrize("matrix", [[[-4.0, 0.3], [0.3, 1.0]], [[1.0, 3.0], [3.0, 1.0]]])
def test_an_indefinite_model_is_taken_by_the_magnitude_of_its_eigenvalues(matrix):
    matrix, slopes = np.array(matrix), np.array([-1.0, 0.5])
    scale = np.sqrt(np.abs(np.diagonal(matrix)))
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    positive = vectors @ np.diag(np.abs(values)) @ vectors.T * np.outer(scale, scale)
    got = minimum(jnp.float32(matrix), jnp.float32(slopes))
    np.testing.assert_allclose(got, -np.linalg.solve(positive, slopes), rtol=1e-4)
    assert got @ slopes < 0


def test_a_step_along_which_the_loss_rose_ends_at_the_parabolas_minimum():
    loss = lambda t: 3.0 - t + 1.5 * t**2
    share = shortened(slope=jnp.float32(1.0), change=jnp.float32(loss(1.0) - loss(0.0)))
    assert share == pytest.approx(1 / 3)
    assert shortened(jnp.float32(1.0), jnp.float32(jnp.inf)) == 0
    assert shortened(jnp.float32(-1.0), jnp.float32(1.0)) == 0
    assert shortened(jnp.float32(1.0), jnp.float32(0.0)) == 0.5
