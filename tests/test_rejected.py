"""A step that is left out changes no parameter, whatever comes after the direction in the chain."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from test_conformance import every_method

import kfqn_optax as kfqn
from kfqn_optax._usual import UsualState, believed
from kfqn_optax.bench._quick import quick_jit

x = jax.random.normal(jax.random.key(0), (12, 4))
labels = jnp.arange(12) % 2
model = zoo.Mlp()
start = quick_jit(model.init)(jax.random.key(1), x)["params"]
layers = kfqn.find_layers(model, {"params": start}, x)


def loss_fn(params, x):
    logits = kfqn.outputs(model.apply({"params": params}, x), "categorical")
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx, batches):
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)

    @quick_jit
    def step(params, state, x):
        _, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, state, seen = start, tx.init(start), []
    for batch in batches:
        params, state = step(params, state, batch)
        seen.append(params)
    return seen, kfqn.diagnostics(state)["rejected"]


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@every_method
def test_the_weights_do_not_decay_in_a_rejected_step(method):
    seen, rejected = train(method(0.1, layers, weight_decay=0.1), [x, x.at[0, 0].set(jnp.nan), x])
    assert rejected == 1
    assert_same(seen[0], seen[1])
    assert not jnp.array_equal(jax.tree.leaves(seen[1])[0], jax.tree.leaves(seen[2])[0])


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_learning_rate_of_a_schedule_that_is_not_finite(method, bad):
    schedule = lambda count: jnp.where(count == 1, bad, 0.1)
    seen, rejected = train(method(schedule, layers, weight_decay=0.1), [x, x, x])
    assert rejected == 1
    assert_same(seen[0], seen[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen[2]))


@every_method
@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_damping_of_a_schedule_that_is_none(method, bad):
    schedule = lambda count: jnp.where(count == 1, bad, 0.3)
    seen, rejected = train(method(0.1, layers, damping=schedule), [x, x, x])
    assert rejected == 1
    assert_same(seen[0], seen[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen[2]))


def test_parameters_that_start_at_zero_are_trained():
    linear = nn.Dense(1, kernel_init=nn.initializers.zeros)
    params = quick_jit(linear.init)(jax.random.key(0), x)["params"]
    found = kfqn.find_layers(linear, {"params": params}, x)

    def loss(params, x):
        z = kfqn.outputs(linear.apply({"params": params}, x), "normal")
        return jnp.mean(jnp.square(z[:, 0] - x.sum(1)))

    value_and_grad, tx = kfqn.value_and_grad(loss, found), kfqn.kfac(1.0, found)

    @quick_jit
    def step(params, state):
        value, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 1e-3 * losses[0]


class Reviews(NamedTuple):
    """How many steps a rule of the user's own has let pass."""

    made: jax.Array


def counting(share):
    return kfqn.StepRule(
        init=lambda params: Reviews(jnp.zeros([], jnp.int32)),
        propose=lambda state, proposal: (proposal.direction, state),
        review=lambda state, outcome: (share(state), Reviews(state.made + 1)),
        due=lambda state: jnp.asarray(True),
    )


@every_method
def test_nothing_is_learnt_from_a_batch_whose_step_a_rule_refuses(method):
    """But by the rule itself, which refuses the second step."""
    tx = method(0.1, layers, momentum=0.5, step_rule=counting(lambda state: state.made != 1))
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)

    @quick_jit
    def step(params, state, x):
        _, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, state = step(start, tx.init(start), x)
    same, after = step(params, state, x + 1)
    kept = {name: getattr(state[0], name) for name in ("count", "rejected", "rule", "share", "damping")}
    assert (after[0].rejected, after[0].rule.made, after[0].share) == (1, 2, 0)
    assert_same(after[0]._replace(**kept), state[0])
    assert_same(same, params)
    moved, third = step(same, after, x)
    assert third[0].rejected == 1
    assert not jnp.array_equal(jax.tree.leaves(moved)[0], jax.tree.leaves(params)[0])


@every_method
def test_a_rule_that_counts_does_not_count_a_step_that_is_overruled(method):
    """The loss at the end of the second step is 1e6 times that before."""
    tx = method(0.1, layers, step_rule=counting(lambda state: 1.0))

    def walled(params, wall):
        moved = (params["Dense_1"]["bias"] != 0).any()
        return loss_fn(params, x) * jnp.where(moved, wall, 1)

    value_and_grad = kfqn.value_and_grad(walled, layers)

    @quick_jit
    def step(state, wall):
        _, grads, curvature = value_and_grad(start, wall)
        updates, state = tx.update(grads, state, start, curvature=curvature)
        return state, optax.tree.norm(updates)

    state, counts = tx.init(start), []
    for wall in (1.0, 1e6, 1.0):
        state, length = step(state, wall)
        counts.append((int(state[0].rule.made), int(state[0].rejected), bool(length > 0)))
    assert counts == [(1, 0, True), (1, 1, False), (2, 1, True)]


@every_method
def test_the_papers_step_leaves_no_batch_out_and_bounds_none(method):
    """A batch of twenty times the loss: M is the plain moving average of the gradients, as in NumPy."""
    tx = method(0.1, layers, step_rule=None, momentum=0.9, damping=0.3)
    value_and_grad = kfqn.value_and_grad(lambda params, c: c * loss_fn(params, x), layers)

    @quick_jit
    def step(params, state, c):
        _, grads, curvature = value_and_grad(params, c)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, grads["Dense_0"]["kernel"]

    params, state, average = start, tx.init(start), 0.0
    for c in (1.0, 1.0, 20.0, 1.0):
        before = params
        params, state, grads = step(params, state, c)
        average = 0.9 * average + 0.1 * np.asarray(grads, np.float64)
        np.testing.assert_allclose(state[0].momentum["Dense_0"]["kernel"], average, rtol=1e-4, atol=1e-7)
        assert not jnp.array_equal(jax.tree.leaves(params)[0], jax.tree.leaves(before)[0])
    assert kfqn.diagnostics(state)["rejected"] == 0


SECANT = {
    "kbfgs": kfqn.kbfgs,
    "kbfgs_l": functools.partial(kfqn.kbfgs_l, memory=3),
    "kfqn": kfqn.kfqn,
}


@pytest.mark.parametrize("method", SECANT.values(), ids=SECANT)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_leaf_of_the_state_changes_where_the_second_pass_overflows(method, momentum):
    """The loss is finite where the step starts, and not where it ends."""
    overflowing = lambda params, x: jnp.cosh(model.apply({"params": params}, x)).mean()
    value_and_grad = kfqn.value_and_grad(overflowing, layers)

    @quick_jit
    def step(params, state, rate):
        tx = method(rate, layers, step_rule=None, momentum=momentum)
        _, grads, curvature = value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, state = start, method(0.1, layers, step_rule=None, momentum=momentum).init(start)
    for _ in range(2):
        params, state = step(params, state, 1e-3)
    before = state[0]
    same, state = step(params, state, 1e9)
    after = state[0]
    assert (after.count, after.rejected, after.share) == (3, before.rejected + 1, 0)
    counts = dict(count=before.count, rejected=before.rejected, share=before.share, damping=before.damping)
    assert_same(after._replace(**counts), before)
    assert_same(same, params)
    assert not jnp.array_equal(jax.tree.leaves(step(params, state, 1e-3)[0])[0], jax.tree.leaves(params)[0])


@pytest.mark.parametrize(
    ("usual", "length", "part"),
    [(2.0, 5.0, 1.0), (2.0, 50.0, 0.4), (0.0, 50.0, 1.0)],
    ids=["usual", "long", "first"],
)
def test_an_average_of_gradients_takes_ten_times_the_usual_length_at_most(usual, length, part):
    state = UsualState.start({"w": jnp.zeros(2)})
    state = state._replace(sizes=state.sizes._replace(gradient=jnp.float32(usual)))
    grads = {"w": length * jnp.array([0.6, 0.8])}
    np.testing.assert_allclose(believed(state, grads), part, rtol=1e-6)


def test_an_outlier_is_soon_forgotten_by_the_average_of_gradients():
    tx, value_and_grad = kfqn.kfac(1.0, layers), kfqn.value_and_grad(loss_fn, layers)

    @quick_jit
    def step(state, factor):
        _, grads, curvature = value_and_grad(start, x)
        rule = state[0].rule._replace(momentum=jnp.float32(0.7))
        state = (state[0]._replace(rule=rule), *state[1:])
        grads = optax.tree.scale(factor, grads)
        return *tx.update(grads, state, start, curvature=curvature), optax.tree.norm(grads)

    state, norms = tx.init(start), []
    for factor in (1.0, 1.0, 1.0, 1e8):
        updates, state, norm = step(state, factor)
        norms.append(norm)
    assert norms[-1] > 1e7 * norms[0]
    assert optax.tree.norm(state[0].momentum) < 10 * norms[0]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
