"""The input side of layers whose inputs are one-hot: A is diagonal, and so is H_a."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import all_finite, ema
from kfqn_optax._sides.factor import PairCounts, no_pairs
from kfqn_optax._sides.side import Side


class DiagonalState(NamedTuple):
    """State of the input side of one layer.

    Attributes:
      second_moment: moving average of the diagonal of A. (d,).
      factor: the diagonal of H_a = (A + l_A I)^-1. (d,).
      started: whether a batch has been seen.
      pairs: none are taken; here for the diagnostics.
    """

    second_moment: jax.Array
    factor: jax.Array
    started: jax.Array
    pairs: PairCounts


def diagonal(decay: float) -> Side:
    """H_a = (diag(A) + l_A I)^-1, A <- decay A + (1 - decay) E[a^2], started by the first batch.

    For an embedding A is the frequency of each id, and this is exact; for other layers it leaves out
    what inputs have in common, at a cost linear in the width.

    Args:
      decay: rate of the average.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> kfqn.diagonal(decay=0.9).init(3, jnp.float32).factor
      Array([1., 1., 1.], dtype=float32)
    """
    check_constants(decay=decay)

    def init(dim, dtype):
        ones = jnp.ones(dim, dtype)
        return DiagonalState(jnp.zeros_like(ones), ones, jnp.asarray(False), no_pairs(dtype))

    def apply(state, x):
        return state.factor[:, None] * x

    def averaged(state, statistics):
        squares = statistics.squares
        average = jnp.where(state.started, ema(state.second_moment, squares, decay), squares)
        return average, (statistics.rows > 0) & all_finite(squares)

    def scale(state, statistics):
        average, good = averaged(state, statistics)
        return jnp.where(good, average, state.second_moment).mean()

    def observe(state, statistics, damping):
        average, good = averaged(state, statistics)
        return state._replace(
            second_moment=jnp.where(good, average, state.second_moment),
            factor=jnp.where(good, 1 / (average + damping), state.factor),
            started=state.started | good,
        )

    return Side(init, apply, observe, scale=scale, second_pass=False)
