"""Tests for eight devices; ``test_devices.py`` runs them where that many can be simulated."""

import contextlib
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn
from kfqn_optax._capture.examples import take
from kfqn_optax._capture.parts import Parts
from kfqn_optax.bench._quick import quick_jit

DEVICES, ROWS = 8, 1024  # more than the factors and the model take, so that parts of them are taken
METHODS = {
    "kfac": lambda layers, **options: kfqn.kfac(1.0, layers, **options),
    "kbfgs": lambda layers, **options: kfqn.kbfgs(0.3, layers, **options),
    "kbfgs_l": lambda layers, **options: kfqn.kbfgs_l(0.3, layers, memory=9, **options),
}


@functools.cache
def mesh_of(kind):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))


WEIGHTS = np.repeat([1.0, 0.0], [ROWS - 256, 256])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(x.shape[-1], param_dtype=jnp.float64)(x)), None


class Net(nn.Module):
    """Sides that eight does not divide, and as many stacked layers as devices."""

    width: int = 21

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(self.width, param_dtype=jnp.float64)(x))
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEVICES)
        x, _ = blocks()(x, None)
        return nn.Dense(8, param_dtype=jnp.float64)(x)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Problem:
    def __init__(self):
        model = Net()
        self.x = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 9)))
        self.params = quick_jit(model.init)(jax.random.key(1), self.x)["params"]
        self.layers = kfqn.find_layers(model, {"params": self.params}, self.x)

        def loss_fn(params, x, weights):
            with kfqn.weights(weights):
                z = kfqn.outputs(model.apply({"params": params}, x), "normal")
            return jnp.mean(weights[:, None] * (z - jnp.sin(3 * x[:, :8])) ** 2)

        self.value_and_grad = kfqn.value_and_grad(loss_fn, self.layers, batch_argnums=(1, 2))

    def train(self, tx, mesh=None, spec_of=None, warm=False, named=True):
        """The losses of four steps, and the state; all made with the arrays placed on the mesh.

        Without ``named`` only the arrays say what the mesh is.
        """

        def step(params, state, x, weights):
            loss, grads, curvature = self.value_and_grad(params, x, weights)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state, loss

        batch, params = (self.x, jnp.asarray(WEIGHTS)), self.params
        with jax.set_mesh(mesh) if mesh is not None and named else contextlib.nullcontext():
            if mesh is not None:
                rows = PartitionSpec() if spec_of else PartitionSpec("d")
                spec_of = spec_of or (lambda leaf: PartitionSpec())
                batch = jax.device_put(batch, NamedSharding(mesh, rows))
                place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf)))
                params = jax.tree.map(place, params)
            state, losses = tx.init(params), []
            if warm:
                state = kfqn.warm_start(state, self.value_and_grad, params, [batch])
            step = quick_jit(step)
            for _ in range(4):
                params, state, loss = step(params, state, *batch)
                losses.append(float(loss))
        return losses, state


def share(state):
    """The bytes of the factors that one device holds, over those of all."""
    leaves = jax.tree.leaves((state[0].inputs, state[0].outputs))
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(
        leaf.nbytes for leaf in leaves
    )


@functools.cache
def on_one_device(name):
    problem = Problem()
    losses, _ = problem.train(METHODS[name](problem.layers))
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_each_device_holds_its_share_of_the_factors(name):
    problem, mesh = Problem(), mesh_of(AxisType.Auto)
    losses, state = problem.train(METHODS[name](problem.layers, factor_mesh=mesh), mesh)
    np.testing.assert_allclose(losses, on_one_device(name), rtol=1e-9)
    assert share(state) < 1.4 / DEVICES


def test_a_warm_start_of_divided_factors():
    problem, mesh = Problem(), mesh_of(AxisType.Auto)
    expected, _ = problem.train(METHODS["kbfgs"](problem.layers), warm=True)
    losses, _ = problem.train(METHODS["kbfgs"](problem.layers, factor_mesh=mesh), mesh, warm=True)
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


def of_outputs(leaf):
    """Tensor parallel: the last layer's kernel divided by its outputs."""
    return PartitionSpec(None, "d") if leaf.shape == (21, 8) else PartitionSpec()


def of_layers(leaf):
    """As a pipeline: each device has one of the stacked layers."""
    return PartitionSpec("d") if len(leaf) == DEVICES and leaf.ndim > 1 else PartitionSpec()


@pytest.mark.parametrize(
    ("name", "kind", "divide", "spec_of"),
    [
        ("kbfgs", AxisType.Auto, False, of_layers),
        ("kfac", AxisType.Explicit, False, None),
        ("kbfgs", AxisType.Explicit, False, of_outputs),
        ("kfac", AxisType.Explicit, True, None),
    ],
    ids=["layers", "explicit batch", "explicit outputs", "explicit factors"],
)
def test_placements_change_nothing(name, kind, divide, spec_of):
    problem, mesh = Problem(), mesh_of(kind)
    tx = METHODS[name](problem.layers, factor_mesh=mesh if divide else None)
    losses, state = problem.train(tx, mesh, spec_of)
    np.testing.assert_allclose(losses, on_one_device(name), rtol=1e-9)
    assert not divide or share(state) < 1.4 / DEVICES


@pytest.mark.parametrize("rows", [{}, {"statistics_rows": 256}], ids=["250 rows", "256 rows"])
def test_an_explicit_mesh_that_only_the_arrays_name(rows):
    """Eight devices have equal parts of 256 rows, and not of 250."""
    problem = Problem()
    expected, _ = problem.train(METHODS["kfac"](problem.layers, **rows))
    losses, _ = problem.train(
        METHODS["kfac"](problem.layers, **rows), mesh_of(AxisType.Explicit), named=False
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("rows", "most"), [(256, 0), (250, 2 * 250 * 9)], ids=["divisible", "not divisible"]
)
def test_no_device_asks_for_the_batch_of_another(kind, rows, most):
    """Of the examples of a part, none is sent where devices have equal parts; else the part at most."""
    x = jax.device_put(Problem().x, NamedSharding(mesh_of(kind), PartitionSpec("d")))

    @jax.jit
    def parts(x):
        drawn = Parts(3, rows)
        return [take((1,), (x,), *of(ROWS, rows))[0] for of in (drawn.of_factors, drawn.of_model)]

    program = parts.lower(x).compile().as_text()
    sent = re.findall(
        r"f64\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|collective-permute)\(", program
    )
    assert all(math.prod(map(int, shape.split(","))) <= most for shape in sent)
    for part in parts(x):
        assert part.sharding.is_fully_replicated == (rows == 250)


def test_a_mesh_that_is_none():
    with pytest.raises(TypeError, match=r"kfqn: factor_mesh is a NamedSharding.*jax\.make_mesh"):
        kfqn.kfac(1.0, Problem().layers, factor_mesh=NamedSharding(mesh_of(AxisType.Auto), PartitionSpec()))
