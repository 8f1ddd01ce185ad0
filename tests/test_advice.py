"""Warnings of what is allowed and probably not wanted: once, with the remedy, and not where all is well."""

import warnings

import flax.linen as nn
import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

model, x = nn.Dense(2), jnp.ones((8, 3))
params = quick_jit(model.init)(jax.random.key(0), x)["params"]
layers = kfqn.find_layers(model, {"params": params}, x)
value_and_grad = kfqn.value_and_grad(
    lambda params: jnp.mean(kfqn.outputs(model.apply({"params": params}, x), "normal") ** 2), layers
)
WARNED = {
    "learning rate of Adam": (lambda: kfqn.kfac(1e-3, layers), "learning_rate=0.001", "Give 1.0"),
    "just below the rule's own least": (
        lambda: kfqn.kfac(0.049, layers),
        "learning_rate=0.049",
        "Give 1.0",
    ),
    "kbfgs with that rule": (
        lambda: kfqn.kbfgs(1e-3, layers, step_rule=kfqn.quadratic(rate=1.0)),
        "learning_rate=0.001",
        "Give 1.0",
    ),
    "weight decay of Adam": (
        lambda: kfqn.kfac(1.0, layers, weight_decay=0.01),
        "takes 1.00% of the weights",
        "give weight_decay=1e-05",
    ),
}
NOT_WARNED = {
    "1": lambda: kfqn.kfac(1.0, layers, weight_decay=1e-3),
    "a tenth": lambda: kfqn.kfac(0.1, layers),
    "nothing is to move": lambda: kfqn.kfac(0.0, layers),
    "a schedule": lambda: kfqn.kfac(optax.linear_schedule(1e-3, 1.0, 10), layers, weight_decay=0.01),
    "the papers' step": lambda: kfqn.kfac(1e-3, layers, step_rule=None, weight_decay=0.1),
    "another rule": lambda: kfqn.kbfgs(1e-3, layers),
}


@pytest.mark.parametrize("name", WARNED)
def test_habits_of_adam_are_warned_of_once(name):
    make, what, remedy = WARNED[name]
    with pytest.warns(kfqn.KfqnWarning) as caught:
        make()
        make()
    (warning,) = caught
    assert what in str(warning.message)
    assert remedy in str(warning.message)


@pytest.mark.parametrize("name", NOT_WARNED)
def test_other_settings_are_not(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NOT_WARNED[name]().init(params)


def test_a_step_outside_jit_is_warned_of_once_and_one_inside_is_not():
    tx = kfqn.kbfgs(1.0, layers)

    def step(params, state):
        _, grads, curvature = value_and_grad(params)
        return tx.update(grads, state, params, curvature=curvature)[1]

    with warnings.catch_warnings():
        warnings.simplefilter("error", kfqn.KfqnWarning)
        jax.eval_shape(step, params, tx.init(params))
    with pytest.warns(kfqn.KfqnWarning, match=r"outside jax\.jit.* one function under jax\.jit") as caught:
        step(params, step(params, tx.init(params)))
    assert len(caught) == 1


@pytest.mark.parametrize("make", [kfqn.kfac, kfqn.kbfgs, kfqn.kfqn], ids=["kfac", "kbfgs", "kfqn"])
def test_a_healthy_step_outside_jit_makes_no_nan(make):
    """Where JAX looks at the result of each operation."""
    tx = make(1.0, layers)
    state = tx.init(params)
    with jax.debug_nans(True):
        moved = params
        for _ in range(2):
            _, grads, curvature = value_and_grad(moved)
            updates, state = tx.update(grads, state, moved, curvature=curvature)
            moved = optax.apply_updates(moved, updates)
    assert kfqn.diagnostics(state)["rejected"] == 0


def test_the_train_state_of_flax_is_told_of_ours():
    state = flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=kfqn.kfac(1.0, layers)
    )

    def step(state):
        _, grads, curvature = value_and_grad(state.params)
        return state.apply_gradients(grads=grads, curvature=curvature)

    with pytest.raises(ValueError, match=r"kfqn\.TrainState.*flax\.training\.train_state"):
        jax.eval_shape(step, state)
