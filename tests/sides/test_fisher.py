"""The Fisher side by itself: growing averages, its scale, and when it is inverted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kfqn_optax as kfqn
from kfqn_optax._capture.statistics import Statistics

D, DECAY = 4, 0.7


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def statistics(moment, rows=3.0):
    zero = jnp.zeros(len(moment))
    return Statistics(jnp.asarray(rows), *[zero] * 5, jnp.asarray(moment), None, None)


def moments(count):
    roots = np.random.default_rng(0).normal(size=(count, D, D))
    return roots @ roots.mT / D


def side(inverse_every=1):
    return kfqn.fisher(lambda given: given.second_moment, DECAY, inverse_every)


def test_the_average_is_plain_at_first_and_the_scale_is_told_before():
    fisher, average = side(), None
    state = fisher.init(D, jnp.float64)
    for k, moment in enumerate(moments(6), start=1):
        rate = min(DECAY, 1 - 1 / k)
        average = moment if average is None else rate * average + (1 - rate) * moment
        np.testing.assert_allclose(fisher.scale(state, statistics(moment)), np.trace(average) / D)
        state = fisher.observe(state, statistics(moment), 0.1)
        np.testing.assert_allclose(state.second_moment, average, rtol=1e-12)
    for bad, skipped in (
        (statistics(moments(1)[0], rows=0.0), 0),
        (statistics(np.full((D, D), np.nan)), 1),
    ):
        np.testing.assert_allclose(fisher.scale(state, bad), np.trace(average) / D)
        after = fisher.observe(state, bad, 0.1)
        assert after.pairs.counts[2] == skipped
        jax.tree.map(np.testing.assert_array_equal, after._replace(pairs=state.pairs), state)


def test_a_first_moment_that_is_not_finite_leaves_the_damping_alone():
    fisher = side()
    state = fisher.observe(fisher.init(D, jnp.float64), statistics(np.full((D, D), np.nan)), 0.1)
    assert fisher.starting(state)
    np.testing.assert_allclose(fisher.matrix(state, 0.1), 0.1 * np.eye(D))


def test_inverses_are_due_three_times_at_first_and_then_on_schedule():
    fisher = side(inverse_every=4)
    state, due = fisher.init(D, jnp.float64), []
    assert not fisher.starting(state)
    for k, moment in enumerate(moments(12), start=1):
        state = fisher.observe(state, statistics(moment), 0.1)
        if fisher.starting(state):
            due.append(k)
    assert due == [1, 2, 3, 4, 8, 12]


def test_only_a_finite_inverse_that_is_due_is_taken():
    fisher, given = side(inverse_every=4), jnp.full((D, D), 2.0)
    state = fisher.observe(fisher.init(D, jnp.float64), statistics(moments(1)[0]), 0.1)
    np.testing.assert_array_equal(fisher.start(state, given).factor, given)
    bad = fisher.start(state, given * jnp.nan)
    np.testing.assert_array_equal(bad.factor, np.eye(D))
    assert bad.pairs.counts.tolist() == [0, 0, 1]
    later = state._replace(count=jnp.asarray(5))
    jax.tree.map(np.testing.assert_array_equal, fisher.start(later, given * jnp.nan), later)


def test_the_damping_has_a_floor():
    fisher, moment = side(), moments(1)[0]
    state = fisher.observe(fisher.init(D, jnp.float64), statistics(moment), 0.0)
    np.testing.assert_allclose(fisher.matrix(state, 0.0), moment + 1e-6 * np.trace(moment) * np.eye(D))
    np.testing.assert_allclose(fisher.matrix(state, 0.5), moment + 0.5 * np.eye(D))


def test_an_outlier_counts_for_ten_times_the_average_and_is_counted():
    fisher, one = side(), np.eye(D)
    state = fisher.init(D, jnp.float64)
    for _ in range(8):
        state = fisher.observe(state, statistics(one), 0.1)
    outlier = statistics(1e12 * np.diag([1.0, 0, 0, 0]))
    expected = DECAY * one + (1 - DECAY) * np.diag([10.0 * D, 0, 0, 0])
    np.testing.assert_allclose(fisher.scale(state, outlier), np.trace(expected) / D)
    state = fisher.observe(state, outlier, 0.1)
    np.testing.assert_allclose(state.second_moment, expected)
    np.testing.assert_array_equal(state.pairs.counts, [0, 1, 0])
    for _ in range(30):
        state = fisher.observe(state, statistics(1e6 * one), 0.1)
    np.testing.assert_allclose(state.second_moment, 1e6 * one, rtol=0.01, atol=1e3)
