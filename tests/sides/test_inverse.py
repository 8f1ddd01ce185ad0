"""The inverse of a positive definite matrix: by elimination as by the Cholesky factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax._sides.inverse import by_cholesky, by_elimination, by_halves, inverse

WAYS = [by_cholesky, by_elimination, by_halves, inverse]
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def positive_definite(dim, smallest=1e-2):
    factor = np.random.default_rng(dim).normal(size=(dim, 2 * dim))
    return factor @ factor.T / dim + smallest * np.eye(dim)


@every_way
@pytest.mark.parametrize("dim", [1, 2, 63, 64, 65, 200, 300, 513])
def test_the_inverse_in_double_precision(way, dim):
    matrix = positive_definite(dim)
    with jax.enable_x64(True):
        got = np.asarray(jax.jit(way)(jnp.asarray(matrix)))
    expected = np.linalg.inv(matrix)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(got, got.T, rtol=0, atol=1e-13 * np.abs(expected).max())


@every_way
def test_single_precision_loses_no_more_than_the_condition_of_the_matrix(way):
    matrix = positive_definite(150, smallest=1e-5)[:140, :140]
    condition = np.linalg.cond(matrix)
    with jax.default_matmul_precision("highest"):
        got = np.asarray(jax.jit(way)(jnp.asarray(matrix, jnp.float32)))
    expected = np.linalg.inv(matrix.astype(np.float32).astype(np.float64))
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 10 * condition * np.finfo(np.float32).eps


@every_way
@pytest.mark.parametrize("dim", [3, 70, 300])
def test_a_matrix_that_is_not_positive_definite_has_none(way, dim):
    matrix = positive_definite(dim)
    matrix[-1, -1] = -1.0
    got = np.asarray(jax.jit(way)(jnp.asarray(matrix, jnp.float32)))
    assert not np.isfinite(got).all()


@pytest.mark.parametrize("way", [by_halves, inverse], ids=lambda way: way.__name__)
def test_stacked_matrices(way):
    matrices = np.stack([positive_definite(40), 3 * positive_definite(40)])
    got = jax.jit(jax.vmap(way))(jnp.asarray(matrices, jnp.float32))
    np.testing.assert_allclose(got, np.linalg.inv(matrices), rtol=1e-3, atol=1e-3)
