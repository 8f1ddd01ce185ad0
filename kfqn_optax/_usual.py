"""What batches usually are like, so that one which is far from it can be left out."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._numerics import ema, inner

OUTLIER, RISE, FALL = 10.0, 0.9, 0.99


class Sizes(NamedTuple):
    """Three numbers of a batch.

    Attributes:
      loss: its magnitude.
      gradient: its norm.
      inputs: the mean squared length of a layer's inputs, summed over layers.
    """

    loss: jax.Array
    gradient: jax.Array
    inputs: jax.Array


class UsualState(NamedTuple):
    """State of a method that remembers batches.

    Attributes:
      sizes: running means, in which no batch counts for more than ten times as much.
      outliers: how many batches were left out.
    """

    sizes: Sizes
    outliers: jax.Array


def init() -> UsualState:
    zero = jnp.zeros([], jnp.float32)
    return UsualState(Sizes(zero, zero, zero), jnp.zeros([], jnp.int32))


def sizes_of(value: jax.Array, grads: ArrayTree, statistics: Iterable[Statistics]) -> Sizes:
    inputs = sum((s.squares.sum() for s in statistics), start=jnp.zeros([]))
    found = Sizes(jnp.abs(value), jnp.sqrt(inner(grads, grads)), inputs)
    return jax.tree.map(lambda size: jnp.asarray(size, jnp.float32), found)


def observe(state: UsualState, now: Sizes, good: jax.Array) -> tuple[UsualState, jax.Array]:
    """The state after a batch, if that is ``good``, and whether the batch is an outlier.

    That is one of which a size is more than ten times the mean. The means rise at once, so that a lasting
    change is followed: in each batch they nearly double. They fall slowly, so that no gradient which comes
    back after a few small ones is an outlier.
    """
    most = jax.tree.map(lambda usual: jnp.where(usual > 0, OUTLIER * usual, jnp.inf), state.sizes)
    outlier = jnp.stack(jax.tree.map(jnp.greater, now, most)).any()

    def mean(usual, size, most):
        new = ema(usual, jnp.minimum(size, most), jnp.where(size > usual, RISE, FALL))
        new = jnp.where(usual > 0, new, size)
        return jnp.where(good, new, usual)

    means = jax.tree.map(mean, state.sizes, now, most)
    return UsualState(means, state.outliers + (good & outlier)), outlier
