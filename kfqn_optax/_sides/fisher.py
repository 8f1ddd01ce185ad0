"""The sides of K-FAC: damped inverses of the Kronecker factors of the Fisher or Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import OUTLIER, add_diagonal, all_finite, ema, safe_divide
from kfqn_optax._sides import bfgs
from kfqn_optax._sides.factor import PairCounts, no_pairs
from kfqn_optax._sides.side import Side

FLOOR = 1e-6
EVERY_STEP_AT_FIRST = 3


class FisherState(NamedTuple):
    """State of one side of one layer.

    Attributes:
      second_moment: moving average of A, or of G; its diagonal in :func:`fisher_diagonal`. (d, d) or (d,).
      factor: the inverse of it plus damping, as of the last time it was computed. (d, d) or (d,).
      count: batches seen.
      pairs: none are taken; ``damped`` counts the batches that were scaled down, ``skipped`` the batches
        whose second moment was not finite, and the inverses that were not finite or not positive.
    """

    second_moment: jax.Array
    factor: jax.Array
    count: jax.Array
    pairs: PairCounts


def fisher(moment_of: Callable[[Statistics], Any], decay: float, inverse_every: int) -> Side:
    """H = (S + l I)^-1 with S <- b S + (1 - b) S of the batch, b = min(decay, 1 - 1/k) at batch k.

    So S is the plain mean of the first batches. The inverse is computed in the first three steps, and
    then every ``inverse_every``. l is at least 1e-6 of the trace of S, for the sake of the Cholesky
    factorisation. The statistics are those of ``curvature.factor_statistics``; a batch's with a trace above
    ten times that of S is scaled down to it, so that S forgets an outlier in a few batches, and follows a
    lasting change nearly as fast.

    Args:
      moment_of: which statistic S is: A, the second moment of inputs, or G, that of the pre-activation
        gradients.
      decay: rate of the average.
      inverse_every: steps from one inverse to the next.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> side = kfqn.fisher(lambda statistics: statistics.grad_moment, decay=0.9, inverse_every=20)
      >>> side.init(3, jnp.float32).second_moment.shape
      (3, 3)

    Source: Martens, Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature", arXiv 1503.05671.
    """
    check_constants(decay=decay, inverse_every=inverse_every)

    def init(dim, dtype):
        moment = jnp.zeros((dim, dim), dtype)
        return FisherState(moment, bfgs.init(dim, dtype), jnp.zeros([], jnp.int32), no_pairs(dtype))

    def apply(state, x):
        return state.factor @ x

    scale, average = _averages(moment_of, decay, jnp.diagonal)

    def observe(state, statistics, damping):
        del damping
        return average(state, statistics)

    def starting(state):
        """Also where no batch was usable yet: the inverse of S = 0 is that of the damping alone."""
        due = (state.count <= EVERY_STEP_AT_FIRST) | (state.count % inverse_every == 0)
        return due & ((state.count > 0) | (state.pairs.counts[2] > 0))

    def matrix(state, damping):
        floor = FLOOR * jnp.trace(state.second_moment)
        return add_diagonal(state.second_moment, jnp.maximum(damping, floor))

    def start(state, inverse):
        diagonal = jnp.diagonal(inverse)
        due, usable = starting(state), all_finite(diagonal) & (diagonal > 0).all()
        counts = state.pairs.counts.at[2].add((due & ~usable).astype(jnp.int32))
        return state._replace(
            factor=jnp.where(due & usable, inverse, state.factor),
            pairs=state.pairs._replace(counts=counts),
        )

    return Side(
        init, apply, observe, starting, matrix, start, scale=scale, of_factors=True, second_pass=False
    )


def fisher_diagonal(squares_of: Callable[[Statistics], Any], decay: float) -> Side:
    """:func:`fisher` for a side too long for a square: of S its diagonal alone, in the same average.

    Its trace is that of S, and so are the scale by which the damping is split and the units of H. H follows
    the damping in each step in which the side sees a batch.

    Args:
      squares_of: which statistic the diagonal of S is.
      decay: rate of the average.
    """

    def init(dim, dtype):
        zeros = jnp.zeros(dim, dtype)
        return FisherState(zeros, jnp.ones_like(zeros), jnp.zeros([], jnp.int32), no_pairs(dtype))

    def apply(state, x):
        return state.factor[:, None] * x

    scale, average = _averages(squares_of, decay, lambda squares: squares)

    def observe(state, statistics, damping):
        new = average(state, statistics)
        damped = new.second_moment + jnp.maximum(damping, FLOOR * new.second_moment.sum())
        return new._replace(factor=jnp.where(statistics.rows > 0, 1 / damped, state.factor))

    return Side(init, apply, observe, scale=scale, of_factors=True, second_pass=False)


def _averages(
    moment_of: Callable[[Statistics], Any], decay: float, diagonal_of: Callable[[jax.Array], jax.Array]
) -> tuple[
    Callable[[FisherState, Statistics], jax.Array], Callable[[FisherState, Statistics], FisherState]
]:
    """``scale`` of a side, and the state after S has taken a batch, for a statistic with this diagonal."""

    def averaged(state, old, new):
        seen = (state.count + 1).astype(old.dtype)
        return ema(old, new, jnp.minimum(decay, 1 - 1 / seen).astype(old.dtype))

    def believed(state, moment):
        """The part of a batch's moment that is taken, by its trace."""
        most, trace = OUTLIER * diagonal_of(state.second_moment).sum(), diagonal_of(moment).sum()
        return jnp.where((most > 0) & (trace > most), safe_divide(most, trace), 1)

    def scale(state, statistics):
        """The mean diagonal element that S is about to have."""
        moment = _moment(moment_of, statistics)
        old, new = diagonal_of(state.second_moment).mean(), diagonal_of(moment).mean()
        good = (statistics.rows > 0) & jnp.isfinite(new)
        return jnp.where(good, averaged(state, old, believed(state, moment) * new), old)

    def average(state, statistics):
        """A second moment with a bad element has one in that row's diagonal too."""
        moment = _moment(moment_of, statistics)
        good = (statistics.rows > 0) & all_finite(diagonal_of(moment))
        part = believed(state, moment)
        new = averaged(state, state.second_moment, part * moment)
        bad = (statistics.rows > 0) & ~good
        seen = jnp.stack([jnp.zeros_like(bad), good & (part < 1), bad])
        counts = state.pairs.counts + seen.astype(jnp.int32)
        return state._replace(
            second_moment=jnp.where(good, new, state.second_moment),
            count=state.count + good.astype(jnp.int32),
            pairs=state.pairs._replace(counts=counts),
        )

    return scale, average


def _moment(moment_of: Callable[[Statistics], Any], statistics: Statistics) -> jax.Array:
    moment = moment_of(statistics)
    if moment is not None:
        return moment
    if statistics.squares is None and statistics.grad_squares is None:
        raise ValueError(
            "kfqn.fisher: this batch's statistics have no second moment of the gradients, which"
            " kfqn.value_and_grad(..., forward=...) does not measure unless the loss marks its outputs:"
            ' kfqn.outputs(residual, "normal").'
        )
    raise ValueError(
        "kfqn.fisher: this batch's statistics have no such second moment: the side is longer than the"
        " max_dim of kfqn.find_layers, or it is that of the inputs of an embedding or of a convolution with"
        " long patches. Raise that max_dim, or give the layer another side: where layer.slot_shapes has no"
        ' "second_moment", kfqn.diagonal for inputs.'
    )
