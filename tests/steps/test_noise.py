"""What of a step's success is noise: losses against NumPy, and the average of gradients that follows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._steps.noise import Noise, followed
from kfqn_optax.bench._quick import quick_jit


def parts(values, changes, whole):
    def step(noise, seen):
        noise = followed(noise, *seen)
        return noise, noise.part

    seen = jnp.asarray(values, jnp.float32), jnp.asarray(changes, jnp.float32), jnp.asarray(whole)
    return np.asarray(jax.lax.scan(step, Noise.start(jnp.float32), seen)[1])


def expected_parts(values, changes, whole):
    won = lost = fall = 0.0
    after, found = 0.0, []
    for value, change, all_of_it in zip(values, changes, whole, strict=True):
        won = 0.9 * won + 0.1 * fall
        lost = 0.9 * lost + 0.1 * (value - after if fall > 0 else 0)
        fall = min(-change, abs(value)) if all_of_it and change < 0 else 0.0
        after = value - fall
        found.append(np.clip(lost / won, 0, 1) if won > 0 else 0.0)
    return np.array(found)


def test_the_part_that_is_noise_is_that_of_the_oracle():
    rng = np.random.default_rng(0)
    values, changes = rng.uniform(1, 2, 50), rng.uniform(-1.5, 0.1, 50)
    whole = rng.uniform(size=50) < 0.9
    np.testing.assert_allclose(
        parts(values, changes, whole), expected_parts(values, changes, whole), rtol=1e-4
    )


def test_nothing_is_noise_where_the_next_batch_has_what_the_step_won():
    falling = 0.9 ** np.arange(20)
    np.testing.assert_allclose(parts(falling, -0.1 * falling, np.full(20, True)), 0, atol=1e-5)


def test_all_is_noise_where_it_has_nothing_of_it():
    same = np.ones(20)
    np.testing.assert_allclose(parts(same, -0.1 * same, np.full(20, True))[1:], 1, rtol=1e-5)


def test_a_step_that_is_not_finite_or_not_whole_tells_nothing():
    changes = np.array([-0.1, np.nan, -0.1, -0.1])
    found = parts(np.array([1.0, 1.0, 1.0, 0.95]), changes, np.array([True, False, True, True]))
    np.testing.assert_allclose(
        found, expected_parts([1.0, 1.0, 1.0, 0.95], [-0.1, 0, -0.1, -0.1], [1, 0, 1, 1]), rtol=1e-5
    )


def train(new_batches, examples=48, batch_argnums=(1, 2), **settings):
    """A linear regression of noisy labels; the rates of the average, and the state."""
    model, truth = nn.Dense(3), jax.random.normal(jax.random.key(0), (5, 3))
    params = quick_jit(model.init)(jax.random.key(1), jnp.ones((1, 5)))["params"]
    layers = kfqn.find_layers(model, {"params": params}, jnp.ones((1, 5)))

    def loss_fn(params, x, y):
        return jnp.mean((kfqn.outputs(model.apply({"params": params}, x), "normal") - y) ** 2)

    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=batch_argnums)
    tx = kfqn.kfac(1.0, layers, step_rule=kfqn.quadratic(**settings))

    @quick_jit
    def step(params, state, x, y):
        _, grads, curvature = value_and_grad(params, x, y)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, grads

    def batch(seed):
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.normal(size=(examples, 5)), jnp.float32)
        return x, x @ truth + 3 * jnp.asarray(rng.normal(size=(examples, 3)), jnp.float32)

    state, rates, average = tx.init(params), [], jax.tree.map(jnp.zeros_like, params)
    for seed in range(25):
        rate = state[0].rule.momentum
        params, state, grads = step(params, state, *batch(seed if new_batches else 0))
        rates.append(float(rate))
        if state[0].momentum != ():
            average = jax.tree.map(lambda m, g, rate=rate: rate * m + (1 - rate) * g, average, grads)
            for ours, theirs in zip(*map(jax.tree.leaves, (state[0].momentum, average)), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    return np.array(rates), state


def test_gradients_are_averaged_where_batches_are_noise():
    rates, _ = train(new_batches=True)
    assert rates[0] == 0
    assert np.median(rates[-10:]) > 0.5


def test_no_gradients_are_averaged_where_it_is_always_the_same_batch():
    rates, _ = train(new_batches=False)
    np.testing.assert_array_equal(rates, 0)


@pytest.mark.parametrize("batch_argnums", [(1, 2), None], ids=["counted", "not counted"])
@pytest.mark.parametrize("examples", [16, 48])
def test_gradients_are_averaged_where_batches_have_examples_enough(examples, batch_argnums):
    rates, _ = train(new_batches=True, examples=examples, batch_argnums=batch_argnums)
    assert (rates > 0).any() == (examples >= 32)


@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_the_rate_of_the_user(rate):
    rates, state = train(new_batches=True, momentum=rate)
    assert (rates <= rate).all()
    assert (state[0].momentum == ()) == (rate == 0)
