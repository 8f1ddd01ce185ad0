"""Parts of a batch are drawn across it, anew in each step; factors are made of every so manieth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax import _learning
from kfqn_optax._capture.parts import Parts, spread
from kfqn_optax.bench._quick import quick_jit

model = nn.Dense(2)
x = jax.random.normal(jax.random.key(0), (10, 3))
params = quick_jit(model.init)(jax.random.key(1), x)["params"]
layers = kfqn.find_layers(model, {"params": params}, x)


def loss_fn(params, x):
    z = kfqn.outputs(model.apply({"params": params}, x), "normal")
    return jnp.mean(jnp.sum((z - jnp.sin(x[:, :2])) ** 2, axis=1))


SIZES = [(10, 3, 3), (10, 3, 7), (10, 3, 9), (10, 9, 9), (257, 250, 250), (1024, 250, 500), (1000, 7, 1)]


@pytest.mark.parametrize(("examples", "few", "rows"), SIZES)
def test_the_model_takes_examples_of_which_no_factor_is_made(examples, few, rows):
    """None of those while there are others, and all others where there are not enough."""

    @jax.jit
    def both(key):
        parts = Parts(key).of_factors(examples, few), Parts(key, few).of_model(examples, rows)
        return [chosen for chosen, _ in parts]

    blocks = [
        part[1] for part in (Parts().of_factors(examples, few), Parts(0, few).of_model(examples, rows))
    ]
    for seed in range(5):
        drawn = both(jax.random.key(seed))
        for chosen, count, parts in zip(drawn, (few, rows), blocks, strict=True):
            assert len(np.unique(chosen)) == count
            assert chosen.min() >= 0
            assert chosen.max() < examples
            np.testing.assert_array_equal(
                chosen // (examples // parts), np.repeat(np.arange(parts), count // parts)
            )
        assert len(np.intersect1d(*drawn)) == max(few + rows - examples, 0)


@pytest.mark.parametrize(("examples", "few", "rows"), [(257, 250, 9), (375, 250, 100), (600, 250, 500)])
def test_each_example_is_as_likely_as_any_other(examples, few, rows):
    def parts(key):
        return Parts(key).of_factors(examples, few)[0], Parts(key, few).of_model(examples, rows)[0]

    keys = jax.random.split(jax.random.key(0), 4000)
    for chosen in jax.jit(jax.vmap(parts))(keys):
        likely = chosen.shape[1] / examples
        often = np.bincount(np.ravel(chosen), minlength=examples) / len(keys)
        np.testing.assert_allclose(often, likely, atol=5 * np.sqrt(likely * (1 - likely) / len(keys)))


def test_examples_are_drawn_from_all_over_the_batch():
    """One from each of equally long runs; no row or column of 64 x 64 pixels twice as often as another."""
    drawn = np.concatenate([spread(4096, 256, jax.random.key(seed)) for seed in range(16)])
    np.testing.assert_array_equal(drawn // 16, np.tile(np.arange(256), 16))
    for line in (drawn // 64, drawn % 64):
        np.testing.assert_allclose(np.bincount(line), 64, atol=35)


def test_forms_and_factors_are_of_other_parts_in_each_step():
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)

    @quick_jit
    def at(count):
        curvature = value_and_grad(params, x)[2].with_parts(count, 3)
        parts = Parts(count, 3)
        chosen = parts.of_factors(10, 3)[0], parts.of_model(10, 3)[0]
        moment = curvature.factor_statistics(rows=3)["."].second_moment
        return chosen, moment, curvature.value_at(params, rows=3), curvature.forms([params], rows=3).value

    drawn = []
    for count in (0, 1, 7):
        chosen, moment, at_end, value = at(jnp.asarray(count))
        seen, held_out = (x[np.asarray(part)] for part in chosen)
        homogeneous = np.concatenate([seen, np.ones((3, 1))], axis=1)
        np.testing.assert_allclose(moment, homogeneous.T @ homogeneous / 3, rtol=1e-5)
        doubled = jax.tree.map(lambda p: 2 * p, params)
        np.testing.assert_allclose(at_end, loss_fn(doubled, held_out), rtol=1e-5)
        np.testing.assert_allclose(value, loss_fn(params, held_out), rtol=1e-5)
        drawn.append(tuple(map(tuple, np.asarray(chosen))))
    assert len(set(drawn)) == 3


LINE = np.linspace(-1, 1, 1000)[:, None]
PIXELS = np.stack(np.meshgrid(*2 * [np.linspace(-1, 1, 32)], indexing="ij"), -1).reshape(-1, 2)
ORDERS = {
    "along a line": (LINE, np.where(LINE < 0, 0.2 * np.sin(3 * LINE), np.sin(9 * LINE))),
    "two clusters": (np.r_[LINE - 3, LINE + 3], np.r_[0 * LINE, np.sin(5 * LINE)]),
    "pixel rows": (PIXELS, np.where(PIXELS[:, :1] < 0, 0.2, np.sin(8 * PIXELS.prod(1, keepdims=True)))),
}


@pytest.mark.parametrize("order", ORDERS)
def test_batches_in_the_order_of_the_data_do_as_well_as_shuffled_ones(order):
    """Within what draws make of it: 0.3 to 2 times, over five keys of two clusters."""
    inputs, targets = (array.astype(np.float32) for array in ORDERS[order])
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])
    start = quick_jit(model.init)(jax.random.key(1), inputs)["params"]
    layers = kfqn.find_layers(model, {"params": start}, inputs)

    def loss_fn(params, x, y):
        return jnp.mean((kfqn.outputs(model.apply({"params": params}, x), "normal") - y) ** 2)

    value_and_grad, tx = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2)), kfqn.kfac(1.0, layers)

    @quick_jit
    def losses(x, y):
        def step(carry, _):
            params, state = carry
            loss, grads, curvature = value_and_grad(params, x, y)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (start, tx.init(start)), None, length=81)[1]

    def last(x, y):
        found = losses(x, y)
        assert found.max() < 1.5 * found[0]
        assert found[-1] < 0.1 * found[0]
        return found[-1]

    shuffled = np.random.default_rng(0).permutation(len(inputs))
    assert last(inputs, targets) < 4 * last(inputs[shuffled], targets[shuffled])


def test_factors_are_made_of_the_first_batches_and_then_of_every_third(monkeypatch):
    monkeypatch.setattr(_learning, "LEARN_AT_FIRST", 3)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)
    tx = kfqn.kfac(1.0, layers, inverse_every=3)

    @quick_jit
    def step(params, state, x):
        _, grads, curvature = value_and_grad(params, x)
        return tx.update(grads, state, params, curvature=curvature)[1]

    state, changed = tx.init(params), []
    for k in range(8):
        after = step(params, state, x + k)
        before, now = (s[0].outputs["."].factor for s in (state, after))
        changed.append(bool((before != now).any()))
        state = after
    assert changed == [True, True, True, True, False, False, True, False]


@pytest.mark.parametrize(
    ("positions", "examples"),
    [(1, 250), (4, 62), (20, 32)],
    ids=["dense", "few positions", "many positions"],
)
def test_with_convolutions_factors_are_made_of_fewer_examples(positions, examples):
    model = nn.Dense(2) if positions == 1 else nn.Conv(2, (2,))
    x = jax.random.normal(jax.random.key(0), (300, 3) if positions == 1 else (300, positions, 3))
    params = quick_jit(model.init)(jax.random.key(1), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, x: jnp.mean(kfqn.outputs(model.apply({"params": params}, x), "normal") ** 2)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)

    def factors_of(**settings):
        tx = kfqn.kfac(1.0, layers, **settings)

        @quick_jit
        def step(params, x):
            _, grads, curvature = value_and_grad(params, x)
            return tx.update(grads, tx.init(params), params, curvature=curvature)[1]

        sides = step(params, x)[0]
        return sides.inputs["."].second_moment, sides.outputs["."].second_moment

    ours = factors_of()
    for one, same, other in zip(
        ours, factors_of(statistics_rows=examples), factors_of(statistics_rows=examples - 1), strict=True
    ):
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()


def test_parts_of_a_batch_that_ends_in_padding_have_their_share_of_real_examples():
    """A fifth of 1,024; the loss of a part is that of the real ones, and the padding is of another size."""
    real = 1.0 * (jnp.arange(1024) < 205)
    inputs = jnp.where(real[:, None] > 0, jax.random.normal(jax.random.key(2), (1024, 3)), 100.0)

    def padded(params, x, mask):
        with kfqn.weights(mask):
            z = kfqn.outputs(model.apply({"params": params}, x), "normal")
        return (mask[:, None] * (z - jnp.sin(x[:, :2])) ** 2).sum() / mask.sum()

    @quick_jit
    def at(key):
        curvature = kfqn.value_and_grad(padded, layers, batch_argnums=(1, 2))(params, inputs, real)[2]
        curvature = curvature.with_parts(key, 250)
        zero = jax.tree.map(jnp.zeros_like, params)
        counted = curvature.factor_statistics(rows=250)["."].rows
        return (
            curvature.value,
            curvature.value_at(zero, rows=500),
            curvature.forms([params], 500).value,
            counted,
        )

    for seed in range(4):
        value, at_part, of_forms, counted = at(jax.random.key(seed))
        np.testing.assert_allclose([at_part, of_forms], value, rtol=0.3)
        np.testing.assert_allclose(counted, 250 / 5, atol=2)
