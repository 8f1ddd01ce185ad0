"""Matrices of many layers inverted together, and the damping of a layer split between its sides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kfqn_optax as kfqn
from kfqn_optax._over_layers import inverses
from kfqn_optax.bench._quick import quick_jit


def positive_definite(*shape):
    root = np.random.default_rng(shape[-1]).normal(size=(*shape, 2 * shape[-1]))
    return root @ root.mT / shape[-1] + 0.1 * np.eye(shape[-1])


def test_inverses_of_all_matrices_of_a_tree():
    """Several of one size after padding, stacked copies in one and two axes, and a layer that has none."""
    tree = {
        "a": positive_definite(3),
        "b": (positive_definite(64), positive_definite(65)),
        "stacked": {"one": positive_definite(2, 5), "two": positive_definite(2, 3, 1)},
    }
    with jax.enable_x64(True):
        got = quick_jit(inverses)(jax.tree.map(jnp.asarray, tree))
        assert inverses({}) == {}
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for ours, matrix in zip(*map(jax.tree.leaves, (got, tree)), strict=True):
        expected = np.linalg.inv(matrix)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


def test_inverses_keep_the_dtype_of_each_matrix():
    with jax.enable_x64(True):
        tree = jnp.asarray(positive_definite(3), jnp.float32), jnp.asarray(positive_definite(3))
        got = inverses(tree)
    assert [leaf.dtype for leaf in got] == [jnp.float32, jnp.float64]


def test_a_matrix_without_inverse_does_not_spoil_the_others():
    matrices = positive_definite(2, 4)
    matrices[1] = -matrices[1]
    with jax.enable_x64(True):
        stacked, alone = inverses((jnp.asarray(matrices), jnp.asarray(positive_definite(7))))
    np.testing.assert_allclose(stacked[0], np.linalg.inv(matrices[0]), rtol=1e-9)
    assert not np.isfinite(stacked[1]).all()
    np.testing.assert_allclose(alone, np.linalg.inv(positive_definite(7)), rtol=1e-9)


class Copy(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(3, param_dtype=x.dtype, name="fc")(x)), None


class Stack(nn.Module):
    """A layer, and three copies of another in one scan."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, param_dtype=x.dtype, name="first")(x)
        copies = nn.scan(Copy, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return copies(name="copies")(x, None)[0]


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["", "no gradient"])
def test_the_damping_is_split_by_the_mean_eigenvalues_of_a_and_g(scale):
    """l_A / l_G is the ratio of the mean diagonal elements, in every copy by itself; 1 where G is zero."""
    with jax.enable_x64(True):
        model, damping = Stack(), 0.04
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
        variables = quick_jit(model.init)(jax.random.key(0), x)
        layers = kfqn.find_layers(model, variables, x)
        tx = kfqn.kfac(1.0, layers, damping=damping, step_rule=None)

        def loss_fn(params):
            return scale * jnp.mean(jnp.cos(3 * model.apply({"params": params}, x)))

        @quick_jit
        def step(params):
            _, grads, curvature = kfqn.value_and_grad(loss_fn, layers)(params)
            return tx.update(grads, tx.init(params), params, curvature=curvature)[1][0]

        state = step(variables["params"])
    ratios = []
    for layer in layers:
        sides = state.inputs[layer.name], state.outputs[layer.name]
        for copy in np.ndindex(layer.copies):
            moments = [np.asarray(side.second_moment[copy]) for side in sides]
            split = oracles.split_damping(damping, *moments) if scale else (0.2, 0.2)
            ratios.append(split[0] / split[1])
            np.testing.assert_allclose(split[0] * split[1], damping)
            for side, moment, own in zip(sides, moments, split, strict=True):
                expected = np.linalg.inv(moment + own * np.eye(len(moment)))
                np.testing.assert_allclose(side.factor[copy], expected, rtol=0, atol=1e-10)
    assert len(ratios) == 4
    assert len(set(np.round(ratios, 3))) == (4 if scale else 1)
