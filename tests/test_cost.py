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
from kfqn_optax._over_layers import inverses
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


def start(small, state):
    """Operations of the inverses at the start, of each loop's body once; none where no A is kept."""
    matrices = [getattr(side, "second_moment", None) for side in state[0].inputs.values()]
    return flops(inverses, matrices) if all(m is not None for m in matrices) else 0.0


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
    return 24 * sum(i * i + o * o for _, i, o in small.sizes)


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
    """XLA's count of a step, and of the program that users run, with the start in its conditional."""
    small = problem(*SQUARE)
    tx = method(0.1, small.layers)
    states, counted = run(small, tx, 2)
    near(step_flops(small, tx, states[1]), units(per_layer))
    near(counted, units(per_layer) + start(small, states[0]))


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
    near(dearest, due + start(small, states[0]))  # XLA counts the dearest branch of a conditional


def test_a_step_on_layers_of_any_shape():
    small = problem(*MIXED)
    tx = kfqn.kbfgs(0.1, small.layers)
    counted = step_flops(small, tx, run(small, tx, 2)[0][1])
    parts = first_pass(small), second_pass(small), second_moments(small), direction(small)
    near(counted, sum(parts))


# Forms and sampled factors, on some of the rows.


class Marked(NamedTuple):
    """A problem whose loss marks its outputs, and its parts on a few rows: ``sizes`` holds those."""

    sizes: tuple[tuple[int, int, int], ...]
    params: dict
    value_and_grad: object
    x: jax.Array


@functools.cache
def marked(rows, distribution="normal", model=None):
    """Square layers of 128 on 8 * 128 rows; ``sizes`` are those of ``rows`` of them."""
    width = 128
    model = Net((width,) * 4) if model is None else model
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8 * width, width)), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    loss_fn = lambda params, x: jnp.mean(
        kfqn.outputs(model.apply({"params": params}, x), distribution) ** 2
    )
    layers = kfqn.find_layers(model, {"params": params}, x)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)
    return Marked(((rows, width, width),) * 4, params, value_and_grad, x)


def forms_flops(small, rows):
    def forms(params, one, other, x):
        _, _, curvature = small.value_and_grad(params, x)
        return curvature.forms([one, other], rows=rows)

    return flops(forms, small.params, small.params, small.params, small.x)


def test_forms_of_two_directions_on_an_eighth_of_the_rows():
    """A forward pass and two products a layer for each direction: 0.6 of a unit a layer."""
    small = marked(128)
    forward, input_gradients, weight_gradients = products(small)
    near(forms_flops(small, 128), forward + 2 * (input_gradients + weight_gradients))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = jnp.tanh(nn.LayerNorm()(nn.Dense(x.shape[-1], use_bias=False)(x)))
        return x


@pytest.mark.parametrize("model", [None, Normed()], ids=["tanh", "LayerNorm"])
def test_forms_on_all_rows_share_the_forward_pass_of_the_gradient(model):
    small = marked(1024, model=model)

    def forms(params, one, other, x):
        _, grads, curvature = small.value_and_grad(params, x)
        return grads, curvature.forms([one, other])

    def gradient(params, one, other, x):
        _, grads, _ = small.value_and_grad(params, x)
        return grads, one, other

    counted = [flops(f, small.params, small.params, small.params, small.x) for f in (forms, gradient)]
    _, input_gradients, weight_gradients = products(small)
    near(counted[0] - counted[1], 2 * (input_gradients + weight_gradients))


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1], use_bias=False)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(nn.remat(Body), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return body()(x, None)[0]


def test_forms_of_layers_that_are_scanned_over():
    """XLA counts a loop's body once. There it does not find that two tangents are the same: 1 + 4 K."""
    small = marked(128, model=Scanned())
    near(forms_flops(small, 128), 9 * 2 * 128**3)


@pytest.mark.parametrize("distribution", ["normal", "categorical"])
def test_the_sampled_pass_on_a_quarter_of_the_rows(distribution):
    """As a second pass, and A and G."""
    small = marked(256, distribution)

    def sampled(params, x):
        _, _, curvature = small.value_and_grad(params, x)
        statistics = curvature.factor_statistics(rows=256, key=0).values()
        return [(one.second_moment, one.grad_moment) for one in statistics]

    near(flops(sampled, small.params, small.x), second_pass(small) + 2 * second_moments(small))


def test_centred_factors_need_no_other_pass():
    small = marked(1024, None)

    def centred(params, x):
        _, grads, curvature = small.value_and_grad(params, x)
        statistics = curvature.factor_statistics().values()
        return grads, [(one.second_moment, one.grad_moment) for one in statistics]

    near(flops(centred, small.params, small.x), first_pass(small) + 2 * second_moments(small))


def test_the_loss_after_a_step_is_one_forward_pass():
    small = marked(256)

    def value_at(params, x):
        _, _, curvature = small.value_and_grad(params, x)
        return curvature.value_at(params, rows=256)

    near(flops(value_at, small.params, small.x), products(small)[0])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="products of another precision on accelerators")
def test_a_rule_that_sees_all_rows_shares_the_forward_pass_of_the_gradient():
    small = marked(1024)
    layers = kfqn.find_layers(Net((128,) * 4), {"params": small.params}, small.x)

    def counted(precision):
        tx = kfqn.kfac(1.0, layers, step_rule=kfqn.quadratic(rows=1024), precision=precision)
        return flops(train_step(small, tx), small.params, tx.init(small.params), small.x)

    near(counted("float32") - counted("highest"), products(small)[0])


def test_a_convolution_s_moment_is_of_some_examples():
    """Twice 4096 rows times d_in^2, however many examples there are: the patches, and A."""
    model, x = nn.Conv(4, (3, 3)), jnp.ones((64, 16, 16, 8))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)

    def moment(params, x):
        _, _, curvature = kfqn.value_and_grad(loss_fn, layers)(params, x)
        return curvature.statistics["."].second_moment

    assert flops(moment, params, x) < 1.5 * 2 * 2 * 4096 * layers["."].in_dim ** 2


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
