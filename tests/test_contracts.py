"""What Python, and JAX in half precision, expect of what the library hands out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._numerics import all_finite, inner
from kfqn_optax.bench._quick import quick_jit

model, x = nn.Dense(2), jnp.ones((8, 3))
params = quick_jit(model.init)(jax.random.key(0), x)["params"]
layers = kfqn.find_layers(model, {"params": params}, x)


def test_equal_layers_have_one_hash():
    again = kfqn.find_layers(model, {"params": params}, x)
    assert layers["."] == again["."]
    assert len({layers["."], again["."]}) == 1
    assert {layers: 1}[again] == 1


@pytest.mark.parametrize("name", ["__jax_array__", "__array__", "shape", "dtype", "anything"])
def test_asking_a_curvature_for_what_it_has_not_raises_nothing(name):
    loss_fn = lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)
    asked = []

    def look(params):
        curvature = kfqn.value_and_grad(loss_fn, layers)(params)[2]
        asked.append((hasattr(curvature, name), getattr(curvature, name, None)))
        return params

    jax.eval_shape(look, params)
    assert asked == [(False, None)]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_many_numbers_of_half_precision_are_finite(dtype):
    ones = {"w": jnp.ones(70_000, dtype)}
    assert all_finite(ones)
    np.testing.assert_allclose(inner(ones, ones), 70_000)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not all_finite({"w": ones["w"].at[3].set(bad)})


@pytest.mark.parametrize("method", [kfqn.kfac, kfqn.kbfgs], ids=["kfac", "kbfgs"])
def test_a_step_is_made_with_a_gradient_of_70_000_ones_of_half_precision(method):
    """The parameters of another branch of the loss, of no layer: their gradient is 1 each."""
    own = {"net": params, "offsets": jnp.zeros(70_000, jnp.float16)}
    joined = kfqn.join_layers({"net": layers})

    def loss_fn(own):
        z = model.apply({"params": own["net"]}, x)
        return jnp.mean(z**2) + own["offsets"].astype(jnp.float32).sum()

    tx = method(1e-3, joined, damping=1.0, step_rule=None)

    @quick_jit
    def step(own, state):
        _, grads, curvature = kfqn.value_and_grad(loss_fn, joined)(own)
        updates, state = tx.update(grads, state, own, curvature=curvature)
        return updates, state, grads

    updates, state, grads = step(own, tx.init(own))
    assert grads["offsets"].dtype == jnp.float16
    np.testing.assert_array_equal(grads["offsets"], 1)
    assert kfqn.diagnostics(state)["rejected"] == 0
    assert optax.tree.norm(updates["net"]) > 0
