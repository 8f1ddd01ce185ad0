"""The sides of KFAC, the paper's rival: damped inverses of the Kronecker factors of the Fisher matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import add_diagonal, all_finite, ema
from kfqn_optax._sides import bfgs as _bfgs
from kfqn_optax._sides.factor import PairCounts, no_pairs
from kfqn_optax._sides.hessian_action import EMPTY, RUNNING
from kfqn_optax._sides.side import Side


class FisherState(NamedTuple):
    """State of one side of one layer.

    Attributes:
      second_moment: moving average of A, or of G. (d, d).
      factor: the inverse of it plus damping, as of the last time it was computed. (d, d).
      phase: as in :class:`HessianActionState`.
      count: batches seen.
      pairs: none are taken; here for the diagnostics.
    """

    second_moment: jax.Array
    factor: jax.Array
    phase: jax.Array
    count: jax.Array
    pairs: PairCounts


def fisher(moment_of: Callable[[Statistics], Any], decay: float, inverse_every: int) -> Side:
    """H = (S + l I)^-1 with S <- decay S + (1 - decay) S of the batch; the first batch starts S.

    The inverse is computed in each of the first ``inverse_every`` steps, and then every that many.

    Args:
      moment_of: which statistic S is: A, the second moment of inputs, or G, that of the per-example
        pre-activation gradients.
      decay: rate of the average.
      inverse_every: steps from one inverse to the next.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> side = kfqn.fisher(lambda statistics: statistics.grad_moment, decay=0.9, inverse_every=20)
      >>> side.init(3, jnp.float32).second_moment.shape
      (3, 3)

    Source: Martens, Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature"; the damping is split evenly, l = sqrt(damping), as in Goldfarb, Ren, Bahamou 2020.
    """
    check_constants(decay=decay, inverse_every=inverse_every)

    def init(dim, dtype):
        moment, zero = jnp.zeros((dim, dim), dtype), jnp.zeros([], jnp.int32)
        return FisherState(moment, _bfgs.init(dim, dtype), zero + EMPTY, zero, no_pairs(dtype))

    def apply(state, x):
        return state.factor @ x

    def observe(state, statistics, damping):
        del damping
        moment = moment_of(statistics)
        if moment is None:
            raise ValueError(
                "kfqn.fisher: this batch's statistics have no such second moment. That of the gradients"
                " is not measured with kfqn.value_and_grad(..., forward=...): give it sampled_loss=..."
                " too, a plain loss of the model's outputs."
            )
        average = jnp.where(state.phase == EMPTY, moment, ema(state.second_moment, moment, decay))
        good = (statistics.rows > 0) & all_finite(moment)
        return state._replace(
            second_moment=jnp.where(good, average, state.second_moment),
            phase=jnp.where(good, RUNNING, state.phase),
            count=state.count + good,
        )

    def starting(state):
        due = (state.count <= inverse_every) | (state.count % inverse_every == 0)
        return due & (state.phase == RUNNING)

    def start(state, damping):
        inverse = _bfgs.inverse(add_diagonal(state.second_moment, damping))
        good = starting(state) & all_finite(inverse)
        return state._replace(factor=jnp.where(good, inverse, state.factor))

    return Side(init, apply, observe, starting, start, second_pass=False)
