"""A physics-informed network: -(u_xx + u_yy) = f on the unit square, u = 0 on its boundary."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._tasks.task import Task, linen_start

POINTS = 1_000  # in the square, and as many on its boundary
BOUNDARY_WEIGHT = 100.0
_WAVES = ((1.0, 1, 2), (0.5, 3, 1))  # amplitude, and half waves along x and y
_GRID = 50


def solution(points: Any) -> Any:
    return sum(
        a * jnp.sin(m * jnp.pi * points[:, 0]) * jnp.sin(n * jnp.pi * points[:, 1]) for a, m, n in _WAVES
    )


def source(points: Any) -> Any:
    """f = -(u_xx + u_yy) of the solution, each of whose waves is an eigenfunction."""
    x, y = jnp.pi * points[:, 0], jnp.pi * points[:, 1]
    return sum(a * jnp.pi**2 * (m * m + n * n) * jnp.sin(m * x) * jnp.sin(n * y) for a, m, n in _WAVES)


def load_poisson() -> Task:
    model = nn.Sequential([part for _ in range(3) for part in (nn.Dense(64), nn.tanh)] + [nn.Dense(1)])
    init, layers = linen_start(model, jnp.zeros((2,)))

    def u(params: Any, point: jax.Array) -> jax.Array:
        outputs: Any = model.apply({"params": params}, point)
        return outputs[0]

    at = jax.vmap(u, (None, 0))
    second_derivatives = jax.vmap(jax.hessian(u, 1), (None, 0))

    def loss(params, batch, state):
        laplacian = jnp.trace(second_derivatives(params, batch["inside"]), axis1=1, axis2=2)
        residual = kfqn.outputs(laplacian + source(batch["inside"]), "normal")
        edge = kfqn.outputs(BOUNDARY_WEIGHT**0.5 * at(params, batch["edge"]), "normal")
        return (jnp.mean(residual**2) + jnp.mean(edge**2)) / 2, state

    def forward(params, batch, state):
        del state
        return at(params, jnp.concatenate([batch["inside"], batch["edge"]]))

    def relative_error(params, points, state):
        del state
        exact = solution(points)
        return jnp.linalg.norm(at(params, points) - exact) / jnp.linalg.norm(exact)

    return Task(
        init=init,
        loss=loss,
        layers=layers,
        train=_training_points(np.random.default_rng(0)),
        test=_grid(),
        batch_size=POINTS,
        metric="relative L2 error",
        test_metric=relative_error,
        forward=forward,
    )


def _training_points(rng: np.random.Generator) -> dict[str, np.ndarray]:
    along, side = rng.uniform(size=POINTS), np.arange(POINTS) % 4
    across = (side % 2).astype(float)
    edge = np.where((side < 2)[:, None], np.stack([along, across], 1), np.stack([across, along], 1))
    inside = rng.uniform(size=(POINTS, 2))
    return {"inside": inside.astype(np.float32), "edge": edge.astype(np.float32)}


def _grid() -> np.ndarray:
    axis = np.linspace(0, 1, _GRID, dtype=np.float32)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
