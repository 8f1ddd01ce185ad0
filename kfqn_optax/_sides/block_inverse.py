"""Damped inverses of the Kronecker factors of the Fisher matrix that follow them without inverting."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import add_diagonal, all_finite, ema
from kfqn_optax._sides import bfgs as _bfgs
from kfqn_optax._sides.block import take_block
from kfqn_optax._sides.factor import PairCounts, no_pairs
from kfqn_optax._sides.hessian_action import EMPTY, GIVEN, RUNNING
from kfqn_optax._sides.side import Side


class BlockInverseState(NamedTuple):
    """State of one side of one layer.

    Attributes:
      second_moment: moving average of A, or of G. (d, d).
      factor: H, approximate inverse of it plus damping. (d, d).
      phase: as in :class:`HessianActionState`.
      count: batches seen; the random directions are a function of it.
      pairs: what became of the pairs, ``directions`` in each step.
    """

    second_moment: jax.Array
    factor: jax.Array
    phase: jax.Array
    count: jax.Array
    pairs: PairCounts


def block_inverse(
    moment_of: Callable[[Statistics], Any], decay: float, directions: int = 32, exact_start: bool = True
) -> Side:
    """H follows (S + l I)^-1 by one block BFGS update a step, with no inverse but at the start:

    Y = (S + l I) V,  H <- bfgs(H, V, Y),  so that H (S + l I) V = V,

    with V of random normal columns and S <- decay S + (1 - decay) S of the batch; the first batch starts
    S. A step costs three products of S's size and width ``directions`` and one Cholesky factor of that
    width, and follows a changing l as it follows S. Directions H V in the place of V follow a drifting S
    less closely, and cost a product more.

    Args:
      moment_of: which statistic S is: A, the second moment of inputs, or G, that of the per-example
        pre-activation gradients.
      decay: rate of the average.
      directions: width of V; a shorter side takes its length, and then H is the inverse.
      exact_start: start at (S + l I)^-1, one inverse in all. Otherwise at I over the mean diagonal
        element of S + l I, without any, from which the way to the inverse takes about
        dim / directions steps or more.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> side = kfqn.block_inverse(lambda statistics: statistics.second_moment, decay=0.9, directions=8)
      >>> side.init(3, jnp.float32).factor.shape
      (3, 3)

    Source: Gower, Richtarik 2017, "Randomized quasi-Newton updates are linearly convergent matrix
    inversion algorithms", arXiv 1602.01768, for a fixed matrix.
    """
    check_constants(decay=decay, directions=directions)

    def init(dim, dtype):
        moment, zero = jnp.zeros((dim, dim), dtype), jnp.zeros([], jnp.int32)
        return BlockInverseState(moment, _bfgs.init(dim, dtype), zero + EMPTY, zero, no_pairs(dtype))

    def apply(state, x):
        return state.factor @ x

    def observe(state, statistics, damping):
        moment = moment_of(statistics)
        if moment is None:
            raise ValueError(
                "kfqn.block_inverse: this batch's statistics have no such second moment. A layer whose"
                " side is too long has none; that of the gradients is not measured with"
                " kfqn.value_and_grad(..., forward=...)."
            )
        average = jnp.where(state.phase == EMPTY, moment, ema(state.second_moment, moment, decay))
        good = (statistics.rows > 0) & all_finite(moment)
        fresh = state._replace(second_moment=average, count=state.count + 1)
        running = _follow(fresh, damping, int(directions))
        started = fresh._replace(phase=jnp.full_like(state.phase, GIVEN))
        if not exact_start:
            scale = 1 / (jnp.diagonal(average).mean() + damping)
            started = started._replace(
                factor=_bfgs.init(moment.shape[0], moment.dtype, scale),
                phase=jnp.full_like(state.phase, RUNNING),
            )
        return optax.tree.where(good, optax.tree.where(state.phase == RUNNING, running, started), state)

    def starting(state):
        return state.phase == GIVEN

    def matrix(state, damping):
        return add_diagonal(state.second_moment, damping)

    def start(state, inverse):
        good = starting(state) & all_finite(inverse)
        return state._replace(
            factor=jnp.where(good, inverse, state.factor),
            phase=jnp.where(good, RUNNING, state.phase),
        )

    if exact_start:
        return Side(init, apply, observe, starting, matrix, start, of_factors=True, second_pass=False)
    return Side(init, apply, observe, of_factors=True, second_pass=False)


def _follow(state: BlockInverseState, damping: jax.Array, directions: int) -> BlockInverseState:
    """One block update of H towards the inverse of S + damping I."""
    moment, h = state.second_moment, state.factor
    width = min(directions, h.shape[0])
    key = jax.random.fold_in(jax.random.key(0), state.count)
    s = jax.random.normal(key, (h.shape[0], width), h.dtype)
    y = moment @ s + damping * s
    factor, pairs = take_block(h, state.pairs, s, y, jnp.ones(width, bool))
    return state._replace(factor=factor, pairs=pairs)
