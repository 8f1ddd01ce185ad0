"""The block BFGS update, and the Fisher side that follows its inverse with it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kfqn_optax as kfqn
from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._sides.block import block_update, take_block
from kfqn_optax._sides.factor import no_pairs
from kfqn_optax._sides.inverse import inverse
from kfqn_optax.bench._quick import quick_jit

D, K = 7, 3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def positive_definite(rng, dim=D):
    root = rng.normal(size=(dim, dim))
    return root @ root.T / dim + 0.1 * np.eye(dim)


def close(ours, oracle, tolerance=1e-12):
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=tolerance * max(1, np.abs(oracle).max()))


# The update


@pytest.mark.parametrize("k", [1, 2, K, D])
def test_the_block_update_is_the_product_form(k, rng):
    """With pairs of one matrix, and with a K that is symmetric only in part."""
    h, g, s = positive_definite(rng), positive_definite(rng), rng.normal(size=(D, k))
    for y in (g @ s, g @ s + 0.02 * rng.normal(size=(D, k))):
        new = np.asarray(block_update(jnp.asarray(h), s, y))
        close(new, oracles.block_bfgs(h, s, y), 1e-10)
        np.testing.assert_array_equal(new, new.T)
        assert np.linalg.eigvalsh(new).min() > 0


@pytest.mark.parametrize("k", [1, 2, K])
def test_pairs_of_one_matrix_all_solve_their_secant_equation(k, rng):
    h, g, s = positive_definite(rng), positive_definite(rng), rng.normal(size=(D, k))
    close(np.asarray(block_update(jnp.asarray(h), s, g @ s)) @ g @ s, s, 1e-11)


def test_one_pair_is_bfgs_and_as_many_as_the_side_is_long_the_inverse(rng):
    h, g, s = jnp.asarray(positive_definite(rng)), positive_definite(rng), rng.normal(size=(D, D))
    one = block_update(h, s[:, :1], g @ s[:, :1])
    close(one, kfqn.bfgs.update(h, jnp.asarray(s[:, 0]), jnp.asarray(g @ s[:, 0])), 1e-12)
    close(block_update(h, s, g @ s), np.linalg.inv(g), 1e-9)


def test_the_update_does_not_depend_on_the_basis_or_the_order_of_pairs(rng):
    h, g, s = positive_definite(rng), positive_definite(rng), rng.normal(size=(D, K))
    mixed = s @ (rng.normal(size=(K, K)) * np.array([1e-6, 1, 1e6]))
    close(block_update(h, mixed, g @ mixed), block_update(h, s, g @ s), 1e-9)


def test_the_update_is_the_nearest_in_the_norm_of_the_matrix(rng):
    """No other symmetric H with H Y = S is nearer to H in the Frobenius norm weighted by G."""
    h, g, s = positive_definite(rng), positive_definite(rng), rng.normal(size=(D, K))
    y, root = g @ s, np.linalg.cholesky(g)
    new = np.asarray(block_update(jnp.asarray(h), s, y))
    distance = lambda other: np.linalg.norm(root.T @ (other - h) @ root)
    free = np.eye(D) - y @ np.linalg.pinv(y)  # what may be added: symmetric, and 0 on Y
    for _ in range(20):
        added = rng.normal(size=(D, D))
        added = free @ (added + added.T) @ free
        close((new + added) @ y, s, 1e-10)
        assert distance(new + 1e-2 * added) > distance(new)


def take(h, s, y, good=None):
    good = np.ones(s.shape[1], bool) if good is None else good
    arrays = (jnp.asarray(s), jnp.asarray(y), jnp.asarray(good))
    new, pairs = take_block(jnp.asarray(h), no_pairs(jnp.float64), *arrays)
    return np.asarray(new), pairs.counts.tolist()


def test_good_pairs_are_taken_without_the_bad_ones(rng):
    h, g, s = positive_definite(rng), positive_definite(rng), rng.normal(size=(D, 5))
    y = g @ s
    y[:, 1], s[:, 2], y[:, 3] = -y[:, 1], 0, np.nan  # negative, zero, and not finite but flagged
    new, counts = take(h, s, y, good=[True, True, True, False, True])
    close(new, oracles.block_bfgs(h, s[:, [0, 4]], y[:, [0, 4]]), 1e-10)
    assert counts == [2, 0, 3]


@pytest.mark.parametrize("bad", ["nan", "inf", "indefinite", "none good", "overflow"])
def test_a_block_that_would_harm_the_factor_is_skipped_and_counted(bad, rng):
    h, s = positive_definite(rng, 2), np.eye(2)
    y = np.eye(2)
    if bad in ("nan", "inf"):
        y[0] = float(bad)
    elif bad == "indefinite":
        y = np.array([[1.0, 3.0], [3.0, 1.0]])
    elif bad == "none good":
        y = -y
    else:
        s, y = 1e-200 * s, 1e-120 * y
    new, counts = take(h, s, y)
    np.testing.assert_array_equal(new, h)
    assert counts == [0, 0, 2]


def test_dependent_pairs_in_float32_leave_the_factor_positive_definite(rng):
    """Sixteen pairs from one direction to all of them apart; K is then of rank one to rounding."""
    dim = 40
    g = positive_definite(rng, dim)
    h = jnp.asarray(np.linalg.inv(g + 0.1 * positive_definite(rng, dim)), jnp.float32)
    for spread in 10.0 ** np.arange(0, -8, -1):
        s = rng.normal(size=(dim, 1)) + spread * rng.normal(size=(dim, 16))
        s, y = jnp.asarray(s, jnp.float32), jnp.asarray(g @ s, jnp.float32)
        new = np.asarray(block_update(h, s, y), np.float64)
        assert np.linalg.eigvalsh(new).min() > 0.5 * np.linalg.eigvalsh(np.linalg.inv(g)).min()
        assert np.abs(new @ np.asarray(y) - s).max() < 2e-3 * np.abs(s).max()


# The side


def statistics(moment, rows=1.0):
    zero = jnp.zeros(len(moment), moment.dtype)
    return Statistics(jnp.asarray(rows, moment.dtype), *[zero] * 5, jnp.asarray(moment), None, None)


def inverse_side(**options):
    return kfqn.block_inverse(lambda given: given.second_moment, 0.9, **options)


def started(side, state, damping):
    """The state after ``start``, if the side has one."""
    return state if side.matrix is None else side.start(state, inverse(side.matrix(state, damping)))


def stepper(side):
    @quick_jit
    def step(state, moment, damping):
        state = side.observe(state, statistics(moment), damping)
        return started(side, state, damping)

    return step


def error(state, damping):
    """The root mean square of the eigenvalues of M^1/2 H M^1/2 less 1, M the damped moment."""
    damped = np.asarray(state.second_moment, np.float64)
    root = np.linalg.cholesky(damped + damping * np.eye(len(damped)))
    eigenvalues = np.linalg.eigvalsh(root.T @ np.asarray(state.factor, np.float64) @ root)
    return np.sqrt(np.mean((eigenvalues - 1) ** 2))


def test_each_step_is_the_update_with_its_random_directions(rng):
    """Against the oracle, and H (S + l I) V = V for the directions of every step."""
    side, damping = inverse_side(directions=K), 0.3
    step, state = stepper(side), side.init(D, jnp.float64)
    moments = [positive_definite(rng) for _ in range(5)]
    average, h, seen = None, None, []
    for k, moment in enumerate(moments):
        state = step(state, moment, damping)
        average = moment if k == 0 else 0.9 * average + 0.1 * moment
        damped = average + damping * np.eye(D)
        if k == 0:
            h = np.linalg.inv(damped)
        else:
            v = jax.random.normal(jax.random.fold_in(jax.random.key(0), k + 1), (D, K), jnp.float64)
            h = oracles.block_bfgs(h, v, damped @ v)
            close(state.factor @ damped @ v, v, 1e-10)
            seen.append(np.asarray(v))
        close(state.second_moment, average)
        close(state.factor, h, 1e-10)
    assert np.abs(seen[0] - seen[1]).max() > 0.1
    assert state.pairs.counts.tolist() == [4 * K, 0, 0]


def test_a_short_side_takes_its_length_and_is_the_inverse_at_any_damping(rng):
    side = inverse_side(directions=32)
    step, state = stepper(side), side.init(D, jnp.float64)
    for damping in (0.3, 0.01, 5.0):
        state = step(state, positive_definite(rng), damping)
        assert error(state, damping) < 1e-9


@pytest.mark.parametrize("exact", [True, False])
def test_it_converges_to_the_inverse_of_a_fixed_moment(exact, rng):
    side, moment, damping = inverse_side(directions=8, exact_start=exact), positive_definite(rng, 20), 0.1
    step, state = stepper(side), side.init(20, jnp.float64)
    errors = []
    for _ in range(60):
        state = step(state, moment, damping)
        errors.append(error(state, damping))
    assert errors[-1] < (1e-9 if exact else 1e-5)
    assert exact == (errors[0] < 1e-9)
    assert bool(side.starting(state)) is False


def test_it_follows_a_drifting_moment_better_than_the_inverse_at_the_start(rng):
    dim, damping, steps = 60, 0.1, 60
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    side, late = inverse_side(directions=8), inverse_side(directions=8, exact_start=False)
    step, step_late = stepper(side), stepper(late)
    state, second, first = side.init(dim, jnp.float32), late.init(dim, jnp.float32), None
    for n in range(steps):
        scale = np.logspace(0.5, -2, dim) * np.exp(0.5 * np.sin(0.05 * n + np.arange(dim)))
        rows = (rng.normal(size=(400, dim)) * scale) @ basis.T
        moment = jnp.asarray(rows.T @ rows / 400, jnp.float32)
        state, second = step(state, moment, damping), step_late(second, moment, damping)
        first = state if n == 0 else first
    stale = error(state._replace(factor=first.factor), damping)
    assert error(state, damping) < 0.2 * stale
    assert error(second, damping) < 2 * error(state, damping)
    assert np.linalg.eigvalsh(np.asarray(state.factor, np.float64)).min() > 0


def test_a_bad_batch_changes_nothing(rng):
    side, damping = inverse_side(directions=K), 0.3
    step, state = stepper(side), side.init(D, jnp.float64)
    bad = statistics(jnp.full((D, D), jnp.nan)), statistics(positive_definite(rng), rows=0.0)
    for batch in bad:
        same = started(side, side.observe(state, batch, damping), damping)
        jax.tree.map(np.testing.assert_array_equal, same, state)
    state = step(state, positive_definite(rng), damping)
    for batch in bad:
        jax.tree.map(np.testing.assert_array_equal, side.observe(state, batch, damping), state)
    assert np.abs(state.factor - jnp.eye(D)).max() > 0.1


def test_an_average_that_is_not_positive_definite_is_not_followed(rng):
    """As after an overflow in the statistics: the pairs are counted as skipped."""
    side, damping = inverse_side(directions=K), 0.3
    step = stepper(side)
    state = step(side.init(D, jnp.float64), positive_definite(rng), damping)
    after = step(state._replace(second_moment=-10 * jnp.eye(D)), positive_definite(rng), damping)
    np.testing.assert_array_equal(after.factor, state.factor)
    assert after.pairs.counts.tolist() == [0, 0, K]


def test_statistics_without_the_moment_are_an_error(rng):
    side = kfqn.block_inverse(lambda given: given.grad_moment, 0.9)
    with pytest.raises(ValueError, match="no such second moment"):
        side.observe(side.init(D, jnp.float64), statistics(positive_definite(rng)), 0.1)
