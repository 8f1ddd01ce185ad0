"""A batch split along a named axis trains as the whole of it does, and the replicas stay the same."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_conformance import every_variant

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit
from kfqn_optax.bench._simulated import simulated

PARTS, ROWS = 4, 24
X = np.random.default_rng(0).normal(size=(ROWS, 3))


class Net(nn.Module):
    """With a parameter of no layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, param_dtype=jnp.float64)(x))
        return nn.Dense(2, param_dtype=jnp.float64)(
            x * self.param("scale", nn.initializers.ones, (1, 4), jnp.float64)
        )


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def loss_fn(params, x):
    z = kfqn.outputs(Net().apply({"params": params}, x))
    return jnp.mean((z - jnp.sin(3 * x[:, :2])) ** 2)


def problem(**settings):
    x = jnp.asarray(X)
    params = Net().init(jax.random.key(1), x)["params"]
    layers = kfqn.find_layers(Net(), {"params": params}, x)
    return params, layers, kfqn.value_and_grad(loss_fn, layers, **settings)


def step_of(tx, value_and_grad):
    def step(params, state, x):
        loss, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    return step


@every_variant
def test_parts_of_a_batch_train_as_the_whole(method):
    params, layers, whole = problem()
    _, _, part = problem(axis_name="parts")
    tx = method(0.1, layers)
    plain = quick_jit(step_of(tx, whole))
    split = quick_jit(jax.vmap(step_of(tx, part), in_axes=(0, 0, 0), axis_name="parts"))
    copies = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf] * PARTS), tree)
    state = tx.init(params)
    one, many = (params, state), (copies(params), copies(state))
    x = jnp.asarray(X)
    for _ in range(4):
        *one, loss = plain(*one, x)
        *many, losses = split(*many, x.reshape(PARTS, -1, 3))
        np.testing.assert_allclose(losses, jnp.full(PARTS, loss), rtol=1e-9)
    for alone, replicas in zip(*map(jax.tree.leaves, (one[0], many[0])), strict=True):
        np.testing.assert_allclose(replicas, jnp.broadcast_to(replicas[0], replicas.shape), rtol=1e-12)
        np.testing.assert_allclose(replicas[0], alone, rtol=1e-7, atol=1e-9)


def test_sampled_factors_of_parts_have_the_expectation_of_the_whole():
    """That of the squared errors: 2 / outputs on the diagonal of every row, over the rows."""
    params, _, part = problem(axis_name="parts")
    marked = lambda params, x: jnp.mean((kfqn.outputs(Net().apply({"params": params}, x), "normal")) ** 2)
    sampling = kfqn.value_and_grad(marked, part.layers, axis_name="parts")

    def factors(x, key):
        _, _, curvature = sampling(params, x)
        statistics, grads = curvature.factors(key=key)
        return statistics["Dense_1"].grad_moment, jnp.square(grads["scale"])

    x = jnp.asarray(X).reshape(PARTS, -1, 3)
    many = jax.jit(jax.vmap(jax.vmap(factors, (0, None), axis_name="parts"), (None, 0)))
    moments, squares = many(x, jax.random.split(jax.random.key(0), 400))
    np.testing.assert_allclose(moments.mean(0)[0], np.eye(2), atol=0.15)

    def outputs(scale, x):
        return Net().apply({"params": params | {"scale": scale}}, x)

    jacobian = jax.jacobian(outputs)(params["scale"], jnp.asarray(X))
    exact = jnp.square(jacobian).sum((0, 1)) / ROWS
    np.testing.assert_allclose(squares.mean(0)[0], exact, rtol=0.25)


def test_an_axis_that_is_not_there():
    params, _, value_and_grad = problem(axis_name="batch")
    with pytest.raises(ValueError, match="axis_name='batch', but there is no such axis"):
        jax.eval_shape(value_and_grad, params, jnp.asarray(X))


def test_pmap_on_one_device_is_no_different():
    params, layers, value_and_grad = problem(axis_name="devices")
    tx = kfqn.kbfgs(0.1, layers)
    one = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    x = jnp.asarray(X)
    moved, _, _ = jax.pmap(step_of(tx, value_and_grad), axis_name="devices")(
        one(params), one(tx.init(params)), x[None]
    )
    plain, _, _ = jax.jit(step_of(tx, problem()[2]))(params, tx.init(params), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-9), moved, plain)


PROGRAM = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax, kfqn_optax as kfqn
from jax.sharding import AxisType, PartitionSpec as P
from kfqn_optax.bench._quick import quick_jit

jax.config.update("jax_enable_x64", True)
model = nn.Sequential([nn.Dense(5, param_dtype="float64"), nn.tanh, nn.Dense(2, param_dtype="float64")])
x = jax.random.normal(jax.random.key(0), (32, 3), jnp.float64)
params = model.init(jax.random.key(1), x)["params"]
layers = kfqn.find_layers(model, {"params": params}, x)

def losses(make, wrap, axis_name=None, pmean=False):
    def loss_fn(params, x):
        z = kfqn.outputs(model.apply({"params": params}, x))
        loss = jnp.mean((z - jnp.sin(3 * x[:, :2])) ** 2)
        return jax.lax.pmean(loss, "b") if pmean else loss
    value_and_grad, tx = kfqn.value_and_grad(loss_fn, layers, axis_name=axis_name), make(layers)
    def step(params, state, x):
        loss, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss
    step = quick_jit(wrap(step))
    carry, seen = (params, tx.init(params)), []
    for _ in range(4):
        *carry, loss = step(*carry, x)
        seen.append(float(loss))
    return seen

mesh = jax.make_mesh((4,), ("b",), axis_types=(AxisType.Auto,))
specs = dict(mesh=mesh, in_specs=(P(), P(), P("b")), out_specs=P())
checked = lambda step: jax.shard_map(step, **specs)
unchecked = lambda step: jax.shard_map(step, check_vma=False, **specs)
for make in (lambda layers: kfqn.kfac(1.0, layers), lambda layers: kfqn.kbfgs(0.3, layers)):
    whole = losses(make, lambda step: step)
    assert whole[-1] < whole[0]
    np.testing.assert_allclose(losses(make, unchecked, axis_name="b"), whole, rtol=1e-7)
    np.testing.assert_allclose(losses(make, checked, pmean=True), whole, rtol=1e-7)
try:
    losses(make, checked, axis_name="b")
except ValueError as error:
    assert "check_vma=False" in str(error)
else:
    raise AssertionError("no error")
"""


def test_shard_map_over_four_devices():
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=simulated(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
