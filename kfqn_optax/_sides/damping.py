"""Damping of curvature pairs: bare functions of one signature.

A rule takes a pair (s, y), the product H y with the current inverse factor, and two constants; it
returns the pair to use. The pair it is given is not changed by it elsewhere: averages of pairs keep the
undamped values.
"""

import jax
import jax.numpy as jnp

from kfqn_optax._numerics import safe_divide


def double_damping(
    s: jax.Array, y: jax.Array, hy: jax.Array, mu1: float | jax.Array, mu2: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Double damping (DD): the returned pair has s^T y >= mu1 y^T H y and s^T y >= mu2 s^T s.

    First Powell's damping on H: with q = y^T H y and s^T y <= mu1 q,
    s <- th s + (1 - th) H y, th = (1 - mu1) q / (q - s^T y). Then on the identity: with
    s^T y <= mu2 s^T s, y <- th y + (1 - th) s, th = (1 - mu2) s^T s / (s^T s - s^T y), a convex
    combination for mu2 <= 1; at mu2 = 1 it is y = s. Above 1, where it would not be convex,
    y <- y + (mu2 - s^T y / s^T s) s instead: the curvature along s is raised no further than mu2, and
    the rest of y kept. The two do not meet at mu2 = 1.

    Args:
      s: change of the mean pre-activations. (d,).
      y: change of the pre-activation gradient. (d,).
      hy: H y. (d,).
      mu1: first constant, in (0, 1).
      mu2: second constant, square root of the damping.

    Returns:
      The damped s and y. The first inequality holds for the y given, the second for the pair returned.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> s, y = jnp.array([1.0, 0.0]), jnp.array([0.1, 0.0])
      >>> kfqn.double_damping(s, y, hy=y, mu1=0.2, mu2=0.5)[1].round(4)  # raised to mu2 s^T s
      Array([0.5, 0. ], dtype=float32)

    Source: Goldfarb, Ren, Bahamou 2020, Algorithm 2, with the constants of the authors' program; what is
    done above mu2 = 1 is not in the paper.
    """
    s = _powell(s, y, hy, mu1)
    ss, sy = s @ s, s @ y
    theta = safe_divide((1 - mu2) * ss, ss - sy)
    combined = theta * y + (1 - theta) * s
    raised = y + (mu2 - safe_divide(sy, ss)) * s
    return s, jnp.where(sy <= mu2 * ss, jnp.where(mu2 <= 1, combined, raised), y)


def _powell(s: jax.Array, y: jax.Array, hy: jax.Array, mu1: float | jax.Array) -> jax.Array:
    q, sy = y @ hy, s @ y
    theta = safe_divide((1 - mu1) * q, q - sy)
    return jnp.where(sy <= mu1 * q, theta * s + (1 - theta) * hy, s)


def dp_dlm(
    s: jax.Array, y: jax.Array, hy: jax.Array, mu1: float | jax.Array, mu2: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Powell's damping and then Levenberg and Marquardt's (D_P D_LM): y <- y + mu2 s after the first.

    As :func:`double_damping` but for its second step, which adds mu2 to the curvature along s whatever
    it is; mu2 > 0 has no upper limit.

    Args:
      s: change of the mean pre-activations. (d,).
      y: change of the pre-activation gradient. (d,).
      hy: H y. (d,).
      mu1: constant of Powell's damping, in (0, 1).
      mu2: l_G, what is added to the curvature.

    Returns:
      The damped s and y, with s^T y >= mu2 s^T s where s^T y was not negative.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> s, y = jnp.array([1.0, 0.0]), jnp.array([0.25, 0.0])
      >>> kfqn.dp_dlm(s, y, hy=y, mu1=0.2, mu2=0.5)[1]
      Array([0.75, 0.  ], dtype=float32)

    Source: Ren, Bahamou, Goldfarb 2021, arXiv 2102.06737.
    """
    s = _powell(s, y, hy, mu1)
    return s, y + mu2 * s
