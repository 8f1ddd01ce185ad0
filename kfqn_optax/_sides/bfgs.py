"""The BFGS update of a dense inverse factor."""

from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._numerics import safe_divide
from kfqn_optax._sides.factor import InverseFactor


def init(dim: int, dtype: Any, scale: jax.Array | float = 1.0) -> jax.Array:
    """H = scale I."""
    return jnp.asarray(scale, dtype) * jnp.eye(dim, dtype=dtype)


def update(h: jax.Array, s: jax.Array, y: jax.Array) -> jax.Array:
    """One BFGS update: the H+ nearest to H with H+ y = s.

    With rho = 1 / s^T y,
    H+ = H + (rho^2 y^T H y + rho) s s^T - rho (s (H y)^T + (H y) s^T),
    written as H + s w^T + w s^T, which costs one product and one pass over H.

    Args:
      h: H, symmetric positive definite. (d, d).
      s: (d,).
      y: (d,), with s^T y > 0. With s^T y = 0, H is returned.
    """
    hy = apply(h, y)
    rho = safe_divide(jnp.ones([], h.dtype), s @ y)
    w = 0.5 * (rho**2 * (y @ hy) + rho) * s - rho * hy
    return h + (s[:, None] * w[None, :] + w[:, None] * s[None, :])


def apply(h: jax.Array, x: jax.Array) -> jax.Array:
    """H x, for x of shape (d,) or (d, k)."""
    return h @ x


bfgs = InverseFactor(init, update, apply)
