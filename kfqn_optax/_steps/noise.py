"""How much of what a step wins on its batch is noise, as the batches after it show."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._numerics import ema, safe_divide

FORGET = 0.9


class Noise(NamedTuple):
    """What steps won on their own batches, and what the next batches have lost again.

    Attributes:
      after: the loss of the last batch after its step.
      fall: by how much that was below the loss before; 0 where that is not known of a whole step.
      won: moving average of ``fall``, without the last one.
      lost: moving average of how far the next batch's loss, before its step, was above ``after``.
    """

    after: jax.Array
    fall: jax.Array
    won: jax.Array
    lost: jax.Array

    @classmethod
    def start(cls, dtype: Any) -> "Noise":
        """In the dtype of the parameters: in float32 rounding would show in steps of float64."""
        zero = jnp.zeros([], dtype)
        return cls(zero, zero, zero, zero)

    @property
    def part(self) -> jax.Array:
        """From 0, where the next batch has all that a step has won, to 1, where it has nothing of it."""
        return jnp.clip(safe_divide(self.lost, self.won), 0, 1)


def followed(noise: Noise, value: jax.Array, change: jax.Array, whole: jax.Array) -> Noise:
    """With one more batch, of loss ``value``, which a step changes by ``change`` if ``whole`` is made.

    The fall counts for no more than ``value``: the loss of an outlier is bounded, and so is what it wins.
    """
    lost = jnp.where(noise.fall > 0, value - noise.after, 0)
    fall = jnp.where(whole, jnp.clip(-change, 0, jnp.abs(value)), 0)
    return Noise(value - fall, fall, ema(noise.won, noise.fall, FORGET), ema(noise.lost, lost, FORGET))


def followed_by_slopes(noise: Noise, lost: jax.Array, fall: jax.Array) -> Noise:
    """The same where the loss's values are in doubt.

    Args:
      lost: the slope along the last step, at its end, of this batch above that of its own batch.
      fall: what the model promises of this step on its own batch.
    """
    lost = jnp.where(noise.fall > 0, lost, 0)
    return Noise(noise.after, fall, ema(noise.won, noise.fall, FORGET), ema(noise.lost, lost, FORGET))
