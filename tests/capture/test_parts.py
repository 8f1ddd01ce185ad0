"""Statistics of equal parts of a batch: each is what the capture says of that part alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

DENSE = ["dense without bias", "dense, two leading axes", "compact", "remat", "rnn"]
STACKED = ["scan, axis 0", "scan, axis 1", "scan, shared"]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Layers(nn.Module):
    """Convolutions of several kinds, an embedding, and dense layers with odd orders of axes."""

    @nn.compact
    def __call__(self, ids):
        options = {"param_dtype": jnp.float64}
        x = nn.Embed(5, 4, **options)(ids)
        x = jnp.tanh(nn.Conv(4, (3,), strides=2, feature_group_count=2, **options)(x))
        x = jnp.tanh(nn.ConvTranspose(4, (3,), strides=2, **options)(x))
        x = jnp.tanh(nn.Einsum((4, 2), "bti,io->tbo", **options)(x)).swapaxes(0, 1)
        return nn.DenseGeneral(3, axis=-1, batch_dims=(0,), **options)(x.transpose(2, 0, 1))


def check(value_and_grad_of, params, batch, parts):
    """``value_and_grad_of(groups)(params, batch)``, whose loss is a mean over the batch."""

    @quick_jit
    def run(params, batch):
        whole = value_and_grad_of(parts)(params, batch)[2]
        move = jax.tree.map(lambda p: 0.1 * jnp.cos(p), params)
        pieces = [value_and_grad_of(1)(params, piece)[2] for piece in jnp.split(batch, parts)]
        ends = [whole.after(move), *(piece.after(move) for piece in pieces)]
        return [[c.statistics for c in curvatures] for curvatures in ([whole, *pieces], ends)]

    for whole, *pieces in run(params, batch):
        for name, ours in whole.items():
            compare(ours, [piece[name] for piece in pieces])


def compare(ours, pieces):
    """The fields of the parts with what was measured on each part, and their mean with the whole's."""
    np.testing.assert_array_equal(ours.part_rows, np.stack([piece.rows for piece in pieces], -1))
    fields = {"part_preactivations": "preactivations", "part_grads": "preactivation_grads"}
    for field, of in fields.items():
        wanted = np.stack([getattr(piece, of) for piece in pieces], -2)
        np.testing.assert_allclose(getattr(ours, field), wanted, rtol=0, atol=1e-12)
        np.testing.assert_allclose(wanted.mean(-2), getattr(ours, of), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DENSE + STACKED)
def test_parts_of_the_zoo(name):
    case = zoo.CASES[name]
    params, x = case.example(jnp.float64)
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    check(lambda groups: kfqn.value_and_grad(case.loss, layers, groups=groups), params, x, 2)


def test_parts_of_layers_of_every_form():
    model, ids = Layers(), jnp.asarray(np.random.default_rng(0).integers(0, 5, (6, 8)))
    params = zoo.randomise(jax.eval_shape(model.init, jax.random.key(0), ids), jnp.float64)["params"]
    layers = kfqn.find_layers(model, {"params": params}, ids)
    assert len(layers) == 5
    loss = lambda params, ids: zoo.loss_of(model.apply({"params": params}, ids))
    check(lambda groups: kfqn.value_and_grad(loss, layers, groups=groups), params, ids, 3)


def test_parts_of_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(2, 3, (3,), param_dtype=jnp.float64, rngs=rngs)
            self.out = nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.conv(x)))

    model, x = Model(), jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 2)))
    layers = kfqn.find_layers(model, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda params, x: zoo.loss_of(kfqn.merge(graphdef, params, rest)(x))
    check(lambda groups: kfqn.value_and_grad(loss, layers, groups=groups), params, x, 3)


def test_rows_are_counted_by_their_weights():
    """A part's means are over its weighted rows; one without any has zeros."""
    case, mask = zoo.MLP, jnp.array([1.0, 1, 1, 0, 0, 0])
    params, x = case.example(jnp.float64)
    layers = kfqn.find_layers(case.model, {"params": params}, x)

    def loss(params, x, mask):
        with kfqn.weights(mask):
            outputs = case.model.apply({"params": params}, x)
        return (mask[:, None] * jnp.cos(outputs)).sum() / mask.sum()

    @quick_jit
    def run(params, x):
        whole = kfqn.value_and_grad(loss, layers, groups=3)(params, x, mask)[2]
        parts = [
            kfqn.value_and_grad(loss, layers)(params, x[i : i + 2], mask[i : i + 2])[2] for i in (0, 2)
        ]
        return whole.statistics, [part.statistics for part in parts]

    whole, parts = run(params, x)
    for name, ours in whole.items():
        np.testing.assert_array_equal(ours.part_rows, [2, 1, 0])
        for i, part in enumerate(parts):
            np.testing.assert_allclose(ours.part_preactivations[i], part[name].preactivations, 1e-12)
            np.testing.assert_allclose(ours.part_grads[i], part[name].preactivation_grads, 1e-10, 1e-13)
        np.testing.assert_array_equal(ours.part_grads[2], 0)


def test_one_part_leaves_the_slots_as_they_are():
    case = zoo.MLP
    params, x = case.example(jnp.float64)
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    value_and_grad = kfqn.value_and_grad(case.loss, layers, groups=1)
    assert value_and_grad.layers == layers
    statistics = jax.eval_shape(lambda: value_and_grad(params, x)[2].statistics)
    assert all(one.part_rows is None for one in statistics.values())


def test_errors():
    case = zoo.MLP
    params, x = case.example(jnp.float64)
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    with pytest.raises(ValueError, match=r"groups=4 does not divide .* which has length 6"):
        kfqn.value_and_grad(case.loss, layers, groups=4)(params, x)
    per_example = lambda params, x: jax.vmap(lambda row: case.loss(params, row))(x).mean()
    with pytest.raises(ValueError, match="must see an axis of examples"):
        kfqn.value_and_grad(per_example, layers, groups=2)(params, x)
    with pytest.raises(ValueError, match="do not go together"):
        kfqn.value_and_grad(case.loss, layers, groups=2, forward=case.loss)
    with pytest.raises(ValueError, match="groups=0"):
        kfqn.value_and_grad(case.loss, layers, groups=0)

    curvature = kfqn.value_and_grad(case.loss, layers)(params, x)[2]
    tx = kfqn.kbfgs(0.1, layers, groups=2)
    with pytest.raises(ValueError, match="made with groups=2, but the curvature has statistics of 1"):
        tx.update(params, tx.init(params), params, curvature=curvature)
    with pytest.raises(ValueError, match="start='fisher', but it must be"):
        kfqn.kbfgs(0.1, layers, start="fisher")
