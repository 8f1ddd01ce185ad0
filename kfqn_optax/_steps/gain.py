"""The part of a step that is made, as the losses of the batches that come after have it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._steps.evidence import rounding

SHORTER, LONGER, LEAST = 0.7, 1.25, 0.05


class Losses(NamedTuple):
    """The losses of a run of batches, and those of the run before.

    Attributes:
      count, mean: how many there are so far, and their mean.
      squares: the sum of squares of their differences from the mean.
      runs: how many runs are behind.
      before: the mean of the run before.
      error: the square of its standard error.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    runs: jax.Array
    before: jax.Array
    error: jax.Array

    @classmethod
    def start(cls) -> "Losses":
        none, zero = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        return cls(none, zero, zero, none, zero, zero)


def watched(losses: Losses, gain: jax.Array, value: jax.Array, patience: int) -> tuple[Losses, jax.Array]:
    """The losses with that of one more batch, before its step, and the gain for the next.

    A run is of ``patience / gain`` batches: shorter steps take longer to show. After each the gain is
    multiplied by 0.7 if its mean is above that of the run before, and by 1.25 if it is below by more
    than a standard error; between 0.05 and 1.
    """
    count = losses.count + 1
    batches = count.astype(losses.mean.dtype)
    mean = losses.mean + (value - losses.mean) / batches
    squares = losses.squares + (value - losses.mean) * (value - mean)
    error = squares / jnp.square(batches)
    rise = jnp.where(losses.runs > 0, mean - losses.before, 0)
    factor = jnp.where(rise < -jnp.sqrt(error + losses.error), LONGER, 1)
    factor = jnp.where(rise > rounding(mean, losses.before), SHORTER, factor)
    full = batches >= patience / gain
    begun = losses._replace(count=count, mean=mean, squares=squares)
    next_run = Losses.start()._replace(runs=losses.runs + 1, before=mean, error=error)
    return optax.tree.where(full, next_run, begun), jnp.where(full, jnp.clip(gain * factor, LEAST, 1), gain)
