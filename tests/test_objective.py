"""A gradient that is not the loss's own: steps go where it says, by the curvature that belongs to it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import kfqn_optax as kfqn
from kfqn_optax._objective import _fit
from kfqn_optax.bench._quick import quick_jit

METHODS = {
    "kfac": lambda layers: kfqn.kfac(1.0, layers),
    "kbfgs": lambda layers: kfqn.kbfgs(1.0, layers, damping=0.01),
    "kfqn": lambda layers: kfqn.kfqn(1.0, layers, damping=0.01),
}


def run(tx, loss_fn, layers, params, steps):
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)

    @quick_jit
    def step(params, state):
        _, grads, curvature = value_and_grad(params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert kfqn.diagnostics(state)["rejected"] == 0
    return params


class Regression:
    """Least squares 1/2 mean (x w + b - y)^2, with features of sizes from 1 to a tenth."""

    def __init__(self, features=4, use_bias=False):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(200, features)) * np.linspace(1, 0.1, features)
        self.y = self.x @ np.ones((features, 1)) + rng.normal(size=(200, 1)) + 0.5
        self.model = nn.Dense(1, use_bias=use_bias)
        x, y = jnp.asarray(self.x, jnp.float32), jnp.asarray(self.y, jnp.float32)
        self.params = self.model.init(jax.random.key(1), x)["params"]
        self.layers = kfqn.find_layers(self.model, {"params": self.params}, x)
        self.loss_fn = lambda params: (
            0.5 * jnp.mean((kfqn.outputs(self.model.apply({"params": params}, x), "normal") - y) ** 2)
        )

    def minimum(self, penalty=0.0, linear=0.0, on_bias=0.0):
        """Of the loss + penalty |w|^2 / 2 + on_bias b^2 / 2 + <linear, w>, in float64."""
        x = self.x
        added = np.full(x.shape[1], penalty)
        if self.model.use_bias:
            x, added = np.concatenate([x, np.ones((200, 1))], 1), np.append(added, on_bias)
        return np.linalg.solve(x.T @ x / 200 + np.diag(added), x.T @ self.y / 200 - linear).ravel()

    def check(self, tx, expected, steps=100, atol=1e-3):
        params = run(tx, self.loss_fn, self.layers, self.params, steps)
        ours = np.append(params["kernel"].ravel(), params.get("bias", []))
        np.testing.assert_allclose(ours, expected, atol=atol * np.abs(expected).max())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("penalty", [0.01, 0.5, 10.0])
def test_decayed_weights_before_it_make_a_ridge_regression(name, penalty):
    problem = Regression()
    tx = optax.chain(optax.add_decayed_weights(penalty), METHODS[name](problem.layers))
    problem.check(tx, problem.minimum(penalty), steps=200)


@pytest.mark.parametrize(
    "after",
    [optax.clip_by_global_norm(0.1), optax.scale(100.0)],
    ids=["clipped after", "scaled after"],
)
def test_a_scaled_penalised_gradient_is_that_of_a_ridge_regression(after):
    """In float64: near the minimum the gradient is all penalty, and float32 no longer shows its scale."""
    with jax.enable_x64(True):
        problem = Regression()
        problem.params = jax.tree.map(jnp.float64, problem.params)
        tx = optax.chain(optax.add_decayed_weights(0.5), after, kfqn.kfac(1.0, problem.layers))
        problem.check(tx, problem.minimum(0.5), atol=1e-6)


def test_the_penalty_may_leave_out_the_bias():
    problem = Regression(use_bias=True)
    decayed = optax.add_decayed_weights(0.5, mask={"kernel": True, "bias": False})
    problem.check(optax.chain(decayed, kfqn.kfac(1.0, problem.layers)), problem.minimum(0.5, on_bias=0.0))
    both = optax.chain(optax.add_decayed_weights(0.5), kfqn.kfac(1.0, problem.layers))
    problem.check(both, problem.minimum(0.5, on_bias=0.5))


@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_in_one_dimension_too(penalty):
    """Where a penalty and a scale of the gradient cannot be told from another by one step."""
    problem = Regression(features=1)
    tx = optax.chain(optax.add_decayed_weights(penalty), kfqn.kfac(1.0, problem.layers))
    problem.check(tx, problem.minimum(penalty))


@pytest.mark.parametrize("name", ["kfac", "kbfgs"])
def test_a_constant_added_to_the_gradient_is_a_linear_term_of_the_loss(name):
    problem = Regression()
    constant = np.array([[0.2], [-0.1], [0.01], [-0.005]])
    add = optax.stateless(lambda grads, _: {"kernel": grads["kernel"] + jnp.float32(constant)})
    tx = optax.chain(add, METHODS[name](problem.layers))
    problem.check(tx, problem.minimum(linear=constant), steps=300)


def negated(tx):
    return optax.chain(optax.scale(-1.0), tx)


@pytest.mark.parametrize("name", METHODS)
def test_ascent_of_minus_a_loss_is_its_descent(name):
    """Step by step: the curvature, the samples and the pairs are those of the loss that falls."""
    with jax.enable_x64(True):
        model, x = zoo.Mlp(), jax.random.normal(jax.random.key(0), (12, 4), jnp.float64)
        params = jax.tree.map(jnp.float64, model.init(jax.random.key(1), x)["params"])
        layers = kfqn.find_layers(model, {"params": params}, x)

        def loss_fn(params):
            z = kfqn.outputs(model.apply({"params": params}, x), "normal")
            return jnp.mean((z - jnp.sin(3 * x[:, :2])) ** 2)

        tx = METHODS[name](layers)
        down = run(tx, loss_fn, layers, params, 8)
        up = run(negated(tx), lambda params: -loss_fn(params), layers, params, 8)
        for one, other in zip(*map(jax.tree.leaves, (up, down)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
        assert loss_fn(up) < 0.95 * loss_fn(params)


@pytest.mark.parametrize("name", ["kfac", "kbfgs"])
def test_two_players_by_partition_end_at_the_saddle_point(name):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3))
    targets = x @ rng.normal(size=(3, 2)) + rng.normal(size=(100, 2))
    model, rows = nn.Dense(1, use_bias=False), jnp.asarray(x, jnp.float32)
    of = jnp.asarray(targets, jnp.float32)
    params = {key: model.init(jax.random.key(i), rows)["params"] for i, key in enumerate("ab")}
    layers = kfqn.join_layers(
        {key: kfqn.find_layers(model, {"params": params[key]}, rows) for key in params}
    )

    def game(params):
        a, b = (kfqn.outputs(model.apply({"params": params[key]}, rows), "normal")[:, 0] for key in params)
        falling, rising = (0.5 * jnp.mean((z - of[:, i]) ** 2) for i, z in enumerate((a, b)))
        return falling - rising + 0.3 * jnp.mean(a * b)

    method = METHODS[name]
    players = {"min": method(layers), "max": negated(method(layers))}
    ours = run(optax.partition(players, {"a": "min", "b": "max"}), game, layers, params, 400)
    c, first, second = x.T @ x, x.T @ targets[:, 0], x.T @ targets[:, 1]
    matrix = np.block([[c, 0.3 * c], [-0.3 * c, c]])
    expected = np.linalg.solve(matrix, np.concatenate([first, second]))
    found = np.concatenate([ours["a"]["kernel"][:, 0], ours["b"]["kernel"][:, 0]])
    np.testing.assert_allclose(found, expected, atol=2e-3)


def vectors(rng):
    return [rng.normal(size=shape).astype(np.float32) for shape in ((20, 3), (3,))]


@pytest.mark.parametrize(
    ("factor", "rate"),
    [(1.0, 0.0), (1e-3, 0.0), (1e3, 0.0), (-1.0, 0.0), (1.0, 0.5), (0.01, 1e-3), (-2.0, 0.3)],
)
def test_a_gradient_scaled_and_decayed_is_known_for_it(factor, rate):
    rng = np.random.default_rng(1)
    g, p = vectors(rng), vectors(rng)
    u = [np.float32(factor) * a + np.float32(rate) * b for a, b in zip(g, p, strict=True)]
    found = _fit(*(list(map(jnp.asarray, tree)) for tree in (u, g, p)), precision=3e-4, scaled=True)
    np.testing.assert_allclose(found, (factor, rate), rtol=1e-4, atol=1e-6 * abs(factor))


def test_a_gradient_with_noise_is_taken_as_it_is():
    rng = np.random.default_rng(1)
    g, p, noise = vectors(rng), vectors(rng), vectors(rng)
    u = [a + np.float32(0.1) * b for a, b in zip(g, noise, strict=True)]
    for params in (p, [0 * leaf for leaf in p]):
        found = _fit(
            *(list(map(jnp.asarray, tree)) for tree in (u, g, params)), precision=3e-4, scaled=True
        )
        assert tuple(map(float, found)) == (1, 0)
