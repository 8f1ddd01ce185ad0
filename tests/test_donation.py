"""Parameters and state given away to the step, ``jax.jit(step, donate_argnums=(0, 1))``."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from flax import nnx
from test_conformance import every_variant

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

x = jax.random.normal(jax.random.key(0), (12, 4))
labels = jnp.arange(12) % 2
model = zoo.Mlp()


def loss_fn(params, x, labels):
    logits = kfqn.outputs(model.apply({"params": params["net"]}, x), "categorical") * params["scale"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(method, donate, warm=False):
    params = {"net": quick_jit(model.init)(jax.random.key(1), x)["params"], "scale": jnp.ones(2)}
    found = kfqn.find_layers(model, {"params": params["net"]}, x)
    layers = kfqn.join_layers({"net": found})
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)
    tx = method(0.1, layers)
    state = tx.init(params)
    if warm:
        state = kfqn.warm_start(state, value_and_grad, params, [(x, labels)])
    assert_no_shared_buffer(params, state)

    def step(params, state):
        _, grads, curvature = value_and_grad(params, x, labels)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    step = quick_jit(step, donate_argnums=(0, 1) if donate else ())
    for _ in range(3):
        params, state = step(params, state)
    assert_no_shared_buffer(params, state)
    return params


def assert_no_shared_buffer(*trees):
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trees) if leaf.size]
    assert len(set(pointers)) == len(pointers)


@every_variant
def test_donated_steps_are_the_same_steps(method):
    for kept, given in zip(
        *(jax.tree.leaves(train(method, donate)) for donate in (False, True)), strict=True
    ):
        np.testing.assert_allclose(kept, given, rtol=1e-6)  # two programs, compiled apart


def test_a_warm_start_can_be_donated():
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(train(kfqn.kbfgs, True, warm=True)))


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kfac])
def test_an_nnx_model_and_its_optimizer_can_be_donated(method):
    """And take the steps that they take without."""

    def train(donate):
        rngs = [nnx.Rngs(0), nnx.Rngs(1)]
        net = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs[0]), nnx.tanh, nnx.Linear(5, 2, rngs=rngs[1]))

        def loss(net, x, labels):
            logits = kfqn.outputs(net(x), "categorical")
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value_and_grad = kfqn.value_and_grad(loss, layers := kfqn.find_layers(net, x))
        optimizer = nnx.Optimizer(net, method(0.1, layers), wrt=nnx.Param)

        @nnx.jit(donate_argnums=(0, 1) if donate else ())
        def step(net, optimizer):
            value, grads, curvature = value_and_grad(net, x, labels)
            optimizer.update(net, grads, curvature=curvature)
            return value

        losses = [float(step(net, optimizer)) for _ in range(4)]
        return losses, jax.tree.leaves(nnx.state(net))

    (losses, kept), (donated, given) = train(False), train(True)
    np.testing.assert_allclose(donated, losses, rtol=1e-6)
    for one, other in zip(kept, given, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    assert losses[-1] < losses[0]
