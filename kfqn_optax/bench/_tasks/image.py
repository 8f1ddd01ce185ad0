"""An image from its coordinates: 2 -> 256 -> 256 -> 256 -> 1, on a picture made of formulas."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._tasks.task import Task, linen_start

HEIGHT, WIDTH = 112, 92
BATCH_SIZE = 2_048
_TESTED = 2_000  # points between the pixels


class Picture(nn.Module):
    """Sines and cosines of the coordinates up to the fourth octave, then three tanh layers."""

    width: int = 256

    @nn.compact
    def __call__(self, points: jax.Array) -> jax.Array:
        octaves = jnp.pi * 2.0 ** jnp.arange(4)
        angles = (points[:, :, None] * octaves[None, None]).reshape(len(points), -1)
        x = jnp.concatenate([points, jnp.sin(angles), jnp.cos(angles)], axis=1)
        for _ in range(3):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)[:, 0]


def brightness(points: np.ndarray) -> np.ndarray:
    """Waves of several lengths, a disc with a sharp edge and a chequered corner, at points in [-1, 1]^2."""
    x, y = points[:, 0], points[:, 1]
    waves = 0.3 * np.sin(9 * x + 6 * y**2) + 0.15 * np.cos(25 * x * y)
    disc = 0.4 * np.tanh(20 * (0.45 - np.hypot(x - 0.2, y + 0.1)))
    chequers = 0.3 * np.tanh(8 * np.sin(12 * x) * np.sin(12 * y)) / (1 + np.exp(10 * (x + y + 0.6)))
    return (waves + disc + chequers).astype(np.float32)


def load_image() -> Task:
    axes = np.linspace(-1, 1, HEIGHT), np.linspace(-1, 1, WIDTH)
    pixels = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)
    between = np.random.default_rng(0).uniform(-1, 1, (_TESTED, 2)).astype(np.float32)
    model = Picture()
    init, layers = linen_start(model, jnp.zeros((1, 2)))

    def error(params: Any, batch: Any) -> jax.Array:
        points, target = batch
        outputs: Any = model.apply({"params": params}, points)
        return jnp.mean((kfqn.outputs(outputs, "normal") - target) ** 2)

    return Task(
        init=init,
        loss=lambda params, batch, state: (error(params, batch) / 2, state),
        layers=layers,
        train=(pixels, brightness(pixels)),
        test=(between, brightness(between)),
        batch_size=BATCH_SIZE,
        metric="test rms error",
        test_metric=lambda params, batch, state: jnp.sqrt(error(params, batch)),
    )
