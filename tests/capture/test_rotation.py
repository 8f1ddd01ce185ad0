"""Parts of a batch move on from step to step, and factors are made of every so manieth batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfqn_optax as kfqn
from kfqn_optax import _learning
from kfqn_optax._capture.curvature import STRIDE
from kfqn_optax._capture.examples import take
from kfqn_optax.bench._quick import quick_jit

model = nn.Dense(2)
x = jax.random.normal(jax.random.key(0), (10, 3))
params = quick_jit(model.init)(jax.random.key(1), x)["params"]
layers = kfqn.find_layers(model, {"params": params}, x)


def loss_fn(params, x):
    z = kfqn.outputs(model.apply({"params": params}, x), "normal")
    return jnp.mean(jnp.sum((z - jnp.sin(x[:, :2])) ** 2, axis=1))


@pytest.mark.parametrize(
    ("offset", "first", "last"), [(0, [0, 1, 2], [7, 8, 9]), (9, [9, 0, 1], [6, 7, 8])]
)
def test_examples_are_counted_from_the_offset_and_around_the_end(offset, first, last):
    rows = np.arange(10)
    for wanted, is_last in ((first, False), (last, True)):
        (taken,) = take((1,), (rows,), 10, 3, is_last, jnp.asarray(offset))
        np.testing.assert_array_equal(taken, wanted)


def test_forms_and_factors_are_of_other_parts_at_each_count():
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)

    @quick_jit
    def at(count):
        curvature = value_and_grad(params, x)[2].rotated(count)
        return curvature.factor_statistics(rows=3)["."].second_moment, curvature.value_at(params, rows=3)

    for count in (0, 1, 7):
        offset = count * STRIDE % 10
        moment, value = at(jnp.asarray(count))
        seen, held_out = (np.take(x, offset + np.arange(n, n + 3), axis=0, mode="wrap") for n in (0, -3))
        homogeneous = np.concatenate([seen, np.ones((3, 1))], axis=1)
        np.testing.assert_allclose(moment, homogeneous.T @ homogeneous / 3, rtol=1e-5)
        doubled = jax.tree.map(lambda p: 2 * p, params)
        np.testing.assert_allclose(value, loss_fn(doubled, jnp.asarray(held_out)), rtol=1e-5)


def test_factors_are_made_of_the_first_batches_and_then_of_every_third(monkeypatch):
    monkeypatch.setattr(_learning, "LEARN_AT_FIRST", 3)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)
    tx = kfqn.kfac(1.0, layers, inverse_every=3)

    @quick_jit
    def step(params, state, x):
        _, grads, curvature = value_and_grad(params, x)
        return tx.update(grads, state, params, curvature=curvature)[1]

    state, changed = tx.init(params), []
    for k in range(8):
        after = step(params, state, x + k)
        before, now = (s[0].outputs["."].factor for s in (state, after))
        changed.append(bool((before != now).any()))
        state = after
    assert changed == [True, True, True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("positions", "examples"),
    [(1, 250), (4, 62), (20, 32)],
    ids=["dense", "few positions", "many positions"],
)
def test_with_convolutions_factors_are_made_of_fewer_examples(positions, examples):
    model = nn.Dense(2) if positions == 1 else nn.Conv(2, (2,))
    x = jax.random.normal(jax.random.key(0), (300, 3) if positions == 1 else (300, positions, 3))
    params = quick_jit(model.init)(jax.random.key(1), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, x: jnp.mean(kfqn.outputs(model.apply({"params": params}, x), "normal") ** 2)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)

    def factors_of(**settings):
        tx = kfqn.kfac(1.0, layers, **settings)

        @quick_jit
        def step(params, x):
            _, grads, curvature = value_and_grad(params, x)
            return tx.update(grads, tx.init(params), params, curvature=curvature)[1]

        sides = step(params, x)[0]
        return sides.inputs["."].second_moment, sides.outputs["."].second_moment

    ours = factors_of()
    for one, same, other in zip(
        ours, factors_of(statistics_rows=examples), factors_of(statistics_rows=examples - 1), strict=True
    ):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()
