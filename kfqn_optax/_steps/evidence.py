"""Whether the values of a loss say anything about its steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._numerics import safe_divide

POOR = 0.375  # where less than this part of the slope is left, `measured` takes ever shorter steps
SHORTER, ALIKE = 8.0, 2.0
MISSED, AGREED = 3, 10
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
      longest: the longest step since the same part of the slope is missing in the change; 0 if the change
        agreed with the slope in the last step. ().
      excess: that part. ().
      missed: in how many steps since then it was missing in one eight times shorter. ().
      agreed: in how many steps one after the other it agreed. ().
      doubt: whether the values are in doubt. ().
    """

    longest: jax.Array
    excess: jax.Array
    missed: jax.Array
    agreed: jax.Array
    doubt: jax.Array

    @classmethod
    def start(cls) -> "Evidence":
        zero, none = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
        return cls(zero, zero, none, none, jnp.asarray(False))


def weighed(
    evidence: Evidence, change: jax.Array, slope: jax.Array, length: jax.Array, known: jax.Array
) -> Evidence:
    """The evidence after one more step.

    Values come into doubt where the loss falls by little of its slope, and the same part of the slope is
    missing after steps became eight times shorter, three times: of a smooth function an eighth of that part
    would be. They are out of doubt after ten steps in which they agree.

    Args:
      change: of the loss along the step.
      slope: what it is to first order, of the same examples. It is to be negative.
      length: of the step, in lengths of the gradient, or of what H makes of it.
      known: whether the change is known, and both are above rounding.
    """
    known = known & (slope < 0) & jnp.isfinite(change)
    ratio = safe_divide(change, slope)
    agrees, excess = ratio >= POOR, 1 - ratio
    alike = (excess < ALIKE * evidence.excess) & (ALIKE * excess > evidence.excess)
    anew = ~alike | (length > evidence.longest)
    longest = jnp.where(agrees, 0, jnp.where(anew, length, evidence.longest))
    before = jnp.where(anew, excess, evidence.excess)
    agreed = jnp.where(agrees, evidence.agreed + 1, 0)
    shorter = (SHORTER * length < longest).astype(jnp.int32)
    missed = jnp.where(agrees | anew, 0, evidence.missed + shorter)
    doubt = (evidence.doubt | (missed >= MISSED)) & (agreed < AGREED)
    new = Evidence(longest.astype(jnp.float32), before.astype(jnp.float32), missed, agreed, doubt)
    return optax.tree.where(known, new, evidence)
