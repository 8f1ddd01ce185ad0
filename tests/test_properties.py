"""Properties that hold whatever the shapes, dtypes, constants and numbers are; hypothesis draws them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kfqn_optax as kfqn
from kfqn_optax._sides import bfgs
from kfqn_optax._steps.quadratic import minimum, shortened
from kfqn_optax.bench._quick import quick_jit

QUIET = {"derandomize": True, "deadline": None, "database": None}
NUMBERS = settings(max_examples=150, **QUIET)
METHODS = {"kbfgs": kfqn.kbfgs, "kbfgs_l": kfqn.kbfgs_l, "kfqn": kfqn.kfqn, "kfac": kfqn.kfac}

jitted = functools.cache(quick_jit)
sizes = st.integers(1, 4)
numbers = st.builds(
    lambda sign, power, part: sign * part * 10.0**power,
    st.sampled_from([-1, 0, 1, 1]),
    st.integers(-3, 3),
    st.floats(1, 10),
)
seeds = st.integers(0, 2**16)


def both(strategy):
    return st.tuples(strategy, strategy)


# ------------------------------------------------------------------------------------ shapes and dtypes


def loss_of(model, params, x):
    z = kfqn.outputs(model.apply({"params": params}, x), "normal")
    return jnp.mean(jnp.square(z).astype(jnp.float32))


@given(
    name=st.sampled_from(list(METHODS)),
    batch=sizes,
    widths=st.lists(sizes, min_size=2, max_size=3),
    use_bias=st.booleans(),
    param_dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    input_dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    momentum=st.sampled_from([0.0, 0.9]),
    rule=st.sampled_from([None, 1.0, kfqn.measured(), kfqn.quadratic()]),
)
@settings(max_examples=16, **QUIET)
def test_an_update_keeps_the_tree_shapes_and_dtypes(
    name, batch, widths, use_bias, param_dtype, input_dtype, momentum, rule
):
    kinds = {"use_bias": use_bias, "dtype": input_dtype, "param_dtype": param_dtype}
    model = nn.Sequential([nn.Dense(width, **kinds) for width in widths[1:]])
    x = jax.ShapeDtypeStruct((batch, widths[0]), input_dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, layers = variables["params"], kfqn.find_layers(model, variables, x)
    tx = METHODS[name](0.1, layers, momentum=momentum, step_rule=rule)
    value_and_grad = kfqn.value_and_grad(functools.partial(loss_of, model), layers, batch_argnums=1)

    def step(params, state, x):
        _, grads, curvature = value_and_grad(params, x)
        return tx.update(grads, state, params, curvature=curvature)

    before = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(step, params, before, x)
    assert after == before
    assert updates == jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    factors = [
        leaf for leaf in jax.tree.leaves((after[0].inputs, after[0].outputs)) if leaf.dtype != jnp.int32
    ]
    assert all(leaf.dtype == jnp.float32 for leaf in factors if jnp.issubdtype(leaf.dtype, jnp.floating))


# -------------------------------------------------------------------------------------------- constants

MODEL, X = nn.Dense(2), jax.ShapeDtypeStruct((3, 4), jnp.float32)
LAYERS = kfqn.find_layers(MODEL, jax.eval_shape(MODEL.init, jax.random.key(0), X), X)

BELOW_ONE = math.nextafter(1.0, 0.0)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
NOT_NEGATIVE = st.floats(0, allow_infinity=False, allow_nan=False)
NEGATIVE = st.floats(max_value=0, exclude_max=True, allow_nan=False)
UNREAL = st.sampled_from([math.nan, math.inf, -math.inf])
RATE = st.floats(0, BELOW_ONE)
NO_RATE = st.floats(1, allow_nan=False) | NEGATIVE | st.just(math.nan)
COUNT = st.integers(1, 10**6)
NO_COUNT = st.integers(max_value=0) | UNREAL | st.integers(0, 1000).map(lambda n: n + 0.5)
RANGES = {  # what is in range, and what is not
    "learning_rate": (NOT_NEGATIVE, NEGATIVE | UNREAL),
    "damping": (POSITIVE, st.just(0.0) | NEGATIVE | UNREAL),
    "momentum": (RATE, NO_RATE),
    "decay": (RATE, NO_RATE),
    "mu1": (st.floats(0, BELOW_ONE, exclude_min=True), st.just(0.0) | NO_RATE),
    "weight_decay": (NOT_NEGATIVE, NEGATIVE | UNREAL),
    "step_rule": (POSITIVE | st.none(), st.just(0.0) | NEGATIVE | UNREAL),
    "update_every": (COUNT, NO_COUNT),
    "others_decay": (RATE | st.none(), NO_RATE),
    "max_dim": (COUNT | st.none(), NO_COUNT),
}


@pytest.mark.parametrize("name", RANGES)
@given(data=st.data())
@settings(max_examples=15, **QUIET)
def test_a_constant_is_taken_in_its_range_and_refused_outside(name, data):
    inside, outside = RANGES[name]
    make = lambda value: kfqn.kbfgs(**{"learning_rate": 0.1, "layers": LAYERS, name: value})
    make(data.draw(inside))
    wrong = data.draw(outside)
    with pytest.raises(ValueError) as raised:
        make(wrong)
    assert f"{name}={wrong!r}" in str(raised.value)


# -------------------------------------------------------------------------------------- the quadratic model


@given(columns=st.lists(both(numbers), max_size=2), slopes=both(numbers))
@NUMBERS
def test_the_minimum_of_a_convex_model_is_no_worse_than_no_step(columns, slopes):
    columns = np.reshape(np.float64(columns), (len(columns), 2))
    matrix, slopes = np.float32(columns.T @ columns), np.float32(slopes)
    c = np.float64(jitted(minimum)(matrix, slopes))
    assert np.isfinite(c).all()
    assert abs(c[1]) <= 1
    linear, bend = c @ slopes, c @ np.float64(matrix) @ c
    assert linear + bend / 2 <= 1e-4 * (np.abs(c) @ np.abs(slopes) + np.abs(c) @ np.abs(matrix) @ np.abs(c))


@given(slope=numbers, change=numbers | st.sampled_from([math.nan, math.inf, -math.inf]))
@NUMBERS
def test_a_shortened_step_is_half_of_it_at_most_and_falls_by_its_parabola(slope, change):
    share = float(jitted(shortened)(jnp.float32(slope), jnp.float32(change)))
    assert 0 <= share <= 0.5
    if share > 0 and change > 0:
        assert -slope * share + (change + slope) * share**2 <= 0


# ----------------------------------------------------------------------------------- dampings and factors


def pair(seed, dim, scale):
    """A positive definite H, and s and y, of any angle between them."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((dim, dim))
    return root @ root.T + 0.1 * np.eye(dim), rng.standard_normal(dim), scale * rng.standard_normal(dim)


scales = st.sampled_from([1e-3, 0.1, 1.0, 10.0, 1e3])
rates = st.floats(0.01, 0.99)


def damped(rule, h, s, y, mu1, mu2):
    """The damped pair, and what rounding there may make of a product with it."""
    arrays = [jnp.asarray(x, jnp.float32) for x in (s, y, h @ y)]
    new_s, new_y = map(np.float64, jitted(rule)(*arrays, mu1, mu2))
    longest = max(map(np.linalg.norm, (s, h @ y, new_s)))
    return new_s, new_y, 1e-6 * longest * max(map(np.linalg.norm, (s, y, new_s, new_y)))


@pytest.mark.parametrize("name", ["double_damping", "dp_dlm"])
@given(seed=seeds, dim=sizes, scale=scales, mu1=rates, mu2=st.floats(0.01, 3))
@NUMBERS
def test_a_damping_rule_guarantees_both_its_inequalities(name, seed, dim, scale, mu1, mu2):
    h, s, y = pair(seed, dim, scale)
    new_s, new_y, rounding = damped(getattr(kfqn, name), h, s, y, mu1, mu2)
    assert new_s @ y >= mu1 * y @ h @ y - rounding
    assert new_s @ new_y >= mu2 * new_s @ new_s - rounding
    expected = getattr(oracles, name)(h, s, y, mu1, mu2)
    for own, other in zip((new_s, new_y), expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


@given(seed=seeds, dim=sizes, scale=scales, mu1=st.floats(0.1, 0.9), mu2=st.floats(0.1, 0.9))
@NUMBERS
def test_bfgs_of_a_damped_pair_is_symmetric_positive_definite_and_maps_y_to_s(seed, dim, scale, mu1, mu2):
    h, s, y = pair(seed, dim, scale)
    s, y = oracles.double_damping(h, s, y, mu1, mu2)
    new = np.float64(jitted(bfgs.update)(*(jnp.asarray(x, jnp.float32) for x in (h, s, y))))
    expected = oracles.bfgs(h, s, y)
    size = np.abs(expected).max()
    np.testing.assert_array_equal(new, new.T)
    np.testing.assert_allclose(new, expected, atol=1e-4 * max(size, np.abs(h).max()))
    assert np.linalg.eigvalsh(new).min() > -1e-5 * size
    np.testing.assert_allclose(new @ y, s, atol=1e-4 * size * np.linalg.norm(y))
