"""The output side of K-BFGS with several pairs a step: one of each of equal parts of the batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import add_diagonal, all_finite, ema
from kfqn_optax._sides import bfgs as _bfgs
from kfqn_optax._sides.factor import PairCounts, no_pairs, take_pair
from kfqn_optax._sides.hessian_action import EMPTY, GIVEN, RUNNING
from kfqn_optax._sides.secant import DampingRule
from kfqn_optax._sides.side import Side


class GroupSecantState(NamedTuple):
    """State of the output side of one layer.

    Attributes:
      s: for each group the average of its change of the mean pre-activations. (groups, d).
      y: for each group the average of its change of the pre-activation gradient. (groups, d).
      factor: H_g. (d, d).
      phase: 2 once H_g has started, 0 before.
      pairs: what became of the pairs.
    """

    s: jax.Array
    y: jax.Array
    factor: jax.Array
    phase: jax.Array
    pairs: PairCounts


def group_secant(
    rule: DampingRule, decay: float, mu1: float, groups: int = 1, start: str = "identity"
) -> Side:
    """H_g takes one damped pair of each of ``groups`` equal parts of the batch in each step:

    s_b <- decay s_b + (1 - decay) (h_b+ - h_b),  y_b <- decay y_b + (1 - decay) (g_b+ - g_b),  gate g,

    with h_b the mean pre-activation over part b and g_b the mean of its per-example gradients, + after
    the step. The pairs are damped and taken one after the other, each with the H_g that the one before
    it left: as one block their K = S^T Y is seldom positive definite. With one group and the start at I
    this is :func:`secant`.

    Args:
      rule: the damping rule, for example ``dp_dlm``; its second constant is l_G.
      decay: rate of the averages.
      mu1: first constant of the rule.
      groups: how many pairs; the same number as for ``value_and_grad(..., groups=...)``.
      start: ``"identity"``: H_g starts at I. ``"gradients"``: at (G + l_G I)^-1, G the second moment of
        the first batch's per-example gradients.

    Example:
      >>> import kfqn_optax as kfqn, jax.numpy as jnp
      >>> side = kfqn.group_secant(kfqn.dp_dlm, decay=0.9, mu1=0.2, groups=5)
      >>> side.init(2, jnp.float32).s.shape
      (5, 2)

    Source: the pair is that of Goldfarb, Ren, Bahamou 2020, Algorithm 1; groups and start are not in the
    paper.
    """
    check_constants(decay=decay, mu1=mu1, groups=groups)
    if start not in ("identity", "gradients"):
        raise ValueError(f"kfqn: start={start!r}, but it must be 'identity' or 'gradients'.")
    groups, by_gradients = int(groups), start == "gradients"

    def init(dim, dtype):
        zeros = jnp.zeros((groups, dim), dtype)
        phase = jnp.full([], EMPTY if by_gradients else RUNNING, jnp.int32)
        return GroupSecantState(zeros, zeros, _bfgs.init(dim, dtype), phase, no_pairs(dtype))

    def apply(state, x):
        return state.factor @ x

    def observe(state, statistics, damping):
        """G waits in the place of H_g for ``begin``, which is called in the same step."""
        del damping
        moment = statistics.grad_moment
        if moment is None:
            raise ValueError(
                "kfqn: start='gradients' needs the second moment of the gradients, which this batch's"
                " statistics lack: kfqn.value_and_grad(..., forward=...) does not measure it. Leave start"
                " at 'identity'."
            )
        good = (state.phase == EMPTY) & (statistics.rows > 0) & all_finite(moment)
        return state._replace(
            factor=jnp.where(good, moment, state.factor), phase=jnp.where(good, GIVEN, state.phase)
        )

    def starting(state):
        return state.phase == GIVEN

    def matrix(state, damping):
        return add_diagonal(state.factor, damping)

    def begin(state, inverse):
        good = all_finite(inverse)
        started = jnp.where(good, inverse, jnp.eye(*inverse.shape, dtype=inverse.dtype))
        return state._replace(
            factor=jnp.where(starting(state), started, state.factor),
            phase=jnp.where(starting(state), jnp.where(good, RUNNING, EMPTY), state.phase),
        )

    def update(state, before, after, damping):
        ds, dy, seen = _changes(before, after, groups)
        finite = jnp.isfinite(ds).all(1) & jnp.isfinite(dy).all(1)
        valid = finite & seen & (state.phase == RUNNING)
        s = jnp.where(valid[:, None], ema(state.s, ds, decay), state.s)
        y = jnp.where(valid[:, None], ema(state.y, dy, decay), state.y)

        def take(carry: tuple[Any, PairCounts], pair: tuple[jax.Array, jax.Array, jax.Array]):
            factor, counts, _ = take_pair(
                _bfgs.bfgs,
                *carry,
                pair[:2],
                gate=before.preactivation_grads,
                valid=pair[2],
                rule=lambda s, y, hy: rule(s, y, hy, mu1, damping),
            )
            return (factor, counts), None

        (factor, pairs), _ = jax.lax.scan(take, (state.factor, state.pairs), (s, y, valid))
        return state._replace(s=s, y=y, factor=factor, pairs=pairs)

    if by_gradients:
        return Side(init, apply, observe, starting, matrix, begin, update=update)
    return Side(init, apply, update=update)


def _changes(before: Any, after: Any, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h+ - h and g+ - g of each group, and whether both ends have seen rows of it."""
    if groups == 1:
        ds = after.preactivations - before.preactivations
        dy = after.preactivation_grads - before.preactivation_grads
        return ds[None], dy[None], ((before.rows > 0) & (after.rows > 0))[None]
    rows = before.part_rows
    measured = 1 if rows is None else rows.shape[0]
    if rows is None or measured != groups:
        raise ValueError(
            f"kfqn: the optimizer was made with groups={groups}, but the curvature has statistics of"
            f" {measured}. Give kfqn.value_and_grad(loss_fn, layers, groups={groups})."
        )
    seen = (before.rows > 0) & (rows > 0) & (after.part_rows > 0)
    ds = after.part_preactivations - before.part_preactivations
    return ds, after.part_grads - before.part_grads, seen
