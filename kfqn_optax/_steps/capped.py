"""The papers' step, and the one whose length in the norm of the preconditioner is bounded."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import inner, safe_divide
from kfqn_optax._steps.rule import StepRule, checked


class CappedState(NamedTuple):
    """State of :func:`capped`.

    Attributes:
      cap: the factor nu <= 1 of the last step. ().
    """

    cap: jax.Array


def capped(kappa: float | None) -> StepRule:
    """nu = min(1, sqrt(kappa / (a^2 <M, D>))): kappa bounds twice the fall that the factors predict.

    Args:
      kappa: positive, in units of the loss; None for nu = 1, the papers' step. With None no batch is left
        out because it is unlike the others, nor bounded in the average of gradients.

    Example:
      >>> import kfqn_optax as kfqn
      >>> kfqn.capped(3.0).init({}).cap
      Array(1., dtype=float32)
    """
    check_constants(step_rule=kappa)

    def init(params):
        del params
        return CappedState(jnp.ones([], jnp.float32))

    def propose(state, proposal):
        if kappa is None:
            return proposal.direction, state
        length = proposal.learning_rate**2 * inner(proposal.average, proposal.direction)
        nu = jnp.where(length > 0, jnp.sqrt(jnp.minimum(safe_divide(kappa, length), 1)), 1)
        step = jax.tree.map(lambda d: (nu * d).astype(d.dtype), proposal.direction)
        return step, CappedState(jnp.asarray(nu, jnp.float32))

    def review(state, outcome):
        del outcome
        return jnp.ones([]), state

    return StepRule(init, propose, review, guarded=kappa is not None)


def as_rule(step_rule: StepRule | float | None) -> StepRule:
    """A number is the kappa of :func:`capped`, and None the papers' step."""
    return checked(step_rule) if isinstance(step_rule, StepRule) else capped(step_rule)
