"""Sides longer than ``max_dim``, of the method or of ``find_layers``: every method trains, in any units."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._sides.fisher import FLOOR, fisher_diagonal
from kfqn_optax.bench._quick import quick_jit

WORDS = 64
IDS = jax.random.randint(jax.random.key(0), (256,), 0, WORDS)
NEXT = (7 * IDS) % WORDS


def language_model():
    return nn.Sequential([nn.Embed(WORDS, 16), nn.Dense(32), nn.tanh, nn.Dense(WORDS)])


def trained(tx_of, model, x, y, mark, steps, unit=1.0, found=None):
    """The losses of some steps, in units of the loss, and the parameters."""
    variables = model.init(jax.random.key(1), x)
    layers = kfqn.find_layers(model, variables, x, **({} if found is None else {"max_dim": found}))

    def loss_fn(params, x, y):
        z = kfqn.outputs(model.apply({"params": params}, x), mark)
        return unit * optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    tx, value_and_grad = tx_of(layers), kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))

    def step(carry, _):
        params, state = carry
        loss, grads, curvature = value_and_grad(params, x, y)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), loss / unit

    @quick_jit
    def run(params):
        (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        return losses, params, kfqn.diagnostics(state)["rejected"]

    losses, params, rejected = run(variables["params"])
    assert rejected == 0
    return np.asarray(losses), params


# -------------------------------------------------------------------------------- kfac: no unit, no worse


@functools.cache
def without_max_dim(mark):
    return trained(lambda layers: kfqn.kfac(1.0, layers), language_model(), IDS, NEXT, mark, 25)[0]


@pytest.mark.parametrize(("mark", "unit"), [("categorical", 1e-3), ("categorical", 1e3), (None, 1e-3)])
def test_a_head_longer_than_max_dim_learns_as_fast_in_any_units(mark, unit):
    whole = without_max_dim(mark)
    long, _ = trained(
        lambda layers: kfqn.kfac(1.0, layers, max_dim=48), language_model(), IDS, NEXT, mark, 25, unit
    )
    assert whole[-1] < 1e-4
    assert long[10] < 2 * whole[10]
    assert long[-1] < 2 * whole[-1]


def test_max_dim_of_the_layers_does_what_that_of_kfac_does():
    own, theirs = (
        trained(tx_of, language_model(), IDS, NEXT, "categorical", 8, found=found)[1]
        for tx_of, found in (
            (lambda layers: kfqn.kfac(1.0, layers, max_dim=48), None),
            (lambda layers: kfqn.kfac(1.0, layers), 48),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), own, theirs)


# ------------------------------------------------------------------------------------------- every method


class Small(nn.Module):
    """Rows of 19, 4 and 7 numbers in, of 3, 6 and 2 out: some longer than 5, some not."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3))(x))
        x = nn.tanh(nn.Dense(6)(x.mean((1, 2))))
        return nn.Dense(2)(x)


METHODS = {
    "kfac": kfqn.kfac,
    "kbfgs": kfqn.kbfgs,
    "kbfgs, start": lambda lr, layers, **given: kfqn.kbfgs(lr, layers, start="gradients", **given),
    "kbfgs_l": lambda lr, layers, **given: kfqn.kbfgs_l(lr, layers, memory=3, limited_inputs=True, **given),
    "kfqn": kfqn.kfqn,
}


@pytest.mark.parametrize(("found", "max_dim"), [(5, None), (1, 5), (5, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_whichever_max_dim_is_shorter(name, found, max_dim):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 5, 5, 2)), jnp.float32)
    y = jnp.asarray(x[:, 1, :, 0].sum(1) > 0, jnp.int32)
    tx_of = lambda layers: METHODS[name](1.0, layers, max_dim=max_dim)
    losses, _ = trained(tx_of, Small(), x, y, "categorical", 6, found=found)
    assert losses[-1] < losses[0]


def test_a_side_that_wants_a_square_the_layers_do_not_keep_says_so():
    model, x = nn.Dense(6), jnp.ones((8, 3))
    variables = model.init(jax.random.key(0), x)
    layers = kfqn.find_layers(model, variables, x, max_dim=5)
    value_and_grad = kfqn.value_and_grad(
        lambda params: jnp.mean(model.apply({"params": params}, x) ** 2), layers
    )
    tx = kfqn.scale_by_kfqn(
        layers,
        input_side=lambda layer: kfqn.diagonal(0.9),
        output_side=lambda layer: kfqn.fisher(lambda given: given.grad_moment, 0.9, 1),
        probe_step=1.0,
    )
    _, grads, curvature = value_and_grad(variables["params"])
    with pytest.raises(ValueError, match=r"max_dim of kfqn\.find_layers"):
        tx.update(grads, tx.init(variables["params"]), curvature=curvature)


# ----------------------------------------------------------------------------------------- the statistic


@pytest.mark.parametrize("mark", ["categorical", "normal", None])
@pytest.mark.parametrize("forward", [False, True])
def test_grad_squares_are_the_diagonal_of_the_moment_and_stay_where_it_is_too_long(mark, forward):
    """For a convolution with groups too, whose copies are those of the groups."""
    model = nn.Sequential([nn.Conv(4, (2, 2), feature_group_count=2), nn.relu, nn.Dense(6)])
    x = jax.random.normal(jax.random.key(0), (5, 3, 3, 2))
    variables = model.init(jax.random.key(1), x)
    apply = lambda params, x: model.apply({"params": params}, x)
    loss_fn = lambda params, x: jnp.mean(jnp.sum(jnp.square(kfqn.outputs(apply(params, x), mark)), -1))

    def statistics(max_dim):
        layers = kfqn.find_layers(model, variables, x, max_dim=max_dim)
        value_and_grad = kfqn.value_and_grad(loss_fn, layers, forward=apply if forward else None)
        _, _, curvature = value_and_grad(variables["params"], x)
        return curvature.statistics, curvature.factor_statistics(key=3)

    for whole, long in zip(*(jax.jit(statistics, static_argnums=0)(n) for n in (100, 1)), strict=True):
        for name, one in whole.items():
            assert (one.grad_squares is None) == (one.grad_moment is None)
            assert long[name].grad_moment is None
            if one.grad_squares is None:
                assert long[name].grad_squares is None
                continue
            diagonal = jnp.diagonal(one.grad_moment, axis1=-2, axis2=-1)
            np.testing.assert_allclose(one.grad_squares, diagonal, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(long[name].grad_squares, diagonal, rtol=1e-4, atol=1e-9)


def test_sampled_squares_have_the_gauss_newton_diagonal_for_their_mean():
    """Of a head, whose Gauss-Newton matrix in its outputs is mean(diag(p) - p p^T), in NumPy."""
    model, x = nn.Dense(5), jax.random.normal(jax.random.key(0), (40, 3))
    variables = model.init(jax.random.key(1), x)
    layers = kfqn.find_layers(model, variables, x, max_dim=4)

    def loss_fn(params):
        z = kfqn.outputs(model.apply({"params": params}, x), "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(z, jnp.arange(40) % 5).mean()

    @quick_jit
    def drawn(keys):
        _, _, curvature = kfqn.value_and_grad(loss_fn, layers)(variables["params"])
        return jax.vmap(lambda key: curvature.factor_statistics(key=key)["."].grad_squares)(keys)

    draws = drawn(jax.random.split(jax.random.key(0), 150))
    p = np.asarray(jax.nn.softmax(model.apply(variables, x)), np.float64)
    # The mean of 6,000 labels: within 4 standard errors, each below 0.5 of the number itself a label.
    np.testing.assert_allclose(np.mean(draws, 0), (p * (1 - p)).mean(0), rtol=4 / np.sqrt(150 * 40))


# ----------------------------------------------------------------------------------------- the side itself

D, DECAY = 4, 0.7


def of_squares(squares, rows=3.0):
    absent = dict.fromkeys(Statistics._fields)
    return Statistics(**(absent | {"rows": jnp.asarray(rows), "grad_squares": jnp.asarray(squares)}))


def test_the_factor_is_the_inverse_of_the_average_plus_the_damping():
    side, average = fisher_diagonal(lambda given: given.grad_squares, DECAY), None
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        state = side.init(D, jnp.float64)
        for k in range(1, 7):
            squares, damping = rng.uniform(0, 2, D), 10.0**-k
            rate = min(DECAY, 1 - 1 / k)
            average = squares if average is None else rate * average + (1 - rate) * squares
            np.testing.assert_allclose(side.scale(state, of_squares(squares)), average.mean())
            state = side.observe(state, of_squares(squares), damping)
            least = max(damping, FLOOR * average.sum())
            np.testing.assert_allclose(state.factor, 1 / (average + least), rtol=1e-12)
        x = rng.normal(size=(D, 2))
        np.testing.assert_allclose(side.apply(state, x), x / (average + least)[:, None], rtol=1e-12)
        unseen = side.observe(state, of_squares(squares, rows=0.0), 0.3)
        jax.tree.map(np.testing.assert_array_equal, unseen, state)
        bad = side.observe(state, of_squares(np.full(D, np.nan)), 0.3)
        np.testing.assert_array_equal(bad.second_moment, state.second_moment)
        np.testing.assert_allclose(bad.factor, 1 / (average + 0.3), rtol=1e-12)
        assert (int(bad.count), bad.pairs.counts.tolist()) == (6, [0, 0, 1])
        outlier = side.observe(state, of_squares([1e12, 0, 0, 0]), 0.1)
        taken = DECAY * average + (1 - DECAY) * np.array([10 * average.sum(), 0, 0, 0])
        np.testing.assert_allclose(outlier.second_moment, taken, rtol=1e-12)
        assert outlier.pairs.counts.tolist() == [0, 1, 0]
