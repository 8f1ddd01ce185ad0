"""Every formula against its oracle in float64 NumPy, and the identities that define it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import kfqn_optax as kfqn
from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._sides.factor import no_pairs, take_pair
from kfqn_optax._sides.hessian_action import EMPTY, GIVEN, RUNNING
from kfqn_optax._sides.inverse import inverse
from kfqn_optax.bench._quick import quick_jit

D = 5
ROUNDING = 1e-12  # of a few products of numbers of order one in float64


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


def pairs(rng, count, dim=D):
    """Pairs with s^T y > 0, which BFGS may take."""
    for _ in range(count):
        s, y = rng.normal(size=(2, dim))
        yield s, y if s @ y > 0 else -y


def close(ours, oracle, tolerance=ROUNDING):
    scale = max(1.0, np.abs(oracle).max(initial=0))
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=tolerance * scale)


# BFGS


def test_bfgs_is_the_product_form_and_solves_the_secant_equation(rng):
    h = positive_definite(rng)
    for s, y in pairs(rng, 20):
        new = np.asarray(kfqn.bfgs.update(h, s, y))
        size = np.abs(new).max()
        close(new, oracles.bfgs(h, s, y), 1e-11)
        close(new @ y, s, 1e-11 * max(1, size))
        np.testing.assert_array_equal(new, new.T)
        assert np.linalg.eigvalsh(new).min() > 0


def test_bfgs_changes_h(rng):
    h = np.eye(D)
    s, y = next(pairs(rng, 1))
    assert np.abs(np.asarray(kfqn.bfgs.update(h, s, y)) - h).max() > 0.1


def test_bfgs_with_orthogonal_s_and_y_returns_h(rng):
    h = positive_definite(rng)
    s, y = np.eye(D)[0], np.eye(D)[1]
    np.testing.assert_array_equal(kfqn.bfgs.update(h, s, y), h)
    np.testing.assert_array_equal(kfqn.bfgs.update(h, np.zeros(D), y), h)
    np.testing.assert_array_equal(kfqn.bfgs.update(h, s, np.zeros(D)), h)


def test_bfgs_with_exact_pairs_finds_the_inverse_of_a_quadratic(rng):
    """d pairs y = G s with s conjugate in G give G^-1, whatever H was."""
    g = positive_definite(rng)
    _, directions = np.linalg.eigh(g)
    h = positive_definite(rng)
    for s in directions.T:
        h = kfqn.bfgs.update(h, s, g @ s)
    close(h, np.linalg.inv(g), 1e-10)


def test_bfgs_init_and_apply(rng):
    np.testing.assert_array_equal(kfqn.bfgs.init(3, jnp.float64, 2.0), 2 * np.eye(3))
    h, x = positive_definite(rng), rng.normal(size=(D, 3))
    close(kfqn.bfgs.apply(h, x), h @ x)
    close(kfqn.bfgs.apply(h, x[:, 0]), h @ x[:, 0])


# Limited memory


def take_all(factor, taken):
    state = factor.init(D, jnp.float64, 1.0)
    for s, y in taken:
        state = factor.update(state, jnp.asarray(s), jnp.asarray(y))
    return np.asarray(factor.apply(state, jnp.eye(D)))


def test_lbfgs_with_enough_memory_is_bfgs_and_a_half_full_buffer_a_short_one(rng):
    taken = list(pairs(rng, 4))
    expected = oracles.lbfgs(taken, D)
    for memory in (4, 9):
        close(take_all(kfqn.lbfgs(memory), taken), expected, 1e-10)


def test_lbfgs_keeps_the_newest_pairs(rng):
    taken = list(pairs(rng, 7))
    close(take_all(kfqn.lbfgs(4), taken), oracles.lbfgs(taken[-4:], D), 1e-10)


def test_lbfgs_without_pairs_is_a_multiple_of_the_identity(rng):
    factor, x = kfqn.lbfgs(3), rng.normal(size=D)
    close(factor.apply(factor.init(D, jnp.float64, 0.5), jnp.asarray(x)), 0.5 * x)


# Damping


def damp_many(rule, h, s, y, mu1, mu2):
    return quick_jit(jax.vmap(lambda s, y: rule(s, y, h @ y, mu1, mu2)))(s, y)


RULES = {"double_damping": kfqn.double_damping, "dp_dlm": kfqn.dp_dlm}


@pytest.mark.parametrize("mu2", [0.5, 1 - 1e-9, 1.0, 1 + 1e-9, 2.5])
@pytest.mark.parametrize("name", RULES)
def test_damping_is_the_oracle_for_pairs_of_any_curvature(name, mu2, rng):
    h, mu1 = positive_definite(rng), 0.2
    s, y = rng.normal(size=(2, 300, D))
    y *= 10.0 ** rng.uniform(-3, 3, (300, 1))
    ours = damp_many(RULES[name], h, s, y, mu1, mu2)
    for i in range(300):
        expected = getattr(oracles, name)(h, s[i], y[i], mu1, mu2)
        close(ours[0][i], expected[0], 1e-10)
        close(ours[1][i], expected[1], 1e-10)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_double_damping_at_one_is_the_papers(dtype, rng):
    """theta2 = 0: y~ = s~ to the last bit, as just below 1 up to what 1 - mu2 leaves of y."""
    h, one = positive_definite(rng), jnp.ones([], dtype)
    s, y = (jnp.asarray(x, dtype) for x in (rng.normal(size=D), 0.1 * rng.normal(size=D)))
    hy = jnp.asarray(h, dtype) @ y
    s_new, y_new = kfqn.double_damping(s, y, hy, 0.2, jnp.sqrt(one))
    assert s_new @ y < s_new @ s_new
    np.testing.assert_array_equal(y_new, s_new)
    below = kfqn.double_damping(s, y, hy, 0.2, one * (1 - 1e-6))[1]
    close(below, s_new, 1e-5)
    above = kfqn.double_damping(s, y, hy, 0.2, one * (1 + 1e-6))[1]
    along = (s_new @ above) / (s_new @ s_new)
    close(along, 1.0, 1e-5)
    close(above - along * s_new, y - (s_new @ y) / (s_new @ s_new) * s_new, 1e-5)


def test_double_damping_above_one_raises_the_curvature_no_further_than_asked(rng):
    """A combination of s and y would not be convex there, and huge for a pair about as curved as I."""
    s, y = jnp.array([1.0, 0.0]), jnp.array([0.999, 0.5])
    s_new, y_new = kfqn.double_damping(s, y, hy=y, mu1=0.2, mu2=2.5)
    close(s_new, s)
    close(y_new, [2.5, 0.5])


@pytest.mark.parametrize("mu2", [0.05, 0.5, 0.95, 1.0, 2.5, 40.0])
def test_double_damping_bounds_the_curvature_on_both_sides(mu2, rng):
    """s~^T y >= mu1 y^T H y with the y given, and s~^T y~ >= mu2 s~^T s~ with the pair returned."""
    h, mu1 = positive_definite(rng), 0.2
    s, y = rng.normal(size=(2, 300, D))
    y *= 10.0 ** rng.uniform(-3, 3, (300, 1))
    s_new, y_new = (np.asarray(x) for x in damp_many(kfqn.double_damping, h, s, y, mu1, mu2))
    q = np.einsum("ni,ij,nj->n", y, h, y)
    ss, sy = (s_new**2).sum(-1), (s_new * y_new).sum(-1)
    assert ((s_new * y).sum(-1) >= mu1 * q * (1 - 1e-9)).all()
    assert (sy >= mu2 * ss * (1 - 1e-9)).all()
    assert (sy > 0).all()
    damped = (s * y).sum(-1) <= mu1 * q
    assert 0 < damped.sum() < 300
    np.testing.assert_array_equal(s_new[~damped], s[~damped])


@pytest.mark.parametrize("name", RULES)
def test_damping_leaves_a_good_pair_alone(name, rng):
    """y = H^-1 s with all eigenvalues of H^-1 above mu2: nothing to correct."""
    h = np.linalg.inv(positive_definite(rng) + np.eye(D))
    s = rng.normal(size=D)
    y = np.linalg.solve(h, s)
    s_new, y_new = RULES[name](jnp.asarray(s), jnp.asarray(y), jnp.asarray(h @ y), 0.2, 0.5)
    np.testing.assert_array_equal(s_new, s)
    np.testing.assert_array_equal(y_new, y + 0.5 * s if name == "dp_dlm" else y)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("zero", ["s", "y", "both"])
def test_damping_of_zeros_is_finite_and_keeps_its_promises(name, zero, rng):
    h = positive_definite(rng)
    s = rng.normal(size=D) * (zero == "y")
    y = rng.normal(size=D) * (zero == "s")
    s_new, y_new = RULES[name](jnp.asarray(s), jnp.asarray(y), jnp.asarray(h @ y), 0.2, 0.5)
    assert np.isfinite(s_new).all()
    assert np.isfinite(y_new).all()
    assert s_new @ y >= 0.2 * (y @ h @ y) - ROUNDING
    assert s_new @ y_new >= 0.5 * (s_new @ s_new) - ROUNDING


def test_double_damping_on_its_thresholds_is_finite(rng):
    """s^T y = y^T H y = s^T s makes both denominators of theta zero."""
    s = jnp.asarray(rng.normal(size=D))
    for mu1, mu2 in [(0.2, 0.5), (0.2, 1.0), (0.999, 0.999)]:
        s_new, y_new = kfqn.double_damping(s, s, s, mu1, mu2)
        close(s_new, s)
        close(y_new, s)


# The gate


def offer(s, y, gate, h=None, valid=True, rule=None):
    h = np.eye(len(s)) if h is None else h
    new, counted, _ = take_pair(
        kfqn.bfgs,
        jnp.asarray(h),
        no_pairs(jnp.float64),
        (jnp.asarray(s), jnp.asarray(y)),
        gate=jnp.asarray(gate),
        valid=jnp.asarray(valid),
        rule=rule,
    )
    return np.asarray(new), counted.counts.tolist(), float(counted.ratio)


TAKEN, DAMPED, SKIPPED = [1, 0, 0], [1, 1, 0], [0, 0, 1]
ONE, ZERO = np.eye(2)[0], np.zeros(2)


def test_a_good_pair_is_taken_and_the_ratio_told(rng):
    h = positive_definite(rng, 2)
    s, y = np.array([1.0, 0.5]), np.array([2.0, -0.5])
    new, counts, ratio = offer(s, y, gate=ONE, h=h)
    close(new, oracles.bfgs(h, s, y))
    assert counts == TAKEN
    np.testing.assert_allclose(ratio, s @ y / (y @ h @ y))


@pytest.mark.parametrize(
    ("s", "y", "gate", "valid"),
    [
        pytest.param(ONE, -ONE, ONE, True, id="negative curvature"),
        pytest.param(ONE, np.eye(2)[1], ZERO, True, id="no curvature"),
        pytest.param(ONE, ZERO, ZERO, True, id="y is zero"),
        pytest.param(ZERO, ONE, ZERO, True, id="s is zero"),
        pytest.param(ONE, 0.99e-4 * ONE, ONE, True, id="small beside the gate"),
        pytest.param(ONE, ONE, 1.01e4 * ONE, True, id="large gate"),
        pytest.param(1e-200 * ONE, 1e-120 * ONE, ZERO, True, id="the new factor overflows"),
        pytest.param(ONE, np.nan * ONE, ONE, True, id="y is nan"),
        pytest.param(np.full(2, np.inf), ONE, ONE, True, id="s is inf"),
        pytest.param(ONE, ONE, np.nan * ONE, True, id="the gate is nan"),
        pytest.param(ONE, ONE, ONE, False, id="not measured"),
    ],
)
def test_a_pair_is_skipped_and_counted(s, y, gate, valid):
    new, counts, ratio = offer(s, y, gate, valid=valid)
    np.testing.assert_array_equal(new, np.eye(2))
    assert counts == SKIPPED
    assert np.isfinite(ratio)


@pytest.mark.parametrize(
    ("y", "gate"), [(1.01e-4 * ONE, ONE), (ONE, 0.99e4 * ONE), (1e-9 * ONE, ZERO)], ids=["y", "gate", "0"]
)
def test_a_pair_just_inside_the_gate_is_taken(y, gate):
    assert offer(ONE, y, gate)[1] == TAKEN


def test_a_damped_pair_is_counted_as_damped():
    """Negative curvature, which the rule makes positive; the ratio is that before damping."""
    rule = lambda s, y, hy: kfqn.double_damping(s, y, hy, 0.2, 0.5)
    new, counts, ratio = offer(ONE, -ONE, ONE, rule=rule)
    assert counts == DAMPED
    assert ratio == -1
    close(new, oracles.bfgs(np.eye(2), *oracles.double_damping(np.eye(2), ONE, -ONE, 0.2, 0.5)))
    assert offer(ONE, ONE, ONE, rule=rule)[1] == TAKEN


def test_an_indefinite_factor_starts_again():
    """H = diag(1, -1) with a good pair along its second axis, which no update would turn positive."""
    other = np.eye(2)[1]
    indefinite = np.diag([1.0, -1.0])
    new, counts, _ = offer(other, other, ONE, h=indefinite)
    np.testing.assert_array_equal(new, np.eye(2))
    assert counts == SKIPPED
    new, counts, _ = offer(other, other, ONE, h=indefinite, valid=False)
    np.testing.assert_array_equal(new, indefinite)


# The sides


def started(side, state, damping):
    """The state after ``start``, which is given the inverse of what the side asks for."""
    return side.start(state, inverse(side.matrix(state, damping)))


def statistics(inputs=None, h=None, g=None):
    """Statistics of a layer from rows of homogeneous inputs, pre-activations and their gradients."""
    inputs = np.ones((2, 1)) if inputs is None else inputs
    h, g = (np.zeros((2, 1)) if x is None else x for x in (h, g))
    given = {
        "rows": float(len(inputs)),
        "inputs": inputs.mean(0),
        "preactivations": h.mean(0),
        "preactivation_grads": g.sum(0),
        "squares": (inputs**2).mean(0),
        "product": np.zeros(inputs.shape[1]),
        "second_moment": oracles.second_moment(inputs),
        "grad_moment": None,
        "grad_squares": None,
    }
    return Statistics(**{k: None if v is None else jnp.asarray(v) for k, v in given.items()})


def test_hessian_action_without_warm_start(rng):
    side, damping, decay = kfqn.hessian_action(0.9), 0.4, 0.9
    batches = [oracles.homogeneous(rng.normal(size=(4, D - 1))) for _ in range(3)]
    state = side.init(D, jnp.float64)
    assert state.phase == EMPTY
    np.testing.assert_array_equal(state.factor, np.eye(D))

    state = side.observe(state, statistics(batches[0]), damping)
    a = oracles.second_moment(batches[0])
    close(state.second_moment, a)
    assert bool(side.starting(state))
    state = started(side, state, damping)
    h = np.linalg.inv(a + damping * np.eye(D))
    close(state.factor, h, 1e-11)
    assert state.phase == RUNNING
    assert not bool(side.starting(state))

    for k, batch in enumerate(batches):
        if k > 0:
            state = side.observe(state, statistics(batch), damping)
            a = decay * a + (1 - decay) * oracles.second_moment(batch)
            close(state.second_moment, a)
        s = h @ batch.mean(0)
        y = (a + damping * np.eye(D)) @ s
        h = oracles.bfgs(h, s, y)
        state = side.update(state, statistics(batch), None, damping)
        close(state.factor, h, 1e-10)
        close(np.asarray(state.factor) @ y, s, 1e-10)
    assert state.pairs.counts.tolist() == [3, 0, 0]


def test_hessian_action_after_a_warm_start_leaves_out_the_first_batch(rng):
    side, damping = kfqn.hessian_action(0.9), 0.4
    a = positive_definite(rng)
    batches = [rng.normal(size=(4, D)) for _ in range(2)]
    state = side.init(D, jnp.float64)
    state = state._replace(second_moment=jnp.asarray(a), phase=jnp.asarray(GIVEN, jnp.int32))
    state = side.observe(state, statistics(batches[0]), damping)
    close(state.second_moment, a)
    state = started(side, state, damping)
    close(state.factor, np.linalg.inv(a + damping * np.eye(D)), 1e-11)
    state = side.observe(state, statistics(batches[1]), damping)
    close(state.second_moment, 0.9 * a + 0.1 * oracles.second_moment(batches[1]))


def test_start_does_nothing_while_no_start_is_due(rng):
    side = kfqn.hessian_action(0.9)
    state = side.init(D, jnp.float64)
    same = started(side, state, 0.4)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_hessian_action_keeps_what_it_has_when_a_batch_is_empty_or_not_finite(rng):
    side, damping = kfqn.hessian_action(0.9), 0.4
    good = statistics(rng.normal(size=(4, D)))
    state = started(side, side.observe(side.init(D, jnp.float64), good, damping), damping)
    for bad in (good._replace(rows=jnp.zeros([])), statistics(np.full((4, D), np.nan))):
        after = side.update(side.observe(state, bad, damping), bad, None, damping)
        np.testing.assert_array_equal(after.second_moment, state.second_moment)
        np.testing.assert_array_equal(after.factor, state.factor)
        assert after.pairs.counts.tolist() == SKIPPED


def test_an_indefinite_h_a_is_the_inverse_again_in_the_next_step(rng):
    side, damping = kfqn.hessian_action(0.9), 0.4
    good = statistics(oracles.homogeneous(rng.normal(size=(4, D - 1))))
    state = started(side, side.observe(side.init(D, jnp.float64), good, damping), damping)
    state = side.update(state._replace(factor=-state.factor), good, None, damping)
    assert state.pairs.counts.tolist() == SKIPPED
    state = started(side, side.observe(state, good, damping), damping)
    close(state.factor, np.linalg.inv(state.second_moment + damping * np.eye(D)), 1e-11)
    assert side.update(state, good, None, damping).pairs.counts.tolist() == [1, 0, 1]


def test_an_indefinite_h_a_of_minibatches_starts_again_in_the_next_step(rng):
    side, damping = kfqn.minibatch_action(kfqn.bfgs), 0.4
    good = statistics(rng.normal(size=(4, D)))
    first = side.observe(side.init(D, jnp.float64), good, damping)
    state = side.update(first._replace(factor=-first.factor), good, good, damping)
    assert state.pairs.counts.tolist() == SKIPPED
    state = side.observe(state, good, damping)
    np.testing.assert_array_equal(state.factor, first.factor)


def test_secant_averages_the_undamped_changes(rng):
    side, damping = kfqn.secant(kfqn.bfgs, kfqn.double_damping, 0.9, 0.2), 0.5
    state, h, s, y = side.init(D, jnp.float64), np.eye(D), np.zeros(D), np.zeros(D)
    damped = 0
    for _ in range(6):
        h0, h1, g0, g1 = rng.normal(size=(4, 3, D))
        s = 0.9 * s + 0.1 * (h1 - h0).mean(0)
        y = 0.9 * y + 0.1 * (g1 - g0).sum(0)
        pair = oracles.double_damping(h, s, y, 0.2, damping)
        damped += pair[0] is not s or pair[1] is not y
        assert oracles.accepted(*pair, gate=g0.sum(0))
        h = oracles.bfgs(h, *pair)
        state = side.update(state, statistics(h=h0, g=g0), statistics(h=h1, g=g1), damping)
        close(state.s, s)
        close(state.y, y)
        close(state.factor, h, 1e-9)
        close(np.asarray(state.factor) @ pair[1], pair[0], 1e-9)
    assert state.pairs.counts.tolist() == [6, damped, 0]
    assert damped > 0


def grouped(batch, h, g, groups=2):
    """Statistics with those of equal parts."""
    split = lambda rows: np.stack(np.split(rows, groups))
    return statistics(batch, h, g)._replace(
        part_rows=jnp.full(groups, len(h) / groups),
        part_preactivations=jnp.asarray(split(h).mean(1)),
        part_grads=jnp.asarray(groups * split(g).sum(1)),
        grad_moment=jnp.asarray(len(g) ** 2 * oracles.second_moment(g)),
    )


def test_a_bad_pair_of_one_group_is_skipped_and_the_others_are_taken(rng):
    side, damping = kfqn.group_secant(kfqn.dp_dlm, 0.9, 0.2, groups=2), 0.5
    h0, h1, g0, g1 = rng.normal(size=(4, 4, D))
    before, after = grouped(None, h0, g0), grouped(None, h1, g1)
    bad = after._replace(part_grads=after.part_grads.at[1, 0].set(jnp.nan))
    empty = after._replace(part_rows=jnp.array([2.0, 0.0]))
    state = side.init(D, jnp.float64)
    s, y = 0.1 * (h1 - h0)[:2].mean(0), 0.1 * 4 * (g1 - g0)[:2].mean(0)
    expected = oracles.bfgs(np.eye(D), *oracles.dp_dlm(np.eye(D), s, y, 0.2, damping))
    for end in (bad, empty):
        new = side.update(state, before, end, damping)
        close(new.factor, expected, 1e-10)
        close(new.s, np.stack([s, np.zeros(D)]))
        close(new.y, np.stack([y, np.zeros(D)]))
        assert new.pairs.counts.tolist() == [1, 1, 1]


def test_the_start_at_the_gradients_waits_for_a_good_batch(rng):
    side = kfqn.group_secant(kfqn.dp_dlm, 0.9, 0.2, groups=2, start="gradients")
    h, g = rng.normal(size=(2, 4, D))
    good = grouped(None, h, g)
    state = side.init(D, jnp.float64)
    for moment, rows in ((jnp.full((D, D), jnp.nan), 4.0), (jnp.eye(D), 0.0), (-jnp.eye(D), 4.0)):
        bad = good._replace(grad_moment=moment, rows=jnp.asarray(rows))
        after = started(side, side.observe(state, bad, 0.5), 0.5)
        jax.tree.map(np.testing.assert_array_equal, after, state)
        assert side.update(after, good, good, 0.5).pairs.counts.tolist() == [0, 0, 2]
    state = side.observe(state, good, 0.5)
    assert bool(side.starting(state))
    state = started(side, state, 0.5)
    close(state.factor, np.linalg.inv(16 * oracles.second_moment(g) + 0.5 * np.eye(D)), 1e-10)
    assert not bool(side.starting(state))
    same = started(side, side.observe(state, grouped(None, h, 2 * g), 0.5), 0.5)
    np.testing.assert_array_equal(same.factor, state.factor)


def test_minibatch_action(rng):
    side, damping = kfqn.minibatch_action(kfqn.bfgs), 0.4
    batch = rng.normal(size=(4, D))
    given = statistics(batch)
    state = side.observe(side.init(D, jnp.float64), given, damping)
    h = np.eye(D) / ((batch**2).mean() + damping)
    close(state.factor, h)
    s = np.asarray(side.query(state, given))
    close(s, h @ batch.mean(0))
    product = sum(a * (a @ s) for a in batch) / len(batch)
    after = given._replace(product=jnp.asarray(product))
    new = side.update(state, given, after, damping)
    close(new.factor, oracles.bfgs(h, s, product + damping * s), 1e-10)
    again = side.observe(new, statistics(2 * batch), damping)
    np.testing.assert_array_equal(again.factor, new.factor)


# A layer


class Net(nn.Module):
    """tanh between dense layers, with a bias or without."""

    widths: tuple[int, ...]
    biases: tuple[bool, ...]

    @nn.compact
    def __call__(self, x):
        for i, (width, bias) in enumerate(zip(self.widths, self.biases, strict=True)):
            x = nn.Dense(width, use_bias=bias, param_dtype=jnp.float64)(nn.tanh(x) if i else x)
        return x


WIDTHS, BIASES, IN = (4, 3), (True, False), 3
WEIGHTS = np.array([3.0, 1.0, 0.3])  # of the outputs in the loss, so that no Hessian is I


def problem(rng, l2=0.0):
    """The same two-layer network as a Flax model (with loss_fn, params, layers) and as an oracle."""
    widths = (IN, *WIDTHS)
    matrices = [0.7 * rng.normal(size=(widths[i] + BIASES[i], widths[i + 1])) for i in range(2)]
    params = {
        "Dense_0": {"kernel": jnp.asarray(matrices[0][:-1]), "bias": jnp.asarray(matrices[0][-1])},
        "Dense_1": {"kernel": jnp.asarray(matrices[1])},
    }
    model = Net(WIDTHS, BIASES)
    layers = kfqn.find_layers(model, {"params": params}, jnp.zeros((1, IN)))

    def loss_fn(params, x, target):
        errors = (model.apply({"params": params}, x) - target) ** 2
        fit = 0.5 * (errors @ WEIGHTS).mean()
        return fit + 0.5 * l2 * sum((leaf**2).sum() for leaf in jax.tree.leaves(params)), fit

    return params, layers, loss_fn, oracles.Mlp(matrices, list(BIASES), WEIGHTS, l2)


def stacked(layer):
    """A layer's parameters as one matrix."""
    rows = [layer["kernel"], *([layer["bias"][None]] if "bias" in layer else [])]
    return np.vstack([np.asarray(x) for x in rows])


def make_batches(rng, count, rows=6):
    x = rng.normal(size=(count, rows, IN)) * np.array([3.0, 1.0, 0.3]) + 0.5
    return x, np.tanh(x @ rng.normal(size=(IN, WIDTHS[-1]))) + 0.1 * rng.normal(size=(count, rows, 3))


def test_statistics_and_their_second_pass(rng):
    params, layers, loss_fn, mlp = problem(rng, l2=0.1)
    x, target = (b[0] for b in make_batches(rng, 1))
    move = jax.tree.map(lambda p: 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    v = {"Dense_0": rng.normal(size=IN + 1), "Dense_1": rng.normal(size=4)}

    @quick_jit
    def both(params, move, v):
        _, _, curvature = kfqn.value_and_grad(loss_fn, layers, has_aux=True)(params, x, target)
        return curvature.statistics, curvature.after(move, v).statistics

    before, after = both(params, move, v)
    moved = [m + stacked(move[f"Dense_{i}"]) for i, m in enumerate(mlp.matrices)]
    for found, at in ((before, mlp.matrices), (after, moved)):
        _, inputs, h, g = mlp.passes(at, x, target)
        for i, name in enumerate(found):
            ours, moment = found[name], oracles.second_moment(inputs[i])
            assert ours.rows == len(x)
            close(ours.inputs, inputs[i].mean(0))
            close(ours.preactivations, h[i].mean(0))
            close(ours.preactivation_grads, g[i].sum(0))
            close(ours.second_moment, moment)
            close(ours.squares, np.diag(moment))
            close(ours.grad_moment, len(x) * sum(np.outer(row, row) for row in g[i]))
            if found is after:
                close(ours.product, moment @ v[name])


def test_the_direction_is_the_kronecker_product(rng):
    """vec(H_a M H_g) = (H_a kron H_g) vec(M), the bias in the last row of M, and the cap's formula."""
    params, layers, loss_fn, mlp = problem(rng)
    x, target = (b[0] for b in make_batches(rng, 1))
    lr, momentum = 0.05, 0.6
    factors = {
        name: (positive_definite(rng, layers[name].rows), positive_definite(rng, layers[name].out_dim))
        for name in ("Dense_0", "Dense_1")
    }

    def state_with(factor, side, **fields):
        return side._replace(factor=jnp.asarray(factor), **fields)

    _, inputs, _, g = mlp.passes(mlp.matrices, x, target)
    m = [(1 - momentum) * inputs[i].T @ g[i] for i in range(2)]
    d = [np.kron(*factors[f"Dense_{i}"]) @ m[i].ravel() for i in range(2)]
    kappa = 0.25 * lr**2 * sum(m[i].ravel() @ d[i] for i in range(2))
    expected = {None: 1.0, kappa: 0.5, 100 * kappa: 1.0}

    @quick_jit
    def updates_with_each_bound(params):
        _, grads, curvature = kfqn.value_and_grad(loss_fn, layers, has_aux=True)(params, x, target)
        results = []
        for bound in expected:
            tx = kfqn.kbfgs(lr, layers, step_rule=bound, momentum=momentum)
            ours, *rest = tx.init(params)
            phase = jnp.asarray(RUNNING, jnp.int32)
            ours = ours._replace(
                inputs={k: state_with(factors[k][0], v, phase=phase) for k, v in ours.inputs.items()},
                outputs={k: state_with(factors[k][1], v) for k, v in ours.outputs.items()},
            )
            updates, state = tx.update(grads, (ours, *rest), params, curvature=curvature)
            results.append((updates, state[0].momentum, state[0].rule.cap))
        return results

    for (updates, average, cap), nu in zip(updates_with_each_bound(params), expected.values(), strict=True):
        np.testing.assert_allclose(cap, nu, rtol=1e-6)
        moved = [stacked(updates[f"Dense_{i}"]).ravel() for i in range(2)]
        for i in range(2):
            close(stacked(average[f"Dense_{i}"]), m[i])
            close(moved[i], -lr * nu * d[i], 1e-11)
        if nu < 1:  # then (nu lr)^2 <M, D> is kappa
            close(-lr * nu * sum(moved[i] @ m[i].ravel() for i in range(2)), kappa)


# The algorithm as a whole

LR = lambda k: 0.3 * 0.95**k
DAMPING = lambda k: 0.3 * 0.9**k
STEPS = 15


def run(optimizer, oracle, rng, *, warm=False, kappa=None, steps=STEPS, damping=DAMPING, groups=1):
    """Train the model and the oracle side by side, and compare all of their state after each step."""
    params, layers, loss_fn, mlp = problem(rng, l2=1e-2)
    x, target = make_batches(rng, steps)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, has_aux=True, groups=groups)
    tx = optimizer(LR, layers, damping=damping, step_rule=kappa)
    state, warm_a = tx.init(params), None
    if warm:
        batches = [(x[k], target[k]) for k in range(3)]
        state = kfqn.warm_start(state, value_and_grad, params, batches)
        passes = [mlp.passes(mlp.matrices, *batch)[1] for batch in batches]
        warm_a = [np.mean([oracles.second_moment(p[i]) for p in passes], 0) for i in range(2)]
    twin = oracle(mlp, LR, damping, kappa=kappa, warm_a=warm_a)

    @quick_jit
    def train_step(params, state, x, target):
        (_, fit), grads, curvature = value_and_grad(params, x, target)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return jax.tree.map(jnp.add, params, updates), state, fit

    caps, losses = [], []
    for k in range(steps):
        params, state, fit = train_step(params, state, x[k], target[k])
        losses.append(twin(x[k], target[k]))
        caps.append(twin.cap)
        np.testing.assert_allclose(fit, losses[-1], rtol=1e-10)
        np.testing.assert_allclose(state[0].rule.cap, twin.cap, rtol=1e-6)
        for i, name in enumerate(("Dense_0", "Dense_1")):
            inputs, outputs = state[0].inputs[name], state[0].outputs[name]
            close(stacked(params[name]), mlp.matrices[i], 1e-10)
            close(inputs.factor, twin.h_a[i], 1e-9)
            close(outputs.s.reshape(twin.s[i].shape), twin.s[i], 1e-10)
            close(outputs.y.reshape(twin.y[i].shape), twin.y[i], 1e-10)
            if twin.memory is None:
                close(outputs.factor, twin.h_g[i], 1e-9)
            if twin.a is not None:
                close(inputs.second_moment, twin.a[i], 1e-10)
    return caps, losses, state, twin


@pytest.mark.parametrize("warm", [True, False], ids=["warm start", "first batch"])
def test_kbfgs_is_algorithm_2(warm, rng):
    caps, _, state, twin = run(kfqn.kbfgs, oracles.KBFGS, rng, warm=warm, kappa=0.01)
    assert min(caps) < 1, "the norm constraint was never active: choose a smaller kappa"
    assert max(caps) == 1, "the norm constraint was always active: choose a larger kappa"
    for i, side in enumerate(state[0].outputs.values()):
        assert side.pairs.counts.tolist()[0] == len(twin.pairs[i])
        assert np.abs(side.factor - np.eye(side.s.shape[0])).max() > 0.01


def test_kbfgs_is_algorithm_2_at_damping_one(rng):
    """mu2 = 1: many pairs are damped to y = s, the others are as they come."""
    _, _, state, twin = run(kfqn.kbfgs, oracles.KBFGS, rng, warm=True, steps=8, damping=lambda k: 1.0)
    equal = [np.array_equal(s, y) for pairs in twin.pairs for s, y in pairs]
    assert any(equal)
    for side in state[0].outputs.values():
        assert side.pairs.counts.tolist()[1] > 0


def test_kbfgs_l_is_algorithm_2_with_the_last_pairs(rng):
    run(
        functools.partial(kfqn.kbfgs_l, memory=4),
        functools.partial(oracles.KBFGS, memory=4),
        rng,
        warm=True,
        steps=8,
    )


@pytest.mark.parametrize("start", ["identity", "gradients"])
@pytest.mark.parametrize("groups", [1, 3])
def test_kbfgs_with_a_pair_of_each_group(groups, start, rng):
    """Several pairs a step, one after the other, and H_g started at the inverse second moment of g."""
    _, _, state, twin = run(
        functools.partial(kfqn.kbfgs, groups=groups, start=start),
        functools.partial(oracles.GroupKBFGS, groups=groups, start=start),
        rng,
        steps=8,
        groups=groups,
    )
    for i, side in enumerate(state[0].outputs.values()):
        assert side.pairs.counts.tolist()[0] == len(twin.pairs[i]) == 8 * groups


def test_kfqn_is_algorithm_3(rng):
    run(kfqn.kfqn, oracles.KFQN, rng, kappa=0.01, steps=8)


# Many noisy pairs in float32

LONG, DIM = 2000, 40


def spectra(history):
    """The smallest eigenvalue over the largest, and the asymmetry over the largest element."""
    history = np.asarray(history, np.float64)
    eigenvalues = np.linalg.eigvalsh(history)
    asymmetry = np.abs(history - history.mT).max((1, 2)) / np.abs(history).max((1, 2))
    return eigenvalues[:, 0] / eigenvalues[:, -1], asymmetry


def zero_statistics(dim):
    zero = jnp.zeros(dim, jnp.float32)
    return Statistics(jnp.ones([], jnp.float32), zero, zero, zero, zero, zero, None, None, None)


@pytest.mark.parametrize("name", RULES)
def test_h_g_stays_positive_definite_over_2000_noisy_pairs_in_float32(name, rng):
    """y = G s + noise, G of condition 1e6, and signs of s^T y that damping must mend."""
    basis, _ = np.linalg.qr(rng.normal(size=(DIM, DIM)))
    g = jnp.asarray(basis * np.logspace(-4, 2, DIM) @ basis.T, jnp.float32)
    side = kfqn.secant(kfqn.bfgs, RULES[name], 0.9, 0.2)
    root, zero = jnp.sqrt(jnp.float32(0.3)), zero_statistics(DIM)

    def step(state, key):
        s, noise, scale = (jax.random.normal(k, (DIM,), jnp.float32) for k in jax.random.split(key, 3))
        s = s * 10 ** (2 * scale[0] - 2)  # steps of very different lengths
        y = g @ s + 3 * jnp.linalg.norm(s) * noise
        after = zero._replace(preactivations=s, preactivation_grads=y)
        state = side.update(state, zero, after, root)
        return state, state.factor

    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(0), LONG)
        state, history = quick_jit(lambda: jax.lax.scan(step, side.init(DIM, jnp.float32), keys))()
    assert history.dtype == jnp.float32
    smallest, asymmetry = spectra(history[::5])
    assert smallest.min() > 0
    assert asymmetry.max() <= 4 * np.finfo(np.float32).eps
    taken, damped, skipped = state.pairs.counts.tolist()
    assert taken + skipped == LONG
    assert taken > 0.9 * LONG
    assert damped > 0.1 * LONG
    changes = np.abs(np.diff(np.asarray(history[::5]), axis=0)).max((1, 2))
    assert (changes > 0).mean() > 0.9


def test_h_a_stays_positive_definite_over_2000_noisy_batches_in_float32(rng):
    """Inputs of widely different scales, and H_a still near the inverse of A + l I along a_bar."""
    scales, decay, root = np.logspace(-3, 1, DIM), 0.9, np.sqrt(np.float32(0.3))
    mixing, _ = np.linalg.qr(rng.normal(size=(DIM, DIM)))
    mixing = jnp.asarray(scales[:, None] * mixing, jnp.float32)
    side = kfqn.hessian_action(decay)

    def step(state, key):
        rows = (jax.random.normal(key, (16, DIM), jnp.float32) + 0.3) @ mixing
        batch = zero_statistics(DIM)._replace(inputs=rows.mean(0), second_moment=rows.T @ rows / 16)
        state = started(side, side.observe(state, batch, root), root)
        state = side.update(state, batch, batch, root)
        return state, state.factor

    with jax.enable_x64(False):
        keys = jax.random.split(jax.random.key(1), LONG)
        state, history = quick_jit(lambda: jax.lax.scan(step, side.init(DIM, jnp.float32), keys))()
    smallest, asymmetry = spectra(history[::5])
    assert smallest.min() > 0
    assert asymmetry.max() <= 4 * np.finfo(np.float32).eps
    assert state.pairs.counts.tolist() == [LONG, 0, 0]
    assert np.abs(history[-1] - history[0]).max() > 0.01
