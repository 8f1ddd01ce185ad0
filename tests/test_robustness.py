"""What goes wrong in training does no lasting harm: bad batches are left out, counted, and forgotten."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_conformance import METHODS, assert_same, every_method, every_variant, find_state

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

IN, OUT, ROWS, LR = 3, 2, 6, 0.1


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(OUT)(x)


MODEL = Net()


def squares(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def hyperbolic(outputs, y):
    """Finite near its minimum at 0, and overflows a float32 from 90 on."""
    return jnp.cosh(outputs).mean() + 0 * y.sum()


@functools.cache
def parameters():
    return jax.jit(MODEL.init)(jax.random.key(1), jnp.zeros((1, IN)))["params"]


@functools.cache
def compiled(method, loss=squares, **settings):
    """``train_step(params, state, x, y, lr)``, and the initial state; compiled once for all tests."""
    layers = kfqn.find_layers(MODEL, {"params": parameters()}, jnp.zeros((1, IN)))
    value_and_grad = kfqn.value_and_grad(
        lambda params, x, y: loss(MODEL.apply({"params": params}, x), y), layers
    )

    @quick_jit
    def train_step(params, state, x, y, lr):
        tx = method(lr, layers, **settings)
        value, grads, curvature = value_and_grad(params, x, y)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    return train_step, method(LR, layers, **settings).init(parameters())


class Training:
    """A few good steps, and then what a test does to it."""

    def __init__(self, method, good=3, loss=squares, **settings):
        self.run = method, loss, tuple(settings.items())
        self.train_step, self.state = compiled(method, loss, **settings)
        self.params = parameters()
        for k in range(good):
            self.step(*batch(k))

    def step(self, x, y, lr=LR):
        """Take a step; returns the parameters and the state before it."""
        before = self.params, self.ours
        x, y, lr = (jnp.asarray(value, jnp.float32) for value in (x, y, lr))
        self.params, self.state, self.loss = self.train_step(self.params, self.state, x, y, lr)
        return before

    @property
    def ours(self):
        return find_state(self.state)

    def check_goes_on(self):
        """All state is finite, and good batches change parameters and factors as ever."""
        for leaf in jax.tree.leaves((self.params, self.state)):
            assert np.isfinite(leaf).all()
        before, losses = self.ours, []
        for _ in range(10):
            params, _ = self.step(*batch(100))
            losses.append(self.loss)
            assert different(self.params, params)
        for ours, old in zip(factors(self.ours), factors(before), strict=True):
            assert different(ours, old)
        assert self.ours.rejected == before.rejected
        undisturbed = fall_of_undisturbed(self.run)
        assert losses[0] - losses[-1] > 0.3 * undisturbed, (losses, undisturbed)


@functools.cache
def fall_of_undisturbed(run):
    """By how much the loss falls in ten steps where nothing goes wrong."""
    method, loss, settings = run
    training, losses = Training(method, loss=loss, **dict(settings)), []
    for _ in range(10):
        training.step(*batch(100))
        losses.append(training.loss)
    return losses[0] - losses[-1]


def batch(k):
    rng = np.random.default_rng(k)
    x = rng.normal(size=(ROWS, IN))
    return x, np.sin(x[:, :OUT]) + 0.1 * rng.normal(size=(ROWS, OUT))


def factors(state):
    return [side.factor for sides in (state.inputs, state.outputs) for side in sides.values()]


def different(ours, other):
    return any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (ours, other)), strict=True))


def with_one(array, value):
    array = array.copy()
    array[1, 1] = value
    return array


@every_variant
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_input_changes_no_parameter_and_no_factor(method, value):
    training = Training(method)
    x, y = batch(50)
    params, state = training.step(with_one(x, value), y)
    assert_same(training.params, params)
    assert_same(factors(training.ours), factors(state))
    assert_same(training.ours.momentum, state.momentum)
    assert training.ours.rejected == 1
    assert training.ours.share == 0
    assert training.ours.count == state.count + 1
    training.check_goes_on()


@every_method
@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30], ids=["inf", "nan", "so large that <M, D> is inf"])
def test_a_bad_gradient_changes_no_parameter(method, value):
    training = Training(method)
    x, y = batch(50)
    params, state = training.step(x, with_one(y, value))
    assert_same(training.params, params)
    assert training.ours.rejected == 1
    if not np.isfinite(value):
        assert_same(factors(training.ours), factors(state))
    assert_same(training.ours.momentum, state.momentum)
    training.check_goes_on()


@every_method
def test_a_first_batch_that_is_bad_is_no_start(method):
    training = Training(method, good=0)
    x, y = batch(0)
    params, state = training.step(with_one(x, np.nan), y)
    assert_same(training.params, params)
    assert_same(factors(training.ours), factors(state))
    training.check_goes_on()
    fresh = Training(method, good=0)
    for _ in range(10):
        fresh.step(*batch(100))
    for ours, expected in zip(*map(jax.tree.leaves, (training.params, fresh.params)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@every_method
def test_a_batch_of_zeros(method):
    training = Training(method)
    training.step(np.zeros((ROWS, IN)), np.zeros((ROWS, OUT)))
    assert training.ours.rejected == 0
    training.check_goes_on()
    fresh = Training(method, good=0)
    fresh.step(np.zeros((ROWS, IN)), np.zeros((ROWS, OUT)))
    fresh.check_goes_on()


@every_method
def test_a_batch_of_one(method):
    training = Training(method, good=0)
    for k in range(3):
        training.step(*(part[:1] for part in batch(k)))
    training.check_goes_on()


@every_method
def test_dead_units(method):
    """No gradient reaches the first layer: it stays, and the second one learns its bias."""
    training = Training(method, good=0)
    training.params = dict(
        training.params, Dense_0=dict(training.params["Dense_0"], bias=jnp.full(4, -1e3))
    )
    for k in range(5):
        params, _ = training.step(*batch(k))
        assert_same(training.params["Dense_0"], params["Dense_0"])
        assert different(training.params["Dense_1"]["bias"], params["Dense_1"]["bias"])
    assert training.ours.rejected == 0
    for leaf in jax.tree.leaves((training.params, training.state)):
        assert np.isfinite(leaf).all()
    training.params = parameters()
    training.check_goes_on()


@every_method
def test_a_learning_rate_of_zero(method):
    """As in a warm-up from 0: nothing moves, no pair is made of nothing, and training starts after it."""
    training = Training(method, good=0)
    params, _ = training.step(*batch(0), lr=0.0)
    assert_same(training.params, params)
    assert training.ours.rejected == 0
    for side in training.ours.outputs.values():
        assert side.pairs.counts[0] == 0
    training.check_goes_on()


def test_a_warm_up_from_zero_as_a_schedule():
    def method(lr, layers):
        del lr
        return kfqn.kbfgs(optax.linear_schedule(0.0, LR, 5), layers)

    training = Training(method, good=0)
    params, _ = training.step(*batch(0))
    assert_same(training.params, params)
    training.check_goes_on()


@every_method
@pytest.mark.parametrize("lr", [1e3, 1e8, 1e30])
def test_the_default_cap_keeps_a_huge_learning_rate_finite(method, lr):
    training = Training(method, good=0)
    losses, parts = [], []
    for k in range(20):
        training.step(*batch(k), lr=lr)
        losses.append(training.loss)
        rule = training.ours.rule
        parts.append(rule.cap if hasattr(rule, "cap") else rule.share)
    for leaf in jax.tree.leaves((training.params, training.state)):
        assert np.isfinite(leaf).all()
    assert np.isfinite(losses).all()
    assert 0 <= (parts[-1] if hasattr(training.ours.rule, "cap") else min(parts)) < 1


SECOND_PASS = [name for name in METHODS if name != "kfac"]


@pytest.mark.parametrize("name", SECOND_PASS)
def test_a_second_pass_that_overflows_leaves_out_the_step(name):
    training = Training(METHODS[name], loss=hyperbolic, step_rule=None)
    params, state = training.step(*batch(50), lr=1e6)
    assert np.isfinite(training.loss)
    assert_same(training.params, params)
    assert_same(
        [side.factor for side in training.ours.outputs.values()],
        [side.factor for side in state.outputs.values()],
    )
    assert training.ours.rejected == 1
    assert training.ours.share == 0
    training.check_goes_on()


@pytest.mark.parametrize("name", ["kbfgs", "kfqn"])
@pytest.mark.parametrize("when", [2, 3], ids=["when factors are due", "between"])
def test_a_bad_batch_with_an_update_interval(name, when):
    training = Training(METHODS[name], good=when, update_every=2)
    x, y = batch(50)
    params, state = training.step(with_one(x, np.nan), y)
    assert_same(training.params, params)
    assert_same(factors(training.ours), factors(state))
    assert training.ours.rejected == 1
    for k in range(when + 1, when + 5):
        params, state = training.step(*batch(k))
        assert different(training.params, params)
        assert different(factors(training.ours), factors(state)) == (k % 2 == 0)
    for leaf in jax.tree.leaves((training.params, training.state)):
        assert np.isfinite(leaf).all()
