"""What batches usually are like, so that one which is far from it can be left out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import Params as ArrayTree

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._capture.layers import Layers
from kfqn_optax._numerics import OUTLIER, ema, inner, safe_divide

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
    """What is kept about batches.

    Attributes:
      sizes: running means, in which no batch counts for more than ten times as much.
      outliers: how many batches were far from them.
    """

    sizes: Sizes
    outliers: jax.Array

    @classmethod
    def start(cls, params: ArrayTree) -> "UsualState":
        zero = jnp.zeros([], jnp.result_type(jnp.float32, *jax.tree.leaves(params)))
        return cls(Sizes(zero, zero, zero), jnp.zeros([], jnp.int32))


def look(
    state: UsualState,
    curvature: Curvature,
    present: Layers,
    grads: ArrayTree,
    sane: jax.Array,
    leave_out: bool,
) -> tuple[UsualState, jax.Array]:
    """What is usual after this batch, and whether the batch is to be learnt from.

    It is if it is ``sane`` and not far from what is usual; or just counted if it is and not ``leave_out``:
    then by its loss and gradient alone, for its inputs may not be measured.
    """
    dtype = state.sizes.loss.dtype
    inputs = _inputs(curvature, present) if leave_out else jnp.zeros([])
    found = Sizes(jnp.abs(curvature.value), jnp.sqrt(inner(grads, grads)), inputs)
    state, outlier = observe(state, jax.tree.map(lambda size: size.astype(dtype), found), sane)
    return state, sane & ~outlier if leave_out else sane


def kept(before: UsualState, after: UsualState, accept: jax.Array) -> UsualState:
    """A step left out changes nothing of it, but for an outlier: a lasting change is followed."""
    return optax.tree.where(accept | (after.outliers > before.outliers), after, before)


def believed(state: UsualState, grads: ArrayTree) -> jax.Array:
    """The part of a gradient that an average takes: no more of it than ten times the usual length."""
    most, length = OUTLIER * state.sizes.gradient, jnp.sqrt(inner(grads, grads))
    return jnp.where((most > 0) & (length > most), safe_divide(most, length), 1)


def far(state: UsualState, value: jax.Array, value_after: jax.Array, known: jax.Array) -> jax.Array:
    """Whether the loss after the step, where it is known, is far above that before."""
    most = OUTLIER * jnp.maximum(state.sizes.loss, jnp.abs(value))
    return known & (value_after - value > most)


def _inputs(curvature: Curvature, present: Layers) -> jax.Array:
    squares = (curvature.statistics[layer.name].squares[..., : layer.rows].sum() for layer in present)
    return sum(squares, start=jnp.zeros([]))


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
    count = state.outliers + (good & outlier).astype(state.outliers.dtype)
    return UsualState(means, count), outlier
