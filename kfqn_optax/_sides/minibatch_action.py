"""The input side of KF-QN: pairs made by the action of each batch's own A, which is never formed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._numerics import all_finite
from kfqn_optax._sides.factor import InverseFactor, PairCounts, no_pairs, take_pair
from kfqn_optax._sides.side import Side


class MinibatchActionState(NamedTuple):
    """State of the input side of one layer.

    Attributes:
      factor: H_a, approximate inverse of A + l_A I.
      started: whether H_a has been given the scale of the inputs.
      pairs: what became of the pairs.
    """

    factor: Any
    started: jax.Array
    pairs: PairCounts


def minibatch_action(factor: InverseFactor) -> Side:
    """H_a takes one pair a step, A the second moment of the inputs of this batch alone:

    s = H_a a_bar,  y = A s + l_A s,  gate a_bar.

    A s comes from the second pass, where s is known, at a cost linear in the width. H_a starts as a
    multiple of I, the inverse of the mean diagonal element of A + l_A I on the first batch, and starts
    again where rounding has made it indefinite.

    Args:
      factor: the inverse factor, for example ``bfgs``, or ``lbfgs(memory)`` for a long side.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> kfqn.minibatch_action(kfqn.lbfgs(5)).init(1000, jnp.float32).factor.s.shape
      (5, 1000)

    Source: Ren, Bahamou, Goldfarb 2021, "Kronecker-factored quasi-Newton methods for deep learning",
    arXiv 2102.06737, minibatch Hessian-action BFGS; the starting scale is not in the paper.
    """

    def init(dim, dtype):
        return MinibatchActionState(factor.init(dim, dtype, 1.0), jnp.asarray(False), no_pairs(dtype))

    def apply(state, x):
        return factor.apply(state.factor, x)

    def observe(state, statistics, damping):
        scale = 1 / (statistics.squares.mean() + damping)
        dim, dtype = statistics.squares.shape[0], statistics.squares.dtype
        good = (statistics.rows > 0) & jnp.isfinite(scale) & ~state.started
        return state._replace(
            factor=optax.tree.where(good, factor.init(dim, dtype, scale), state.factor),
            started=state.started | good,
        )

    def query(state, statistics):
        return factor.apply(state.factor, statistics.inputs)

    def update(state, before, after, damping):
        s = query(state, before)
        y = after.product + damping * s
        valid = (before.rows > 0) & (after.rows > 0) & state.started & all_finite(y)
        new, pairs, indefinite = take_pair(
            factor, state.factor, state.pairs, (s, y), gate=before.inputs, valid=valid
        )
        return state._replace(factor=new, started=state.started & ~indefinite, pairs=pairs)

    return Side(init, apply, observe, query=query, update=update)
