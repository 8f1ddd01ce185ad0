"""A network of any size, on data without a meaning: what it costs does not depend on what it learns."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._tasks.task import Task, linen_start

OUTPUTS = 10


class Size(NamedTuple):
    """Hidden layers of one width, and examples in a step."""

    width: int = 512
    depth: int = 3
    batch: int = 1_024


def task_of(size: Size) -> Task:
    hidden = [layer for _ in range(size.depth) for layer in (nn.Dense(size.width), nn.tanh)]
    model = nn.Sequential([*hidden, nn.Dense(OUTPUTS)])
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(size.batch, n)).astype(np.float32) for n in (size.width, OUTPUTS))
    init, layers = linen_start(model, jnp.zeros((1, size.width)))

    def loss(params, batch, state):
        z = kfqn.outputs(model.apply({"params": params}, batch[0]), "normal")
        return jnp.mean((z - batch[1]) ** 2), state

    return Task(init, loss, layers, (x, y), (x, y), size.batch, "loss", lambda *given: loss(*given)[0])
