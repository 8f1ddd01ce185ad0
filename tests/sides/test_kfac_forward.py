"""KFAC where the loss differentiates the model in forward mode: G comes from ``sampled_loss``."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfqn_optax as kfqn

model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(1)])
points = jnp.linspace(0, 1, 7)[:, None]
variables = model.init(jax.random.key(0), points)
params = variables["params"]
layers = kfqn.find_layers(model, variables, points)


def u(params, x):
    return model.apply({"params": params}, x)[..., 0]


def loss_fn(params):
    one = lambda x: jax.hessian(lambda x: u(params, x))(x)[0, 0]
    return jnp.mean((jax.vmap(one)(points) - 1) ** 2)


def plain_loss(params):
    return jnp.mean((u(params, points) - jnp.arange(7.0)) ** 2)


def forward(params):
    return u(params, points)


def step(value_and_grad):
    tx = kfqn.kfac(0.1, layers, damping=0.1)
    _, grads, curvature = value_and_grad(params)
    return tx.update(grads, tx.init(params), params, curvature=curvature)


def test_without_sampled_loss_the_error_names_it():
    with pytest.raises(ValueError, match="sampled_loss"):
        step(kfqn.value_and_grad(loss_fn, layers, forward=forward))


def test_the_gradient_moment_is_that_of_the_sampled_loss():
    _, _, curvature = kfqn.value_and_grad(loss_fn, layers, forward=forward, sampled_loss=plain_loss)(params)
    _, _, expected = kfqn.value_and_grad(plain_loss, layers)(params)
    for layer in layers:
        ours, theirs = curvature.statistics[layer.name], expected.statistics[layer.name]
        np.testing.assert_allclose(ours.grad_moment, theirs.grad_moment, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.second_moment, theirs.second_moment, rtol=1e-5, atol=1e-6)


def test_with_sampled_loss_it_takes_a_step():
    updates, state = step(kfqn.value_and_grad(loss_fn, layers, forward=forward, sampled_loss=plain_loss))
    assert int(kfqn.diagnostics(state)["rejected"]) == 0
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(updates["layers_0"]["kernel"]))
