"""Whether the values of a loss say anything about its steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._numerics import safe_divide

POOR = 0.375  # where less than this part of the slope is left, `measured` takes ever shorter steps
SHORTER, ALIKE = 8.0, 2.0
AGREED = 10
SURE = 4  # times its rounding a change must be, or its ratio to another is not known to a quarter


def rounding(value: jax.Array, other: jax.Array) -> jax.Array:
    """By how much two values of a loss may differ without any change."""
    return 4 * jnp.finfo(value.dtype).eps * (jnp.abs(value) + jnp.abs(other))


class Evidence(NamedTuple):
    """Whether the values of the loss are those of a function whose slope the gradient is.

    The shorter a step is, the nearer is the change of such a function to its slope along the step. A loss
    that is divided by its own stopped value, or whose targets are its own stopped outputs, changes by
    another multiple of the slope however short the step is. Its values are no reason to shorten steps.

    Attributes:
      longest: the longest step, in lengths of the gradient, since the same part of the slope is missing in
        the change; 0 if the change agreed with the slope in the last step. ().
      excess: that part. ().
      agreed: in how many steps one after the other it agreed. ().
      doubt: whether the values are in doubt. ().
    """

    longest: jax.Array
    excess: jax.Array
    agreed: jax.Array
    doubt: jax.Array

    @classmethod
    def start(cls) -> "Evidence":
        zero = jnp.zeros([], jnp.float32)
        return cls(zero, zero, jnp.zeros([], jnp.int32), jnp.asarray(False))


def weighed(
    evidence: Evidence, change: jax.Array, slope: jax.Array, square: jax.Array, known: jax.Array
) -> Evidence:
    """The evidence after one more step.

    Values come into doubt where the loss falls by little of its slope, and the same part of the slope is
    missing after steps became eight times shorter in lengths of the gradient: of a smooth function an
    eighth of that part would be. They are out of doubt after ten steps in which they agree.

    Args:
      change: of the loss along the step.
      slope: what it is to first order, of the same examples. It is to be negative.
      square: the squared length of the step.
      known: whether the change is known, and both are above rounding.
    """
    known = known & (slope < 0) & jnp.isfinite(change)
    ratio, length = safe_divide(change, slope), safe_divide(square, -slope)
    agrees, excess = ratio >= POOR, 1 - ratio
    alike = (excess < ALIKE * evidence.excess) & (ALIKE * excess > evidence.excess)
    anew = ~alike | (length > evidence.longest)
    longest = jnp.where(agrees, 0, jnp.where(anew, length, evidence.longest))
    before = jnp.where(anew, excess, evidence.excess)
    agreed = jnp.where(agrees, evidence.agreed + 1, 0)
    doubt = evidence.doubt | (~agrees & (SHORTER * length < longest))
    new = Evidence(
        longest.astype(jnp.float32), before.astype(jnp.float32), agreed, doubt & (agreed < AGREED)
    )
    return optax.tree.where(known, new, evidence)
