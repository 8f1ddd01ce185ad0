"""What a step costs, without a clock: the floating-point operations that XLA counts.

The unit of ALGORITHM.md section 6 is one m x d_in x d_out product, 2 m d_in d_out operations. XLA counts
the dearest branch of a conditional, so that a step with one costs what it does when the branch is taken;
where the state's counters are constants of the program XLA removes the conditional, and what is counted
is that very step.
"""

import functools
import itertools
import math
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

TOLERANCE = 0.1


class Net(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=False)(jnp.tanh(x) if i else x)
        return x


class Problem(NamedTuple):
    """A network without biases; ``sizes`` holds (m, d_in, d_out) of each layer."""

    sizes: tuple[tuple[int, int, int], ...]
    params: dict
    layers: kfqn.Layers
    value_and_grad: object
    loss_fn: object
    x: jax.Array


@functools.cache
def problem(rows, widths):
    model = Net(widths[1:])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(rows, widths[0])), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
    layers = kfqn.find_layers(model, {"params": params}, x)
    sizes = tuple((rows, i, o) for i, o in itertools.pairwise(widths))
    return Problem(sizes, params, layers, kfqn.value_and_grad(loss_fn, layers), loss_fn, x)


SQUARE = (128, (128,) * 5)  # four layers with d_in = d_out = m
MIXED = (96, (160, 64, 128, 192))


def flops(function, *args):
    """Operations of the compiled program."""
    return quick_jit(function).lower(*args).compile().cost_analysis()["flops"]


def train_step(small, tx):
    def step(params, state, x):
        loss, grads, curvature = small.value_and_grad(params, x)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    return step


def run(small, tx, steps):
    """The states before each of so many steps, and the operations of the program that made them."""
    step = quick_jit(train_step(small, tx)).lower(small.params, tx.init(small.params), small.x).compile()
    params, states = small.params, [tx.init(small.params)]
    while len(states) < steps:
        params, state, _ = step(params, states[-1], small.x)
        states.append(state)
    return states, step.cost_analysis()["flops"]


def step_flops(small, tx, state):
    """Operations of the step from a state whose counters are known to XLA, which leaves no conditional."""
    leaves, structure = jax.tree.flatten(state)
    counters = [leaf.item() if leaf.ndim == 0 and leaf.dtype.kind in "ib" else None for leaf in leaves]

    def step(params, leaves, x):
        known = [
            leaf if counter is None else jnp.full([], counter, leaf.dtype)
            for leaf, counter in zip(leaves, counters, strict=True)
        ]
        return train_step(small, tx)(params, jax.tree.unflatten(structure, known), x)

    return flops(step, small.params, leaves, small.x)


def products(small):
    """Operations of a forward pass, of its input gradients and of its weight gradients: the same, but
    for the input gradient of the first layer, which nobody asks for."""
    forward = sum(2 * m * i * o for m, i, o in small.sizes)
    m, i, o = small.sizes[0]
    return forward, forward - 2 * m * i * o, forward


def first_pass(small):
    return sum(products(small))


def second_pass(small):
    """As the first without weight gradients."""
    forward, input_gradients, _ = products(small)
    return forward + input_gradients


def second_moments(small):
    return sum(2 * m * i * i for m, i, _ in small.sizes)


def direction(small):
    """H_a M H_g."""
    return sum(2 * i * i * o + 2 * i * o * o for _, i, o in small.sizes)


def factor_updates(small):
    """H x for a few vectors and one or two passes over H: linear in the size of the factors."""
    return 20 * sum(i * i + o * o for _, i, o in small.sizes)


def near(counted, expected):
    assert abs(counted / expected - 1) < TOLERANCE, f"{counted / expected:.3f} times what was expected"


def second_pass_statistics(small, vectors=None):
    def statistics(params, updates, x):
        _, _, curvature = small.value_and_grad(params, x)
        after = curvature.after(updates, vectors).statistics
        used = ("preactivations", "preactivation_grads", *(["product"] if vectors else []))
        return {name: [getattr(value, key) for key in used] for name, value in after.items()}

    return flops(statistics, small.params, small.params, small.x)


def gradient(small):
    return flops(jax.value_and_grad(small.loss_fn), small.params, small.x)


@pytest.mark.parametrize("small", [SQUARE, MIXED], ids=["square", "mixed"])
def test_the_parts_of_a_step(small):
    small = problem(*small)
    near(gradient(small), first_pass(small))

    def with_second_moments(params, x):
        _, grads, curvature = small.value_and_grad(params, x)
        return grads, [value.second_moment for value in curvature.statistics.values()]

    captured = flops(with_second_moments, small.params, small.x)
    near(captured - gradient(small), second_moments(small))

    second = second_pass_statistics(small)
    near(second, second_pass(small))
    vectors = {layer.name: jnp.ones(layer.rows) for layer in small.layers}
    near(second_pass_statistics(small, vectors), second_pass(small))

    tx = kfqn.kbfgs(0.1, small.layers, update_every=3)
    states, _ = run(small, tx, 4)
    between, due = (step_flops(small, tx, states[k]) for k in (2, 3))
    near(between - captured, direction(small))
    assert due - between - second < factor_updates(small)


def test_statistics_that_are_not_used_cost_nothing():
    small = problem(*SQUARE)
    ours = flops(lambda params, x: small.value_and_grad(params, x)[:2], small.params, small.x)
    assert ours < 1.001 * gradient(small)


# The step as a whole, in the units of ALGORITHM.md: layers with d_in = d_out = m, and two units less for
# each pass than layers times units, as the first layer has no input gradient.

UNIT, LAYERS = 2 * SQUARE[0] ** 3, len(SQUARE[1]) - 1


def units(per_layer, passes=2.0):
    return (LAYERS * per_layer - passes) * UNIT


def test_adam_is_3():
    small, tx = problem(*SQUARE), optax.adam(1e-3)

    def step(params, state, x):
        loss, grads = jax.value_and_grad(small.loss_fn)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    near(flops(step, small.params, tx.init(small.params), small.x), units(3, passes=1))


@pytest.mark.parametrize(("method", "per_layer"), [(kfqn.kbfgs, 8), (kfqn.kfqn, 7)], ids=["kbfgs", "kfqn"])
def test_a_step_on_square_layers(method, per_layer):
    """XLA's count of the program that users run; its conditional, the start, is a call of LAPACK to it."""
    small = problem(*SQUARE)
    _, counted = run(small, method(0.1, small.layers), 1)
    near(counted, units(per_layer))


@pytest.mark.parametrize(("method", "with_a"), [(kfqn.kbfgs, 1), (kfqn.kfqn, 0)], ids=["kbfgs", "kfqn"])
def test_an_interval_divides_the_second_pass(method, with_a):
    """5 + 2 / T for KF-QN, and A's one more for K-BFGS."""
    small, interval = problem(*SQUARE), 3
    tx = method(0.1, small.layers, update_every=interval)
    states, dearest = run(small, tx, interval + 1)
    due, between = (step_flops(small, tx, states[k]) for k in (interval, interval - 1))
    near(due, units(7 + with_a))
    near(between, units(5 + with_a, passes=1))
    average = (due + (interval - 1) * between) / interval
    near(average, units(5 + 2 / interval + with_a, passes=1 + 1 / interval))
    near(dearest, due)  # with the conditional, XLA counts its dearest branch


def test_a_step_on_layers_of_any_shape():
    small = problem(*MIXED)
    _, counted = run(small, kfqn.kbfgs(0.1, small.layers), 1)
    parts = first_pass(small), second_pass(small), second_moments(small), direction(small)
    near(counted, sum(parts))


# Memory


def test_the_table_of_layers_tells_the_bytes_of_the_state():
    model = nn.Sequential([nn.Embed(700, 300), nn.Dense(200), nn.Dense(9000, use_bias=False), nn.Dense(50)])
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    layers = kfqn.find_layers(model, variables, ids)
    state = jax.eval_shape(kfqn.kbfgs(0.1, layers).init, variables["params"])[0]

    def size(*trees):
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))

    expected = {
        name: size(
            state.inputs[name].factor,
            getattr(state.inputs[name], "second_moment", None),
            state.outputs[name].factor,
        )
        for name in state.inputs
    }
    table = str(layers)
    for name, counted in expected.items():
        (row,) = [line for line in table.splitlines() if re.search(rf"\b{name}\b", line)]
        np.testing.assert_allclose(float(row.split()[-1]), counted / 1e6, atol=6e-4)
    (total,) = re.findall(r": ([0-9.]+) MB", table)
    np.testing.assert_allclose(float(total), sum(expected.values()) / 1e6, atol=6e-4)
