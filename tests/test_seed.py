"""What is drawn: by a key in the state, which a seed makes, folded with the count of steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

model = nn.Dense(3)
x = jax.random.normal(jax.random.key(0), (64, 4))
params = quick_jit(model.init)(jax.random.key(1), x)["params"]
layers = kfqn.find_layers(model, {"params": params}, x)


def loss_fn(params, x, scale=1.0):
    z = kfqn.outputs(model.apply({"params": params}, x), "categorical")
    return scale * optax.softmax_cross_entropy_with_integer_labels(z, jnp.argmax(x[:, :3], 1)).mean()


value_and_grad = kfqn.value_and_grad(loss_fn, layers)


def stepper(tx):
    @quick_jit
    def step(params, state, scale=1.0):
        _, grads, curvature = value_and_grad(params, x, scale)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    return step


def factor(state):
    return state[0].outputs["."].second_moment


def test_the_seed_decides_what_is_drawn_and_is_kept_in_the_state():
    def second_moment(**settings):
        tx = kfqn.kfac(1.0, layers, **settings)
        return np.asarray(factor(stepper(tx)(params, tx.init(params))[1]))

    np.testing.assert_array_equal(second_moment(seed=3), second_moment(seed=3))
    np.testing.assert_array_equal(second_moment(), second_moment(seed=0))
    assert not np.array_equal(second_moment(seed=3), second_moment(seed=4))


def test_the_state_holds_the_key_as_plain_numbers():
    ours = kfqn.kfac(1.0, layers, seed=2**31 + 7).init(params)[0]
    assert ours.key.dtype == jnp.int32
    bits = np.asarray(ours.key).view(np.uint32)
    np.testing.assert_array_equal(bits, jax.random.key_data(jax.random.key(2**31 + 7)))


def test_while_the_loss_stands_still_other_labels_are_drawn_in_each_step():
    tx = kfqn.kfac(0.0, layers, decay=0.0)
    step, state, seen = stepper(tx), tx.init(params), []
    for _ in range(3):
        after, state = step(params, state)
        jax.tree.map(np.testing.assert_array_equal, after, params)
        seen.append(np.asarray(factor(state)))
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])


def test_the_bits_of_the_loss_decide_nothing():
    """A loss of one and a half times the size has the same labels, and its square root in the samples."""
    tx = kfqn.kfac(1.0, layers)
    plain, larger = (factor(stepper(tx)(params, tx.init(params), scale)[1]) for scale in (1.0, 1.5))
    np.testing.assert_allclose(larger, 1.5 * plain, rtol=1e-5)


def test_rounding_of_the_outputs_decides_nothing():
    moved = jax.tree.map(lambda p: p * (1 + 2e-7), params)
    tx = kfqn.kfac(1.0, layers)
    plain, other = (factor(stepper(tx)(p, tx.init(params))[1]) for p in (params, moved))
    np.testing.assert_allclose(other, plain, rtol=1e-4)


def test_without_a_key_factor_statistics_are_those_of_seed_0():
    @quick_jit
    def both(params):
        curvature = value_and_grad(params, x)[2]
        asked = (curvature.factor_statistics(), curvature.factor_statistics(key=0))
        return [one["."].grad_moment for one in asked]

    np.testing.assert_array_equal(*both(params))


@pytest.mark.parametrize("seed", [-1, 0.5, 2**40])
def test_a_seed_that_is_none_is_an_error(seed):
    with pytest.raises(ValueError, match=r"seed=.*a whole number"):
        kfqn.kfac(1.0, layers, seed=seed)


def test_a_seed_may_be_a_hyperparameter_that_is_traced():
    tx = optax.inject_hyperparams(kfqn.kfac, static_args="layers")(1.0, layers, seed=5)
    state = tx.init(params)
    plain = kfqn.kfac(1.0, layers, seed=5)
    ours = stepper(tx)(params, state)[1].inner_state
    np.testing.assert_array_equal(factor(ours), factor(stepper(plain)(params, plain.init(params))[1]))
