"""What batches usually are like, so that one which is far from it can be left out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._numerics import OUTLIER, ema, inner, select
from kfqn_optax._steps.rule import Outcome

RISE, FALL = 0.9, 0.99


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

    @classmethod
    def start(cls, params: ArrayTree) -> "UsualState":
        zero = jnp.zeros([], jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        return cls(Sizes(zero, zero, zero), jnp.zeros([], jnp.int32))


Usual = UsualState | tuple[()]  # empty where batches far from what is usual are not looked for


def look(state: Usual, curvature: Curvature, grads: ArrayTree, sane: jax.Array) -> tuple[Usual, jax.Array]:
    """What is usual after this batch, and whether the batch is both ``sane`` and not far from it."""
    if not isinstance(state, UsualState):
        return (), sane
    dtype = state.sizes.loss.dtype
    sizes = jax.tree.map(lambda size: size.astype(dtype), sizes_of(curvature, grads))
    state, outlier = observe(state, sizes, sane)
    return state, sane & ~outlier


def kept(before: Usual, after: Usual, accept: jax.Array) -> Usual:
    """A step left out changes nothing of it, but for an outlier: a lasting change is followed."""
    if not isinstance(before, UsualState) or not isinstance(after, UsualState):
        return ()
    return select(accept | (after.outliers > before.outliers), after, before)


def far(state: Usual, outcome: Outcome) -> jax.Array:
    """Whether the loss after the step is far above that before."""
    if not isinstance(state, UsualState):
        return jnp.asarray(False)
    most = OUTLIER * jnp.maximum(state.sizes.loss, jnp.abs(outcome.value))
    return outcome.known & (outcome.value_after - outcome.value > most)


def sizes_of(curvature: Curvature, grads: ArrayTree) -> Sizes:
    squares = (statistics.squares.sum() for statistics in curvature.statistics.values())
    inputs = sum(squares, start=jnp.zeros([]))
    return Sizes(jnp.abs(curvature.value), jnp.sqrt(inner(grads, grads)), inputs)


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
