"""Parameters that belong to no layer: their diagonal factor against NumPy, alone and in a model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._sides import others
from kfqn_optax._state import key_of
from kfqn_optax.bench._quick import quick_jit

ROWS, DECAY = 12, 0.6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class Net(nn.Module):
    """Batch normalisation between two layers: a scale and a bias that belong to none."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=False, param_dtype=x.dtype)(x)
        return nn.Dense(3, param_dtype=x.dtype)(jnp.tanh(x))


MODEL = Net()


def problem(mark=lambda z: z):
    """Parameters, layers, and the loss of (params, x, labels), with or without a mark."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 5)))
    variables = quick_jit(MODEL.init)(jax.random.key(0), x)
    layers = kfqn.find_layers(MODEL, variables, x)

    def logits_of(params, x):
        variables_of = {"params": params, "batch_stats": variables["batch_stats"]}
        return MODEL.apply(variables_of, x, mutable=["batch_stats"])[0]

    def loss_fn(params, x, labels):
        logits = mark(logits_of(params, x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return variables["params"], layers, loss_fn, logits_of


def categorical(z):
    return kfqn.outputs(z, "categorical")


def batches(rng, count):
    return [
        (jnp.asarray(rng.normal(size=(ROWS, 5))), jnp.asarray(rng.integers(3, size=ROWS)))
        for _ in range(count)
    ]


def normal_like(rng, tree):
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)


NAMES = ["BatchNorm_0/bias", "BatchNorm_0/scale"]


def of(tree, name):
    module, leaf = name.split("/")
    return np.asarray(tree[module][leaf])


@pytest.mark.parametrize("with_samples", [False, True], ids=["unsampled", "sampled"])
def test_the_averages_are_those_of_numpy(with_samples, rng):
    """Of n times the squared deviation from the mean gradient, or of the square of the sampled one."""
    params, layers, _, _ = problem()
    state = others.init(layers, params)
    assert sorted(state.mean) == sorted(state.second_moment) == NAMES
    mean, second = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for k in range(1, 7):
        grads, sampled = normal_like(rng, params), normal_like(rng, params)
        given = sampled if with_samples else None
        state = others.observe(state, layers, grads, given, ROWS, jnp.asarray(True), DECAY)
        rate = min(DECAY, 1 - 1 / k)
        for name in NAMES:
            deviation = ROWS * (of(grads, name) - mean[name]) ** 2
            square = of(sampled, name) ** 2 if with_samples else deviation
            mean[name] = rate * mean[name] + (1 - rate) * of(grads, name)
            second[name] = rate * second[name] + (1 - rate) * square
            np.testing.assert_allclose(state.mean[name], mean[name], rtol=1e-12)
            np.testing.assert_allclose(state.second_moment[name], second[name], rtol=1e-12)
        assert state.count == k
    tree = normal_like(rng, params)
    scaled = others.apply(state, layers, tree, jnp.asarray(0.3))
    for name in NAMES:
        np.testing.assert_allclose(of(scaled, name), of(tree, name) / (second[name] + 0.3), rtol=1e-12)
    for name in ("Dense_0", "Dense_1"):
        jax.tree.map(np.testing.assert_array_equal, scaled[name], tree[name])


def test_a_bad_batch_or_sample_leaves_the_averages(rng):
    params, layers, _, _ = problem()
    grads, good = normal_like(rng, params), jnp.asarray(True)
    state = others.observe(others.init(layers, params), layers, grads, None, ROWS, good, DECAY)
    nan = jax.tree.map(lambda leaf: leaf * jnp.nan, grads)
    same = others.observe(state, layers, nan, nan, ROWS, ~good, DECAY)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    sampled = others.observe(state, layers, grads, nan, ROWS, good, DECAY)
    jax.tree.map(np.testing.assert_array_equal, sampled.second_moment, state.second_moment)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(np.isfinite(leaf), True), sampled.mean)


@pytest.mark.parametrize(
    ("marked", "argnums"),
    [(True, None), (False, (1, 2)), (False, None)],
    ids=["sampled", "examples told", "examples counted"],
)
def test_kfac_divides_them_by_their_factor(marked, argnums, rng):
    """Three steps of a model with batch normalisation; the step itself is the whole direction."""
    params, layers, loss_fn, _ = problem(categorical if marked else lambda z: z)
    damping, lr = 0.1, 0.05
    tx = kfqn.kfac(lr, layers, damping=damping, step_rule=None, statistics_rows=None)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=argnums)

    @quick_jit
    def step(params, state, x, labels):
        _, grads, curvature = value_and_grad(params, x, labels)
        sampled = curvature.with_parts(
            jax.random.fold_in(key_of(state[0]), state[0].count), None
        ).factors()[1]
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return updates, state, grads, sampled

    state = tx.init(params)
    mean, second = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for k, batch in enumerate(batches(rng, 3), start=1):
        updates, state, grads, sampled = step(params, state, *batch)
        assert (sampled is not None) == marked
        for name in NAMES:
            g = of(grads, name)
            square = of(sampled, name) ** 2 if marked else ROWS * (g - mean[name]) ** 2
            mean[name] = mean[name] + (g - mean[name]) / k
            second[name] = second[name] + (square - second[name]) / k
            expected = -lr * g / (second[name] + damping)
            np.testing.assert_allclose(of(updates, name), expected, rtol=1e-7, atol=1e-12)
        params = optax.apply_updates(params, updates)


def test_the_square_of_the_sampled_gradient_has_the_gauss_newton_diagonal_for_its_mean(rng):
    """To five standard errors of 400 draws, in every parameter; batch normalisation joins the examples."""
    params, layers, loss_fn, logits_of = problem(categorical)
    (x, labels) = batches(rng, 1)[0]

    @quick_jit
    @jax.vmap
    def draw(key):
        _, _, curvature = kfqn.value_and_grad(loss_fn, layers)(params, x, labels)
        return jax.tree.map(jnp.square, curvature.factors(key=key)[1])

    @quick_jit
    def exact(params):
        jacobian = jax.jacobian(logits_of)(params, x)
        p = jax.nn.softmax(logits_of(params, x))
        hessian = jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p) / ROWS
        return jax.tree.map(lambda j: jnp.einsum("ni...,nij,nj...->...", j, hessian, j), jacobian)

    drawn, expected = draw(jax.random.split(jax.random.key(1), 400)), exact(params)
    for leaf, diagonal in zip(*map(jax.tree.leaves, (drawn, expected)), strict=True):
        error = leaf.std(0) / np.sqrt(len(leaf))
        assert (np.abs(leaf.mean(0) - diagonal) <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn])
def test_without_a_factor_they_take_their_averaged_gradient(method, rng):
    params, layers, loss_fn, _ = problem()
    tx = method(0.2, layers, step_rule=None, momentum=0.8, others_decay=None)

    @quick_jit
    def step(state):
        _, grads, curvature = kfqn.value_and_grad(loss_fn, layers)(params, *batches(rng, 1)[0])
        return *tx.update(grads, state, params, curvature=curvature), grads

    updates, state, grads = step(tx.init(params))
    assert state[0].others == ()
    for name in NAMES:
        np.testing.assert_allclose(of(updates, name), -0.2 * 0.2 * of(grads, name), rtol=1e-12)


def test_a_model_without_such_parameters_has_no_state_for_them():
    model, x = nn.Dense(2), jnp.ones((3, 2))
    variables = quick_jit(model.init)(jax.random.key(0), x)
    tx = kfqn.kfac(1.0, kfqn.find_layers(model, variables, x))
    assert tx.init(variables["params"])[0].others == ()
