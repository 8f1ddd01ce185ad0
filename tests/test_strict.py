"""Steps under ``jax_numpy_dtype_promotion="strict"``, which some users set, with float32 parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import kfqn_optax as kfqn

METHODS = {
    "kfac": lambda layers: kfqn.kfac(1.0, layers, weight_decay=0.1),
    "kfac, long sides": lambda layers: kfqn.kfac(lambda count: 1.0, layers, max_dim=2),
    "kbfgs": lambda layers: kfqn.kbfgs(0.3, layers),
    "kbfgs of the paper": lambda layers: kfqn.kbfgs(0.3, layers, step_rule=None, others_decay=None),
    "kbfgs, groups": lambda layers: kfqn.kbfgs(0.3, layers, groups=4, start="gradients", step_rule=0.1),
    "kbfgs_l": lambda layers: kfqn.kbfgs_l(0.3, layers, memory=3, limited_inputs=True),
    "kfqn": lambda layers: kfqn.kfqn(0.3, layers, update_every=3),
}


@pytest.mark.parametrize("mark", ["categorical", None])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_promotes_no_dtype_by_itself(name, mark):
    """Traced, not run: that is where JAX raises."""
    model = nn.Sequential(
        [nn.Conv(4, (3, 3)), nn.LayerNorm(), nn.relu, lambda z: z.mean((1, 2)), nn.Dense(3)]
    )
    x, y = jnp.ones((8, 6, 6, 2)), jnp.arange(8) % 3

    def loss_fn(params, x, y):
        with kfqn.weights(jnp.ones(8)):
            z = kfqn.outputs(model.apply({"params": params}, x), mark)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    with jax.numpy_dtype_promotion("strict"):
        params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
        layers = kfqn.find_layers(model, {"params": params}, x)
        groups = {} if "groups" not in name else {"groups": 4}
        argnums = () if groups else (1, 2)
        value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=argnums, **groups)
        tx = METHODS[name](layers)

        def step(params, state, x, y):
            loss, grads, curvature = value_and_grad(params, x, y)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state, loss, kfqn.diagnostics(state)

        state = jax.eval_shape(tx.init, params)
        moved, after, *_ = jax.eval_shape(step, params, state, x, y)
    assert jax.tree.map(lambda a: a.dtype, (moved, after)) == jax.tree.map(
        lambda a: a.dtype, (params, state)
    )
