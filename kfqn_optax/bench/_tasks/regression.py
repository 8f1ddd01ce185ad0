"""A small tanh network on a smooth function of eight numbers, all examples in every step."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._tasks.task import Task, linen_start

INPUTS, TRAIN, TEST = 8, 4_000, 2_000


def target(x: np.ndarray) -> np.ndarray:
    """A sine, a product, a bump and a slope, each of other inputs, of variance about 1."""
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + np.exp(-(x[:, 3] ** 2) - x[:, 4] ** 2)
    return (0.6 * (y + 0.5 * x[:, 5] + 0.2 * np.cos(3 * x[:, 6] + x[:, 7]) - 0.35)).astype(np.float32)


def load_regression() -> Task:
    x = np.random.default_rng(0).normal(size=(TRAIN + TEST, INPUTS)).astype(np.float32)
    y = target(x)
    model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh, nn.Dense(1)])
    init, layers = linen_start(model, jnp.zeros((1, INPUTS)))

    def error(params: Any, batch: Any) -> jax.Array:
        inputs, expected = batch
        outputs: Any = model.apply({"params": params}, inputs)
        return jnp.mean((kfqn.outputs(outputs[:, 0], "normal") - expected) ** 2)

    return Task(
        init=init,
        loss=lambda params, batch, state: (error(params, batch) / 2, state),
        layers=layers,
        train=(x[:TRAIN], y[:TRAIN]),
        test=(x[TRAIN:], y[TRAIN:]),
        batch_size=TRAIN,
        metric="test rms error",
        test_metric=lambda params, batch, state: jnp.sqrt(error(params, batch)),
    )
