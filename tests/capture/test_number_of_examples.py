"""Losses of any number of examples: means of which parts may be taken, and what is said of others."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax._capture.growth import growth
from kfqn_optax._warnings import KfqnWarning

N = 300
MODEL = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(1)])
X = jax.random.normal(jax.random.key(0), (N, 4))
Y = jnp.sin(X.sum(1, keepdims=True))
LABELS, MASK = jnp.arange(N) % 5, 1.0 * (jnp.arange(N) % 3 > 0)
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
LAYERS = kfqn.find_layers(MODEL, {"params": PARAMS}, X)
WEIGHT = jax.random.normal(jax.random.key(2), (4, 5))

z = lambda x: jnp.tanh(x @ WEIGHT)
squares = lambda x, y: (z(x) - y) ** 2
entropies = lambda x, y: optax.softmax_cross_entropy_with_integer_labels(z(x), jnp.zeros(len(x), int))


def normalised(x):
    h = z(x)
    return (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)


def scanned(x, y):
    return jax.lax.scan(lambda total, row: (total + squares(*row).sum(), None), 0.0, (x, y))[0]


MEANS = {
    "mean": lambda x, y, m: squares(x, y).mean(),
    "sum over the length": lambda x, y, m: squares(x, y).sum() / len(x),
    "sum times a number": lambda x, y, m: squares(x, y).sum() * (1 / x.shape[0]),
    "sum over all elements": lambda x, y, m: jnp.vdot(z(x) - y, z(x) - y) / z(x).size,
    "einsum": lambda x, y, m: jnp.einsum("ni,ni->", z(x) - y, z(x) - y) / len(x),
    "vmap": lambda x, y, m: jax.vmap(squares)(x, y).sum(1).mean(),
    "mask": lambda x, y, m: (m[:, None] * squares(x, y)).sum() / jnp.maximum(m.sum(), 1),
    "mask and epsilon": lambda x, y, m: (m[:, None] * squares(x, y)).sum() / (m.sum() + 1e-6),
    "average": lambda x, y, m: jnp.average(squares(x, y).sum(1), weights=m),
    "where": lambda x, y, m: jnp.mean(squares(x, y), where=m[:, None] > 0),
    "softmax of the examples": lambda x, y, m: (jax.nn.softmax(z(x)[:, 0]) * squares(x, y).sum(1)).sum(),
    "weights of 1 / N": lambda x, y, m: (jnp.full((len(x), 1), 1 / len(x)) * squares(x, y)).sum(),
    "cross entropy": lambda x, y, m: entropies(x, y).mean(),
    "evidence bound": lambda x, y, m: 5000 / len(x) * squares(x, y).sum() + (WEIGHT**2).sum(),
    "root": lambda x, y, m: jnp.sqrt(squares(x, y).mean()),
    "batch normalisation": lambda x, y, m: jnp.mean((normalised(x) - y) ** 2),
    "inner derivative": lambda x, y, m: (jax.vmap(jax.grad(lambda row: z(row).sum()))(x) ** 2).mean(),
}
SUMS = {
    "sum": (lambda x, y, m: squares(x, y).sum(), 1),
    "sum over a number": (lambda x, y, m: squares(x, y).sum() / 300, 1),
    "dot": (lambda x, y, m: jnp.vdot(z(x) - y, z(x) - y), 1),
    "vmap": (lambda x, y, m: jax.vmap(squares)(x, y).sum(), 1),
    "weights that add up to 1": (lambda x, y, m: (m[:, None] * squares(x, y)).sum(), 1),
    "cross entropy": (lambda x, y, m: entropies(x, y).sum(), 1),
    "and a penalty": (lambda x, y, m: squares(x, y).sum() + (WEIGHT**2).sum(), 1),
    "rematerialised": (jax.checkpoint(jax.jit(lambda x, y, m: squares(x, y).sum())), 1),
    "batch normalisation": (lambda x, y, m: jnp.sum((normalised(x) - y) ** 2), 1),
    "norm": (lambda x, y, m: jnp.linalg.norm(z(x) - y), 0.5),
    "all pairs": (lambda x, y, m: ((z(x) @ z(x).T) ** 2).sum(), 2),
}
UNKNOWN = {
    "scan": lambda x, y, m: scanned(x, y) / len(x),
    "cumulative": lambda x, y, m: jnp.cumsum(squares(x, y).sum(1))[-1] / len(x),
    "segments": lambda x, y, m: jax.ops.segment_sum(m, LABELS[0] + jnp.zeros(len(x), int), 5)[0] / len(x),
    "constants": lambda x, y, m: (np.full((len(x), 1), 1 / len(x)) * squares(x, y)).sum(),
    "a grid": lambda x, y, m: (jnp.linspace(0, 1, len(x))[:, None] * squares(x, y)).sum() / len(x),
    "logarithm": lambda x, y, m: jnp.log(jnp.exp(squares(x, y)).sum()),
}
ALL = {
    **{f"mean: {name}": (loss, 0) for name, loss in MEANS.items()},
    **{f"sum: {name}": case for name, case in SUMS.items()},
    **{f"unknown: {name}": (loss, None) for name, loss in UNKNOWN.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_the_program_tells_how_a_loss_grows(name):
    """And the loss of all examples twice says the same."""
    loss, expected = ALL[name]
    once, twice = (X, Y, MASK), [jnp.concatenate([leaf, leaf]) for leaf in (X, Y, MASK)]
    assert growth(jax.make_jaxpr(loss)(*once), jax.make_jaxpr(loss)(*twice)) == expected
    if expected is not None:
        penalty = (WEIGHT**2).sum() if "penalty" in name else 0
        np.testing.assert_allclose(loss(*twice) - penalty, 2**expected * (loss(*once) - penalty), rtol=1e-4)


def outputs(params, x):
    return kfqn.outputs(MODEL.apply({"params": params}, x), "normal")


def one_step(loss_fn, *args, batch_argnums=(1, 2), tx=None):
    """A step with all that it traces, which is not run."""
    value_and_grad, tx = (
        kfqn.value_and_grad(loss_fn, LAYERS, batch_argnums=batch_argnums),
        tx or kfqn.kfac(1.0, LAYERS),
    )

    def step(params, *args):
        _, grads, curvature = value_and_grad(params, *args)
        return tx.update(grads, tx.init(params), params, curvature=curvature)

    return jax.eval_shape(step, PARAMS, *args)


def test_a_sum_is_told_where_parts_are_taken():
    """Of 250 examples or fewer none are left out, and a sum is as good."""
    loss_fn = lambda params, x, y: jnp.sum((outputs(params, x) - y) ** 2)
    with pytest.raises(ValueError, match=r"twice the examples .* is 2 times as large.*sum.*Take the mean"):
        one_step(loss_fn, X, Y)
    one_step(loss_fn, X[:250], Y[:250])
    one_step(loss_fn, X, Y, tx=kfqn.kbfgs(0.3, LAYERS))
    one_step(loss_fn, X, Y, batch_argnums=None)


@pytest.mark.parametrize("rows", [N, 30])
def test_an_array_of_the_batch_s_length_that_is_closed_over(rows):
    w = jnp.ones((rows, 1))
    loss_fn = lambda params, x, y: jnp.mean(w * (outputs(params, x) - y) ** 2)
    message = rf"its {rows} examples and not with {2 * rows} .*\(1, 2\).* must be a positional argument"
    with pytest.raises(ValueError, match=message):
        one_step(loss_fn, X[:rows], Y[:rows])
    passed = lambda params, x, y, w: jnp.mean(w * (outputs(params, x) - y) ** 2)
    one_step(passed, X[:rows], Y[:rows], w, batch_argnums=(1, 2, 3))


def test_a_loss_that_asks_for_a_shape():
    """Also where the number is one that twice the examples fit, and those that are taken do not."""
    for groups, message in (((N // 10, 10), rf"not with {2 * N} "), ((-1, 3), r"not with 250 ")):
        loss_fn = lambda p, x, y, groups=groups: ((outputs(p, x) - y).reshape(groups).sum(1) ** 2).mean()
        with pytest.raises(ValueError, match=message + r"\(TypeError: .*must not ask for a shape"):
            one_step(loss_fn, X, Y, tx=kfqn.kfac(1.0, LAYERS, statistics_rows=250))


@pytest.mark.parametrize("rows", [N, 250])
def test_an_argument_that_is_left_out(rows):
    loss_fn = lambda params, x, y: optax.l2_loss(outputs(params, x), y).mean()
    message = rf"Argument 2 has {rows} rows, too: give batch_argnums=\(1, 2\)"
    with pytest.raises(ValueError, match=message):
        one_step(loss_fn, X[:rows], Y[:rows], batch_argnums=1)


def test_an_argument_that_is_left_out_and_of_which_nothing_is_seen():
    """JAX takes an index beyond the end for the last one."""
    loss_fn = lambda p, x, k: jnp.mean(outputs(p, x)[jnp.arange(len(k)), 0 * k] ** 2)
    with pytest.warns(KfqnWarning, match=r"leaves out argument 2 .* 300 rows"):
        one_step(loss_fn, X, LABELS, batch_argnums=1)


def test_a_loss_that_asks_for_values_goes_on_as_it_did():
    """Outside of jit, and with NumPy's functions, arguments are numbers, and stay so."""

    def loss_fn(params, x, y):
        return jnp.mean((outputs(params, x) - np.asarray(y)) ** 2) * float(np.asarray(y).max() > 0)

    _, _, curvature = kfqn.value_and_grad(loss_fn, LAYERS, batch_argnums=(1, 2))(PARAMS, X, Y)
    assert curvature.outputs == 1
    value = curvature.value_at(jax.tree.map(jnp.zeros_like, PARAMS), rows=N - 1)
    np.testing.assert_allclose(value, curvature.value, rtol=0.1)


def test_an_nnx_model():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(6, 1, rngs=nnx.Rngs(1)))
    layers = kfqn.find_layers(model, X)
    loss_fn = lambda model, x, y: jnp.sum((kfqn.outputs(model(x), "normal") - y) ** 2)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    with pytest.raises(ValueError, match="it is a sum and not a mean"):
        value_and_grad(model, X, Y)[2].value_at(nnx.state(model, nnx.Param), rows=9)
    with pytest.raises(ValueError, match=re.escape("Argument 2 has 300 rows")):
        kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)(model, X, Y)


def test_arrays_that_are_not_jax_s():
    """NumPy's, and lists of them, closed over as well as passed."""
    loss_fn = lambda params, batch, y: jnp.mean((outputs(params, batch["x"][0]) - y) ** 2)
    x, y = np.asarray(X), np.asarray(Y)
    value_and_grad = kfqn.value_and_grad(loss_fn, LAYERS, batch_argnums=(1, 2))
    tx, one_state = kfqn.kfac(1.0, LAYERS), kfqn.kfac(1.0, LAYERS).init(PARAMS)

    def step(batch, y):
        _, grads, curvature = value_and_grad(PARAMS, batch, y)
        return tx.update(grads, one_state, PARAMS, curvature=curvature)[0]

    closed_over = jax.jit(lambda: step({"x": [x]}, y))()
    passed = jax.jit(step)({"x": [X]}, Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), closed_over, passed)
