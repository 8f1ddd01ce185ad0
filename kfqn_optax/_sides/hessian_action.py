"""The input side of K-BFGS: BFGS on pairs made by the action of A + l_A I ("Hessian-action BFGS")."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import add_diagonal, all_finite, ema
from kfqn_optax._sides import bfgs as _bfgs
from kfqn_optax._sides.factor import PairCounts, no_pairs, take_pair
from kfqn_optax._sides.side import Side

EMPTY, GIVEN, RUNNING = 0, 1, 2


class HessianActionState(NamedTuple):
    """State of the input side of one layer.

    Attributes:
      second_moment: A, moving average of the second moment of the homogeneous inputs. (d, d).
      factor: H_a, approximate inverse of A + l_A I. (d, d).
      phase: 0 before any A, 1 when A is there and H_a is not its inverse yet, 2 from then on.
      pairs: what became of the pairs.
    """

    second_moment: jax.Array
    factor: jax.Array
    phase: jax.Array
    pairs: PairCounts


def hessian_action(decay: float) -> Side:
    """H_a starts as (A + l_A I)^-1 and follows A by one BFGS update a step, with the pair

    s = H_a a_bar,  y = (A + l_A I) s,  gate a_bar,

    where A <- decay A + (1 - decay) E[a a^T]. The first batch starts A, unless a warm start gave it:
    then the first batch is left out, as in the authors' program. Where rounding has made
    H_a indefinite, it is the inverse again in the next step.

    Args:
      decay: rate of the average.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> kfqn.hessian_action(decay=0.9).init(3, jnp.float32).second_moment.shape
      (3, 3)

    Source: Goldfarb, Ren, Bahamou 2020, Section 3.2.
    """
    check_constants(decay=decay)

    def init(dim, dtype):
        zeros, empty = jnp.zeros((dim, dim), dtype), jnp.full([], EMPTY, jnp.int32)
        return HessianActionState(zeros, _bfgs.init(dim, dtype), empty, no_pairs(dtype))

    def apply(state, x):
        return state.factor @ x

    def observe(state, statistics, damping):
        del damping
        moment = statistics.second_moment
        average = jnp.where(state.phase == EMPTY, moment, state.second_moment)
        average = jnp.where(state.phase == RUNNING, ema(state.second_moment, moment, decay), average)
        good = (statistics.rows > 0) & all_finite(moment)
        return state._replace(
            second_moment=jnp.where(good, average, state.second_moment),
            phase=jnp.where(good & (state.phase == EMPTY), GIVEN, state.phase),
        )

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

    def update(state, before, after, damping):
        del after
        s = state.factor @ before.inputs
        y = state.second_moment @ s + damping * s
        valid = (before.rows > 0) & (state.phase == RUNNING)
        factor, pairs, indefinite = take_pair(
            _bfgs.bfgs, state.factor, state.pairs, (s, y), gate=before.inputs, valid=valid
        )
        phase = jnp.where(indefinite, GIVEN, state.phase)
        return state._replace(factor=factor, phase=phase, pairs=pairs)

    return Side(init, apply, observe, starting, matrix, start, update=update)
