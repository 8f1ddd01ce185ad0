"""Parameters that belong to others change nothing: a masked run is the run of the smaller model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

body, head, headless = nn.Dense(6), nn.Dense(3), nn.Dense(3, use_bias=False)
METHODS = {
    "kfac": lambda layers: kfqn.kfac(1.0, layers),
    "kfac by measured steps": lambda layers: kfqn.kfac(0.3, layers, step_rule=kfqn.measured()),
    "kbfgs": lambda layers: kfqn.kbfgs(1.0, layers),
    "kbfgs by a model": lambda layers: kfqn.kbfgs(1.0, layers, step_rule=kfqn.quadratic(rate=1.0)),
    "kbfgs_l": lambda layers: kfqn.kbfgs_l(1.0, layers, memory=3),
    "kfqn": lambda layers: kfqn.kfqn(1.0, layers),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem():
    x = jax.random.normal(jax.random.key(0), (40, 4), jnp.float64)
    params = {
        "body": body.init(jax.random.key(1), x)["params"],
        "head": head.init(jax.random.key(2), jnp.ones((1, 6)))["params"],
        "table": jnp.full(10, 100.0),
    }
    return x, jnp.argmax(x[:, :3], 1), jax.tree.map(jnp.float64, params)


def features(params, x):
    # Far from what the head sees: the body's layers would show in anything summed over layers.
    return jnp.tanh(body.apply({"params": params["body"]}, 30 * x))


def crossentropy(z, labels):
    return optax.softmax_cross_entropy_with_integer_labels(kfqn.outputs(z, "categorical"), labels).mean()


def train(tx, loss_fn, layers, params, batches):
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)

    @quick_jit
    def step(params, state, *batch):
        _, grads, curvature = value_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches:
        params, state = step(params, state, *batch)
    return params, state


def whole_loss(params, x, labels):
    z = head.apply({"params": params["head"]}, features(params, x))
    return crossentropy(z, labels) + 0 * params["table"].sum()


def whole_layers(params, x):
    return kfqn.join_layers(
        {
            "body": kfqn.find_layers(body, {"params": params["body"]}, x),
            "head": kfqn.find_layers(head, {"params": params["head"]}, features(params, x)),
        }
    )


def batches(x, labels):
    return [(x[k : k + 20], labels[k : k + 20]) for k in (0, 20, 10, 15, 5, 0)]


@pytest.mark.parametrize("frozen_bias", [False, True], ids=["", "bias too"])
@pytest.mark.parametrize("name", METHODS)
def test_a_masked_run_is_that_of_the_smaller_model(name, frozen_bias):
    x, labels, params = problem()
    label = {"body": "f", "head": {"kernel": "k", "bias": "f" if frozen_bias else "k"}, "table": "f"}
    tx = optax.partition({"k": METHODS[name](whole_layers(params, x)), "f": optax.set_to_zero()}, label)
    ours, state = train(tx, whole_loss, whole_layers(params, x), params, batches(x, labels))

    small = headless if frozen_bias else head
    bias = params["head"]["bias"][None] if frozen_bias else 0.0
    own = {"kernel": params["head"]["kernel"]} if frozen_bias else params["head"]

    def loss_fn(own, x, labels):
        return crossentropy(small.apply({"params": own}, features(params, x)) + bias, labels)

    layers = kfqn.find_layers(small, {"params": own}, features(params, x))
    expected, alone = train(METHODS[name](layers), loss_fn, layers, own, batches(x, labels))
    moved = np.abs(np.asarray(expected["kernel"] - own["kernel"])).max()
    assert moved > 1e-3
    for key, value in expected.items():
        np.testing.assert_allclose(ours["head"][key], value, rtol=1e-8, atol=1e-8 * moved)
    for name in ("damping", "rejected", "outliers", "share"):
        np.testing.assert_allclose(kfqn.diagnostics(state)[name], kfqn.diagnostics(alone)[name], rtol=1e-8)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.body(x)))


@pytest.mark.parametrize("of", ["the model", "the head"])
def test_an_nnx_optimizer_of_the_head_is_that_of_the_smaller_model(of):
    """With layers of the whole model or of the head alone; both leave the body as it is."""
    x, labels, _ = problem()
    net = Net(nnx.Rngs(0))
    hidden = nnx.tanh(net.body(x))
    small = nnx.clone(net.head)
    layers = kfqn.find_layers(net, x)
    if of == "the head":
        layers = kfqn.join_layers({"head": kfqn.find_layers(net.head, hidden)})
    wrt = nnx.All(nnx.Param, nnx.PathContains("head"))

    def train(model, layers, wrt, inputs):
        value_and_grad = kfqn.value_and_grad(lambda m, x, y: crossentropy(m(x), y), layers)
        optimizer = nnx.Optimizer(model, kfqn.kfac(1.0, layers), wrt=wrt)

        @nnx.jit
        def step(model, optimizer, x, labels):
            _, grads, curvature = value_and_grad(model, x, labels)
            optimizer.update(model, grads, curvature=curvature)

        for _ in range(4):
            step(model, optimizer, inputs, labels)

    before = nnx.state(net.body)
    train(net, layers, wrt, x)
    train(small, kfqn.find_layers(small, hidden), nnx.Param, hidden)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net.body), before)
    ours, expected = jax.tree.leaves(nnx.state(net.head)), jax.tree.leaves(nnx.state(small))
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)  # float32, fused otherwise


def test_layers_of_which_no_parameter_is_there_are_an_error():
    x, _, params = problem()
    with pytest.raises(ValueError, match="has a parameter 'body/kernel'"):
        kfqn.kfac(1.0, whole_layers(params, x)).init({"table": params["table"]})
