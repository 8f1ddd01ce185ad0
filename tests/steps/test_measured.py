"""The measured rule: steps against the minimum along them, and in training; rules of the user's own."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit


def kfac(learning_rate, layers):
    return kfqn.kfac(learning_rate, layers, step_rule=kfqn.measured(), momentum=0.9, damping=0.1)


METHODS = [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn, kfac]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)


def after(nu, value, value_after, slope, mean_slope):
    rule = kfqn.measured()
    numbers = [jnp.float32(x) for x in (value, value_after, slope, mean_slope)]
    outcome = kfqn.Outcome(*numbers[:2], jnp.asarray(True), *numbers[2:], jnp.asarray(True), {})
    share, state = rule.review(rule.init({})._replace(cap=jnp.float32(nu)), outcome)
    return float(share), float(state.reach)


@pytest.mark.parametrize("gradient", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("bend", [0.1, 1.0, 40.0])
def test_the_step_made_ends_at_the_minimum_of_a_parabola_or_before(gradient, bend):
    loss = lambda t: 7.0 - gradient * t + 0.5 * bend * t**2
    share, reach = after(nu=1.0, value=loss(0.0), value_after=loss(1.0), slope=gradient, mean_slope=0.0)
    assert share == pytest.approx(min(1, gradient / bend), rel=1e-4)
    assert share <= reach < 1.0001 * max(share, 0.1)


def test_the_averaged_gradient_has_the_word_where_the_batch_says_less():
    fell, rose = dict(nu=1.0, value=1.0, value_after=0.9), dict(nu=1.0, value=1.0, value_after=2.0)
    assert after(**fell, slope=0.2, mean_slope=0.1)[0] == pytest.approx(1)
    assert after(**fell, slope=1.0, mean_slope=0.1)[0] == pytest.approx(1 / 1.8)
    assert after(**fell, slope=1.0, mean_slope=1.2)[0] == pytest.approx(1.2 / 1.8)
    assert after(**rose, slope=0.5, mean_slope=0.6)[0] == pytest.approx(0.6 / 3)
    assert after(**rose, slope=0.5, mean_slope=500.0)[0] < after(**fell, slope=0.5, mean_slope=500.0)[0] / 3


def test_a_share_is_never_negative():
    assert after(nu=1.0, value=75.6, value_after=92.2, slope=-4.9, mean_slope=-6.4)[0] == 0


def test_a_step_along_which_the_loss_bends_down_or_not_at_all_is_made():
    assert after(nu=0.3, value=1.0, value_after=-1.0, slope=1.0, mean_slope=1.0) == pytest.approx((1, 0.3))
    rounding = np.float32(1e6) * (1 + 2**-23)
    assert after(nu=1.0, value=1e6, value_after=rounding, slope=0.0, mean_slope=1e-9)[0] == 1


@pytest.mark.parametrize("value_after", [np.nan, np.inf])
def test_a_step_to_where_the_loss_is_not_finite_is_not_made(value_after):
    share, reach = after(nu=0.5, value=1.0, value_after=value_after, slope=1.0, mean_slope=1.0)
    assert share == 0
    assert 0 < reach < 0.1


@pytest.mark.parametrize(("examples", "most"), [(1, 1 / 8), (3, 3 / 8), (8, 1), (200, 1)])
def test_of_few_examples_a_part_of_the_learning_rate_is_probed(examples, most):
    class Curvature(NamedTuple):
        count_examples: object

    rule, direction = kfqn.measured(), {"w": jnp.ones(3)}
    proposal = kfqn.Proposal(*[direction] * 3, 1.0, 1.0, Curvature(lambda: examples))
    for reach, nu in ((1.0, most), (0.01, 0.0125)):
        step, state = rule.propose(rule.init({})._replace(reach=jnp.float32(reach)), proposal)
        np.testing.assert_allclose(step["w"], nu, rtol=1e-6)
        np.testing.assert_allclose(state.cap, nu, rtol=1e-6)


# In training

model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
x = jax.random.normal(jax.random.key(0), (40, 6))
target = jnp.stack([jnp.sin(x[:, 0]), x[:, 1] * x[:, 2], x[:, 3]], axis=1)
variables = quick_jit(model.init)(jax.random.key(1), x)
layers = kfqn.find_layers(model, variables, x)


def train(tx, change=lambda loss: loss, steps=40):
    """Losses of full-batch training, the last parameters, and the last state."""

    def loss_fn(params):
        return change(jnp.mean((model.apply({"params": params}, x) - target) ** 2))

    value_and_grad = kfqn.value_and_grad(loss_fn, layers)

    def step(carry, _):
        params, opt_state = carry
        loss, grads, curvature = value_and_grad(params)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), opt_state), (
            loss,
            kfqn.diagnostics(opt_state)["rule"]["cap"],
        )

    @quick_jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)

    (params, opt_state), (losses, caps) = run(variables["params"])
    return losses, caps, params, opt_state


def test_the_next_probe_is_a_little_longer_than_the_step_made_up_to_the_learning_rate():
    """Where the loss falls along each step, steps lengthen to the whole direction."""
    _, caps, _, _ = train(kfqn.kbfgs(0.01, layers))
    assert caps[0] < 0.1
    assert (np.diff(caps) >= 0).all()
    assert (np.asarray(caps[1:]) <= 1.5 * np.asarray(caps[:-1])).all()
    assert caps[-1] == 1


@pytest.mark.parametrize(("rise", "shorter"), [(0.0, False), (1.0, True)])
def test_less_is_probed_where_new_batches_have_larger_losses(rise, shorter):
    """Whatever a step does for its own batch: their losses are one function, the higher the later."""
    tx = kfqn.kbfgs(0.01, layers)
    loss_fn = lambda params, height: jnp.mean((model.apply({"params": params}, x) - target) ** 2) + height
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)

    @quick_jit
    def step(params, state, height):
        _, grads, curvature = value_and_grad(params, height)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], tx.init(variables["params"])
    for k in range(45):
        params, state = step(params, state, rise * k)
    assert (kfqn.diagnostics(state)["rule"]["cap"] < 0.2) == shorter
    for _ in range(90):  # and all of it again where they are not
        params, state = step(params, state, rise * 45)
    assert kfqn.diagnostics(state)["rule"]["cap"] == 1


@every_method
@pytest.mark.parametrize("learning_rate", [1.0, 1e3, 1e6])
def test_no_learning_rate_makes_the_loss_explode(method, learning_rate):
    losses, caps, _, _ = train(method(learning_rate, layers))
    assert np.isfinite(losses).all()
    assert losses.max() < 3 * losses[0]
    assert losses[-1] < 0.7 * losses[0]
    assert caps.min() < 1 or learning_rate == 1


@every_method
def test_a_constant_added_to_the_loss_changes_no_step(method):
    plain = train(method(30.0, layers))
    moved = train(method(30.0, layers), lambda loss: loss + 0.5)
    np.testing.assert_allclose(plain[1][:8], moved[1][:8], rtol=0.05)
    np.testing.assert_allclose(plain[0][:8], moved[0][:8] - 0.5, rtol=0.02)


def test_a_step_never_goes_beyond_the_minimum_of_the_batch_along_it():
    tx = kfqn.kbfgs(100.0, layers, momentum=0.0)
    loss_fn = lambda params: jnp.mean((model.apply({"params": params}, x) - target) ** 2)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)
    params, opt_state = variables["params"], tx.init(variables["params"])

    @quick_jit
    def step(params, opt_state):
        _, grads, curvature = value_and_grad(params)
        return tx.update(grads, opt_state, params, curvature=curvature)

    checked = 0
    for _ in range(15):
        updates, opt_state = step(params, opt_state)
        nearer = optax.tree.add_scale(params, 0.9, updates)
        params = optax.apply_updates(params, updates)
        if kfqn.diagnostics(opt_state)["rule"]["cap"] < 0.01:  # where the loss is a parabola along the step
            assert loss_fn(params) <= loss_fn(nearer) * (1 + 1e-3)
            checked += 1
    assert checked > 3


def test_training_goes_on_after_steps_that_were_not_finite():
    """Each refused step makes the next probe shorter, until one ends where the loss is finite."""
    overflowing = lambda loss: jnp.cosh(jnp.sqrt(loss) * 10)
    losses, _, _, opt_state = train(kfqn.kbfgs(1e4, layers), overflowing)
    assert kfqn.diagnostics(opt_state)["rejected"] > 0
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_an_indefinite_factor_does_not_stop_training():
    """The layer takes the averaged gradient until its factor is sound again."""
    tx = kfqn.kbfgs(0.3, layers)
    loss_fn = lambda params: jnp.mean((model.apply({"params": params}, x) - target) ** 2)
    _, grads, curvature = kfqn.value_and_grad(loss_fn, layers)(variables["params"])
    ours, *rest = tx.init(variables["params"])
    side = ours.outputs["layers_0"]
    spoilt = ours.outputs | {"layers_0": side._replace(factor=-side.factor)}
    updates, state = tx.update(
        grads, (ours._replace(outputs=spoilt), *rest), variables["params"], curvature=curvature
    )
    average, kernel = state[0].momentum["layers_0"]["kernel"], updates["layers_0"]["kernel"]
    np.testing.assert_allclose(kernel, -0.3 * state[0].rule.cap * average, rtol=1e-5)
    assert state[0].rule.cap > 0


def test_a_rule_of_the_users_own():
    class Steps(NamedTuple):
        cap: jax.Array

    half = kfqn.StepRule(
        init=lambda params: Steps(jnp.ones([])),
        propose=lambda state, proposal: (jax.tree.map(lambda d: 0.5 * d, proposal.direction), Steps(0.5)),
        review=lambda state, outcome: (1.0, state),
    )
    full, _, _, _ = train(kfqn.kbfgs(0.1, layers, step_rule=None), steps=2)
    halved, caps, _, _ = train(kfqn.kbfgs(0.2, layers, step_rule=half), steps=2)
    np.testing.assert_array_equal(caps, 0.5)
    np.testing.assert_allclose(halved, full, rtol=1e-6)


@pytest.mark.parametrize(
    "method", [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfac], ids=lambda method: method.__name__
)
def test_batches_of_one_example_train_a_classifier(method):
    """The minimum along a step is that of one example: steps to it ended at .34 to 2.6, from 1.2."""
    net = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(3)])
    kinds = kfqn.find_layers(
        net, quick_jit(net.init)(jax.random.key(0), jnp.ones((1, 8))), jnp.ones((1, 8))
    )

    def loss_fn(params, x, y):
        logits = kfqn.outputs(net.apply({"params": params}, x), "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value_and_grad, tx = kfqn.value_and_grad(loss_fn, kinds, batch_argnums=(1, 2)), method(1.0, kinds)

    @quick_jit
    def losses(params, x, y, order):
        def step(carry, taken):
            params, state = carry
            _, grads, curvature = value_and_grad(params, x[taken], y[taken])
            updates, state = tx.update(grads, state, params, curvature=curvature)
            params = optax.apply_updates(params, updates)
            return (params, state), loss_fn(params, x, y)

        return jax.lax.scan(step, (params, tx.init(params)), order)[1]

    for seed in range(4):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 8)).astype(np.float32)
        y = np.argmax(x @ rng.normal(size=(8, 3)) + rng.normal(size=(200, 3)), 1)
        params = net.init(jax.random.key(seed), x)["params"]
        course = losses(params, x, y, rng.integers(200, size=(300, 1)))
        start = loss_fn(params, x, y)
        assert course[-20:].mean() < 0.8 * start
        assert course.max() < (2.5 if method is kfqn.kfac else 1.2) * start
