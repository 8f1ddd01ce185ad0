"""KFAC where the loss differentiates the model in forward mode: G of draws at the marked residual."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(1)])
points = jnp.linspace(0, 1, 7)[:, None]
variables = model.init(jax.random.key(0), points)
params = variables["params"]
layers = kfqn.find_layers(model, variables, points)


def u(params, x):
    return model.apply({"params": params}, x)[..., 0]


def residual_of(second):
    return lambda params: jax.vmap(lambda x: second(lambda x: u(params, x))(x)[0, 0])(points) - 1


def loss_of(residual, distribution="normal"):
    return lambda params: jnp.mean(kfqn.outputs(residual(params), distribution) ** 2)


def forward(params):
    return u(params, points)


forward_residual = residual_of(jax.hessian)
reverse_residual = residual_of(lambda f: jax.jacrev(jax.grad(f)))


def captured(loss, forward=None):
    return kfqn.value_and_grad(loss, layers, forward=forward)(params)


def test_without_a_distribution_there_is_no_gradient_moment():
    _, grads, curvature = captured(loss_of(forward_residual, None), forward)
    assert {one.grad_moment for one in curvature.factor_statistics().values()} == {None}
    tx = kfqn.kfac(0.1, layers, damping=0.1)
    with pytest.raises(ValueError, match="forward="):
        tx.update(grads, tx.init(params), params, curvature=curvature)


def test_draws_have_the_gauss_newton_blocks_of_the_outputs_on_average():
    """Of the shift of each row's output by itself, to four standard errors of 600 passes of 8 draws."""

    @quick_jit
    @jax.vmap
    def moments(key):
        _, _, curvature = captured(loss_of(forward_residual), forward)
        return {name: one.grad_moment for name, one in curvature.factor_statistics(key=key).items()}

    @quick_jit
    def exact(biases):
        """J^T C J summed over points; a point has rows of its own, so that a shared shift is enough."""

        def shifted(biases):
            moved = {name: {**params[name], "bias": biases[name]} for name in params}
            return forward_residual(moved)

        jacobian = jax.jacobian(shifted)(biases)
        return {name: 2 / len(points) * j.T @ j for name, j in jacobian.items()}

    drawn = moments(jax.random.split(jax.random.key(1), 600))
    expected = exact({name: leaves["bias"] for name, leaves in params.items()})
    for layer in layers:
        samples = np.asarray(drawn[layer.name])
        error = samples.std(0) / np.sqrt(len(samples))
        assert (np.abs(samples.mean(0) - expected[layer.name]) <= 4 * error + 1e-6).all()


def test_inputs_are_those_of_the_plain_forward_pass():
    _, _, plain = captured(loss_of(forward_residual), forward)
    _, _, expected = captured(lambda params: jnp.mean(forward(params) ** 2))
    for name, ours in plain.factor_statistics().items():
        theirs = expected.statistics[name]
        np.testing.assert_allclose(ours.second_moment, theirs.second_moment, rtol=1e-5, atol=1e-6)


def test_forms_of_a_marked_residual():
    @quick_jit
    def run(params):
        direction = jax.tree.map(jnp.cos, params)
        _, change = jax.jvp(forward_residual, (params,), (direction,))
        _, _, curvature = captured(loss_of(forward_residual), forward)
        return curvature.forms([direction]).matrix[0, 0], 2 * jnp.mean(change**2)

    ours, expected = run(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_where_the_residual_is_taken_in_reverse_mode_one_pass_is_enough():
    @quick_jit
    def run(params):
        _, _, curvature = captured(loss_of(reverse_residual))
        return curvature.factor_statistics(key=0)

    for one in run(params).values():
        assert np.linalg.eigvalsh(one.grad_moment).min() > -1e-6
        assert np.trace(one.grad_moment) >= 0
