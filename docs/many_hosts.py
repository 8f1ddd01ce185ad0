"""Train on several hosts, each with its own part of every batch and of the factors.

Run it once on each host, the first of which must be reachable by the others:

    python many_hosts.py FIRST_HOST:PORT NUMBER_OF_HOSTS NUMBER_OF_THIS_HOST

On TPU pods and most clusters ``jax.distributed.initialize()`` finds these out by itself.
"""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kfqn_optax as kfqn

BATCH, STEPS = 64, 10


def main(coordinator: str, hosts: int, host: int) -> None:
    jax.distributed.initialize(coordinator, hosts, host)
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_example = NamedSharding(mesh, PartitionSpec("batch"))

    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])

    def loss_fn(params, x, y):  # of the whole batch, wherever its examples are
        z = kfqn.outputs(model.apply({"params": params}, x), "normal")
        return jnp.mean((z - y) ** 2)

    variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))  # the same on every host
    layers = kfqn.find_layers(model, variables, jnp.zeros((1, 4)))
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    tx = kfqn.kfac(1.0, layers, factor_mesh=mesh)
    params = jax.device_put(variables["params"], everywhere)
    opt_state = jax.jit(tx.init)(params)

    @jax.jit
    def train_step(params, opt_state, x, y):
        loss, grads, curvature = value_and_grad(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, loss

    rng = np.random.default_rng(0)
    for step in range(STEPS):
        x = rng.normal(size=(BATCH, 4)).astype(np.float32)
        own = x[host * BATCH // hosts : (host + 1) * BATCH // hosts]  # as if this host had read no other
        batch = (own, np.sin(3 * own.sum(1, keepdims=True)))
        x, y = (jax.make_array_from_process_local_data(by_example, part) for part in batch)
        params, opt_state, loss = train_step(params, opt_state, x, y)
        if host == 0:
            print(step, f"{float(loss):.6f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
