"""The output side of K-BFGS: quasi-Newton pairs of pre-activations and their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import all_finite, ema
from kfqn_optax._sides.factor import InverseFactor, PairCounts, no_pairs, take_pair
from kfqn_optax._sides.side import Side

DampingRule = Callable[..., tuple[jax.Array, jax.Array]]


class SecantState(NamedTuple):
    """State of the output side of one layer.

    Attributes:
      s: moving average of the change of the mean pre-activations over a step. (d,).
      y: moving average of the change of the pre-activation gradient over a step. (d,).
      factor: H_g.
      pairs: what became of the pairs.
    """

    s: jax.Array
    y: jax.Array
    factor: Any
    pairs: PairCounts


def secant(factor: InverseFactor, rule: DampingRule, decay: float, mu1: float) -> Side:
    """H_g starts as I and takes one damped pair a step, both ends measured on the same batch:

    s <- decay s + (1 - decay) (h+ - h),  y <- decay y + (1 - decay) (g+ - g),  gate g,

    with h the mean pre-activation and g its gradient, + after the step. The averages keep the
    undamped values.

    Args:
      factor: the inverse factor, for example ``bfgs``.
      rule: the damping rule, for example ``double_damping``; its second constant is l_G.
      decay: rate of both averages; 0 for full-batch training.
      mu1: first constant of the rule.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> side = kfqn.secant(kfqn.bfgs, kfqn.double_damping, decay=0.9, mu1=0.2)
      >>> side.init(2, jnp.float32).factor
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Source: Goldfarb, Ren, Bahamou 2020, Algorithm 1.
    """
    check_constants(decay=decay, mu1=mu1)

    def init(dim, dtype):
        zeros = jnp.zeros(dim, dtype)
        return SecantState(zeros, zeros, factor.init(dim, dtype, 1.0), no_pairs(dtype))

    def apply(state, x):
        return factor.apply(state.factor, x)

    def update(state, before, after, damping):
        ds = after.preactivations - before.preactivations
        dy = after.preactivation_grads - before.preactivation_grads
        valid = all_finite((ds, dy)) & (before.rows > 0) & (after.rows > 0)
        s = jnp.where(valid, ema(state.s, ds, decay), state.s)
        y = jnp.where(valid, ema(state.y, dy, decay), state.y)
        new, pairs, _ = take_pair(
            factor,
            state.factor,
            state.pairs,
            (s, y),
            gate=before.preactivation_grads,
            valid=valid,
            rule=lambda s, y, hy: rule(s, y, hy, mu1, damping),
        )
        return SecantState(s, y, new, pairs)

    return Side(init, apply, update=update)
