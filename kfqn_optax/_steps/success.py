"""A damping that follows the success of a model (Levenberg and Marquardt)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

GOOD, POOR, FAILED = 0.75, 0.25, 0.1
START, FIRST = 10.0, 2
LOWER, FASTER = 1e-4, 3


class Success(NamedTuple):
    """How the damping, as a multiple of the given one, follows; the settings of :func:`quadratic`."""

    every: int
    rate: float
    floor: float
    ceiling: float

    @property
    def start(self) -> float:
        return 1.0 if self.rate == 1 else min(max(START, self.floor), self.ceiling)

    def after(
        self,
        scale: jax.Array,
        count: jax.Array,
        ratio: jax.Array,
        share: jax.Array,
        plateau: jax.Array,
        noisy: jax.Array,
    ) -> jax.Array:
        """The scale after a step.

        Args:
          scale: before it.
          count: steps, this one included.
          ratio: actual over predicted change of the loss.
          share: the part of the step that is made.
          plateau: whether the model promises hardly anything: then it is the damping that holds the steps.
          noisy: 0 to 1, where all that steps win on their own batches is noise: the least is 1 there.
        """
        notch = self.rate**self.every
        less = jnp.where(plateau, notch**FASTER, notch)
        factor = jnp.where(ratio > GOOD, less, jnp.where(ratio < POOR, 1 / notch, 1.0))
        due = (count % self.every == 0) | ((count == FIRST) & (ratio > GOOD)) | (share < FAILED)
        least = jnp.where(plateau, LOWER * self.floor, self.floor)
        least = least + noisy * jnp.maximum(1 - least, 0)
        return jnp.where(due, jnp.clip(scale * factor, least, self.ceiling), scale)
