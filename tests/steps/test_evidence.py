"""Losses whose values say nothing about their steps: other multiples of the slope, rounding, not finite."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._steps.evidence import Evidence, weighed
from kfqn_optax.bench._quick import quick_jit

METHODS = [kfqn.kfac, kfqn.kbfgs]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
stopped = jax.lax.stop_gradient


def doubts(functions, rates):
    """Whether phi's values are in doubt after each step -t g, |g| = 1, phi a function of t."""
    evidence, found = Evidence.start(), []
    for phi, t in zip(functions, rates, strict=True):
        evidence = weigh(evidence, *(jnp.float32(number) for number in (phi(t), -t, t)))
        found.append(bool(evidence.doubt))
    return found


weigh = quick_jit(lambda *numbers: weighed(*numbers, known=jnp.asarray(True)))


@pytest.mark.parametrize("bend", [0.5, 3.0, 1e3, 1e6])
@pytest.mark.parametrize("power", [1.5, 2, 4])
def test_a_function_that_bends_is_never_in_doubt(bend, power):
    """However long the first step is, and however much too long the ones after it still are."""
    for factor in (0.3, 0.5, 0.8):
        assert not any(doubts([lambda t: -t + bend * t**power] * 60, factor ** np.arange(60)))


def test_a_wall_is_not_in_doubt():
    assert not any(doubts([lambda t: 5.0] * 20, 0.5 ** np.arange(20)))


@pytest.mark.parametrize("multiple", [0.3, 0.0, -1.0, -20.0])
def test_another_multiple_of_the_slope_is_in_doubt_until_it_agrees_for_a_while(multiple):
    other, right = (lambda t: -multiple * t), (lambda t: -t + 0.5 * t**2)
    found = doubts([other] * 30 + [right] * 15, [*0.5 ** np.arange(6), *[0.1] * 39])
    assert found[:4] == [False] * 4
    assert all(found[6:35])
    assert not found[-1]


def train(loss_fn, tx, params, layers, batches, argnums=None):
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=argnums)

    @quick_jit
    def step(params, state, *batch):
        value, grads, curvature = value_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for batch in batches:
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    return params, state, losses


model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])
x = jax.random.normal(jax.random.key(0), (300, 4))
y = jnp.sin(x.sum(1, keepdims=True))
start = quick_jit(model.init)(jax.random.key(1), x)["params"]
layers = kfqn.find_layers(model, {"params": start}, x)


def squares(params, x, y):
    return jnp.mean((kfqn.outputs(model.apply({"params": params}, x), "normal") - y) ** 2)


@every_method
@pytest.mark.parametrize(
    ("of", "constant", "times"),
    [(lambda x: x / stopped(x), 1, 4), (lambda x: x - stopped(x), 0, 40)],
    ids=["over", "less"],
)
def test_a_loss_with_its_own_stopped_value_is_learnt(method, of, constant, times):
    """The values are all the same, and the gradient is that of the loss's logarithm, or of the loss.

    That a loss which is always 0 never changes takes longer to find out: 40 times the other's is left.
    """

    def of_stopped(params, x, y):
        return of(squares(params, x, y))

    args = [(x, y)] * 100
    params, state, losses = train(of_stopped, method(1.0, layers), start, layers, args, (1, 2))
    assert max(losses) == min(losses) == constant
    assert kfqn.diagnostics(state)["rejected"] == 0
    plain, _, _ = train(squares, method(1.0, layers), start, layers, args, (1, 2))
    assert squares(params, x, y) < times * squares(plain, x, y)


@pytest.mark.parametrize(("method", "steps"), [(kfqn.kfac, 120), (kfqn.kbfgs, 250)])
def test_temporal_differences_with_a_stopped_target_find_the_values(method, steps):
    """TD(0) on a chain of 20 states, against the values that NumPy solves for."""
    rng = np.random.default_rng(0)
    chain, rewards = rng.dirichlet(np.full(20, 0.3), 20), np.sin(np.arange(20)) + 0.5
    values = np.linalg.solve(np.eye(20) - 0.95 * chain, rewards)
    states, p, r = jnp.eye(20), jnp.float32(chain), jnp.float32(rewards)
    start = quick_jit(model.init)(jax.random.key(1), states)["params"]
    layers = kfqn.find_layers(model, {"params": start}, states)
    of = lambda params: model.apply({"params": params}, states)[:, 0]

    def loss_fn(params):
        v = of(params)
        errors = kfqn.outputs(r[:, None] + 0.95 * stopped(v)[None] - v[:, None], "normal")
        return (p * errors**2).sum(1).mean()

    params, state, _ = train(loss_fn, method(1.0, layers), start, layers, [()] * steps)
    assert np.abs(of(params) - values).max() < 0.01 * np.abs(values).max()
    assert kfqn.diagnostics(state)["rejected"] == 0


@every_method
def test_what_has_converged_follows_data_that_change(method):
    """A regression with noise, against NumPy's least squares before and after."""
    rng = np.random.default_rng(0)
    linear, x = nn.Dense(1), rng.normal(size=(200, 4))
    start = quick_jit(linear.init)(jax.random.key(1), jnp.float32(x))["params"]
    layers = kfqn.find_layers(linear, {"params": start}, jnp.float32(x))
    noise = 0.5 * rng.normal(size=(200, 1))
    targets = [
        x @ np.array([[1.0], [2], [3], [4]]) + noise,
        x @ np.array([[-2.0], [1], [0], [5]]) + 3 + noise,
    ]
    exact = [np.linalg.lstsq(np.c_[x, np.ones(200)], y, rcond=None)[0] for y in targets]

    def loss_fn(params, x, y):
        return jnp.mean((kfqn.outputs(linear.apply({"params": params}, x), "normal") - y) ** 2)

    first, second = ((jnp.float32(x), jnp.float32(y)) for y in targets)
    tx, many = method(1.0, layers), 200
    params, state, _ = train(loss_fn, tx, start, layers, [first] * many, (1, 2))
    error = lambda params, to: np.abs(np.r_[params["kernel"], params["bias"][None]] - to).max()
    assert error(params, exact[0]) < 1e-3
    fresh, _, _ = train(loss_fn, tx, start, layers, [second] * 40, (1, 2))
    params, state, _ = train(loss_fn, tx, start, layers, [first] * many + [second] * 40, (1, 2))
    assert error(params, exact[1]) < max(1e-3, 2 * error(fresh, exact[1]))
    assert kfqn.diagnostics(state)["rejected"] == 0


def powers(params, x, y):
    """No second derivative where an output is its target."""
    return jnp.mean(jnp.abs(kfqn.outputs(model.apply({"params": params}, x), "normal") - y) ** 1.5)


@every_method
def test_second_derivatives_that_are_not_finite_leave_the_damping_alone(method):
    """One of 300 examples has none; the loss and its gradient are finite."""
    zero, rows = jnp.zeros_like(x).at[1:].set(x[1:]), jnp.zeros_like(y).at[1:].set(y[1:])
    args = [(zero, rows)] * 60
    _, state, losses = train(powers, method(1.0, layers), start, layers, args)
    told = kfqn.diagnostics(state)
    assert told["rejected"] == 0
    assert losses[-1] < 0.2 * losses[0]
    if method is kfqn.kfac:
        assert told["rule"]["undefined"] > 0
        skipped = [layer["output"]["skipped"] for layer in told["layers"].values()]
        assert all(count > 0 for count in skipped)


def test_rows_of_which_the_loss_is_not_finite_are_no_evidence():
    """The mean over rows of weight 1 is 0 / 0 of most parts of the batch, and finite of all of it."""
    weight = jnp.zeros((300, 1)).at[:2].set(1.0)

    def loss_fn(params, x, y, weight):
        z = kfqn.outputs(model.apply({"params": params}, x), "normal")
        return (weight * (z - y) ** 2).sum() / weight.sum()

    tx = kfqn.kfac(1.0, layers, step_rule=kfqn.quadratic(rows=50))
    _, state, losses = train(loss_fn, tx, start, layers, [(x, y, weight)] * 40, (1, 2, 3))
    told = kfqn.diagnostics(state)
    assert told["rejected"] == 0
    assert told["rule"]["undefined"] > 0
    assert np.median(losses[-15:]) < 0.2 * losses[0]
