"""What is done to the gradient before it reaches us does not change what a rule thinks of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def losses(make, scale):
    """Of ten steps, with gradients scaled before they reach what ``make`` makes of the layers."""
    model, x = zoo.Mlp(), jax.random.normal(jax.random.key(0), (12, 4), jnp.float64)
    params = jax.tree.map(jnp.float64, model.init(jax.random.key(1), x)["params"])
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, x: jnp.mean(
        (kfqn.outputs(model.apply({"params": params}, x)) - jnp.sin(3 * x[:, :2])) ** 2
    )
    value_and_grad, tx = kfqn.value_and_grad(loss_fn, layers), optax.chain(optax.scale(scale), make(layers))

    @quick_jit
    def step(params, state):
        loss, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    state, seen = tx.init(params), []
    for _ in range(10):
        params, state, loss = step(params, state)
        seen.append(float(loss))
    return seen


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_quadratic_rule_does_not_see_the_scale(scale, momentum):
    make = lambda layers: kfqn.kfac(1.0, layers, momentum=momentum)
    np.testing.assert_allclose(losses(make, scale), losses(make, 1.0), rtol=1e-6)


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kfqn], ids=["kbfgs", "kfqn"])
def test_with_the_measured_rule_a_scale_is_one_of_the_learning_rate(method):
    """The step before the rule is as long; what the rule makes of it is the same."""
    scaled = losses(lambda layers: method(1.0, layers), 0.1)
    plain = losses(lambda layers: method(0.1, layers), 1.0)
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)


def test_clipping_does_not_make_the_quadratic_rule_timid():
    """A gradient clipped to a hundredth of its length leaves steps as long as they were."""
    clipped = losses(
        lambda layers: optax.chain(optax.clip_by_global_norm(1e-2), kfqn.kfac(1.0, layers)), 1.0
    )
    np.testing.assert_allclose(clipped, losses(lambda layers: kfqn.kfac(1.0, layers), 1.0), rtol=1e-6)
