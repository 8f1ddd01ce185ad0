"""The inverse factor of limited-memory BFGS, in compact form."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import one_by_one
from kfqn_optax._sides.factor import InverseFactor


class LbfgsState(NamedTuple):
    """The last pairs, oldest first, in the last rows of buffers of fixed size; the rest is zeros.

    Attributes:
      s: (memory, d).
      y: (memory, d).
      scale: gamma, with H = gamma I before any pair. ().
    """

    s: jax.Array
    y: jax.Array
    scale: jax.Array


def update(state: LbfgsState, s: jax.Array, y: jax.Array) -> LbfgsState:
    """The newest pair in, the oldest out. s, y: (d,), with s^T y > 0."""
    return state._replace(
        s=jnp.roll(state.s, -1, axis=0).at[-1].set(s), y=jnp.roll(state.y, -1, axis=0).at[-1].set(y)
    )


def apply(state: LbfgsState, x: jax.Array) -> jax.Array:
    """H x, for x of shape (d,) or (d, k), as products of matrices.

    With the pairs as rows of S and Y, R = triu(S Y^T), D = diag(s_i^T y_i) and Q = R^-1 S,
    H = gamma I + Q^T (D + gamma Y Y^T) Q - gamma Q^T Y - gamma Y^T Q.
    Rows of zeros that wait for a pair take no part: theirs is a 1 on the diagonal of R.

    Source: Byrd, Nocedal, Schnabel 1994, "Representations of quasi-Newton matrices", Theorem 2.2.
    """
    s, y, gamma = state
    products = s @ y.T
    empty = (jnp.diagonal(products) == 0).astype(s.dtype)
    r = jnp.triu(products) + jnp.diag(empty)
    q = _solve(r, s)
    qx, yx = q @ x, y @ x
    middle = jnp.diag(jnp.diagonal(products)) + gamma * (y @ y.T)
    return gamma * x + q.T @ (middle @ qx - gamma * yx) - gamma * (y.T @ qx)


@one_by_one
def _solve(r: jax.Array, s: jax.Array) -> jax.Array:
    """R^-1 S for an upper triangular R."""
    return jax.lax.linalg.triangular_solve(r, s, left_side=True)


def lbfgs(memory: int) -> InverseFactor:
    """A factor that keeps the last ``memory`` pairs: 2 memory d numbers, never a square.

    Args:
      memory: how many pairs; ``ValueError`` below 1.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> factor = kfqn.lbfgs(memory=5)
      >>> s, y = jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0])
      >>> state = factor.update(factor.init(2, jnp.float32, 1.0), s, y)
      >>> factor.apply(state, jnp.array([2.0, 3.0]))  # H y = s, and I elsewhere
      Array([1., 3.], dtype=float32)
    """
    check_constants(memory=memory)

    def init(dim: int, dtype: Any, scale: jax.Array | float = 1.0) -> LbfgsState:
        zeros = jnp.zeros((int(memory), dim), dtype)
        return LbfgsState(zeros, zeros, jnp.asarray(scale, dtype))

    return InverseFactor(init, update, apply)
