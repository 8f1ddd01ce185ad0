"""Micro-batches inside the loss: a step is that of the whole batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

MICRO, ROWS = 3, 5


def train(method, accumulated, steps=3):
    model = nn.Sequential([nn.Dense(4, param_dtype="float64"), nn.tanh, nn.Dense(2, param_dtype="float64")])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(MICRO, ROWS, 3)))
    params = model.init(jax.random.key(0), x[0])["params"]
    layers = kfqn.find_layers(model, {"params": params}, x[0])

    def of_rows(params, x):
        z = kfqn.outputs(model.apply({"params": params}, x))
        return jnp.mean((z - jnp.sin(x[:, :2])) ** 2)

    def loss_fn(params, x):
        if not accumulated:
            return of_rows(params, x.reshape(-1, 3))
        return jax.lax.map(jax.checkpoint(functools.partial(of_rows, params)), x).mean()

    value_and_grad, tx = kfqn.value_and_grad(loss_fn, layers), method(1.0, layers)

    @quick_jit
    def train_step(params, opt_state):
        loss, grads, curvature = value_and_grad(params, x)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for _ in range(steps):
        params, opt_state, loss = train_step(params, opt_state)
    assert kfqn.diagnostics(opt_state)["rejected"] == 0
    return params, opt_state, loss


@pytest.mark.parametrize("method", [kfqn.kfac, kfqn.kbfgs], ids=["kfac", "kbfgs"])
def test_accumulation_inside_the_loss_is_the_whole_batch(method):
    with jax.enable_x64(True):
        ours, whole = (train(method, accumulated) for accumulated in (True, False))
        for one, other in zip(*map(jax.tree.leaves, (ours, whole)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)
