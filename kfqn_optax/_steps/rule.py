"""What a step rule is: a table of pure functions that say how far a step goes, and with which damping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._returned import check_returned


class Proposal(NamedTuple):
    """What a rule is told before the step.

    Attributes:
      grads: the gradient of the batch, shaped like the parameters: the one given to ``update``, without a
        factor.
      average: the averaged gradient M of which the direction was made; ``grads`` without momentum.
      direction: D = H_a M H_g in each layer. The parameters move against it.
      learning_rate: the learning rate a of this step. ().
      damping: the damping of the rule. ().
      curvature: the batch, which can be asked for ``forms`` and ``value_at``: of the loss, or of what has
        ``grads`` for its gradient (minus the loss, the loss with a penalty).
    """

    grads: optax.Updates
    average: optax.Updates
    direction: optax.Updates
    learning_rate: jax.Array
    damping: jax.Array
    curvature: Curvature


class Outcome(NamedTuple):
    """What a rule is told after the step was tried.

    Attributes:
      value: the loss of the batch before the step. ().
      value_after: the loss of the batch at the end of the step proposed; ``value`` where it was not asked
        for. ().
      known: whether it was asked for. ().
      slope: <g, -update>, by how much the loss falls along the step to first order. ().
      mean_slope: the same with the averaged gradient. ().
      sane: whether loss, gradient, direction and the statistics after the step are finite, and the loss
        after the step is not far above that before; the step is not made otherwise. ().
      update: the step proposed, what is added to the parameters if all of it is made; shaped like them.
    """

    value: jax.Array
    value_after: jax.Array
    known: jax.Array
    slope: jax.Array
    mean_slope: jax.Array
    sane: jax.Array
    update: optax.Updates


def _damping(state: Any, damping: jax.Array, curvature: Curvature) -> jax.Array:
    del state, curvature
    return damping


def as_given(state: Any, momentum: float | jax.Array) -> float | jax.Array:
    """The rate of the average of gradients that the user gave."""
    del state
    return momentum


def never(state: Any) -> jax.Array:
    """The loss at the end of a step need not be known."""
    del state
    return jnp.asarray(False)


class StepRule(NamedTuple):
    """How far a step goes; ``scale_by_kfqn`` calls the functions in this order in each update.

    Where the loss of a batch, its gradient or its direction is not finite, the state stays as it was; and
    also where ``review`` returns a share above 0 of a step that is not ``sane`` and therefore not made. A
    rule that returns 0 for such a step keeps what it learnt from it.

    Attributes:
      init: ``init(params) -> state``, a NamedTuple of arrays. Its scalars are shown by :func:`diagnostics`.
      damping: ``damping(state, given, curvature) -> damping`` for the sides, from the one that the user
        gave.
      propose: ``propose(state, proposal) -> (step, state)``: the parameters are to move by
        -learning_rate step. For the papers ``step`` is the direction.
      due: ``due(state) -> bool``, whether the loss at the end of this step must be known. It is known
        anyway where a side makes a second pass.
      review: ``review(state, outcome) -> (share, state)``: the part of the proposed step that is made. With
        0 the step is left out and nothing is learnt from its batch, momentum included: a batch that comes
        again is then met as before.
      wary: whether the rule itself bounds what one batch unlike the others can do. Batches far from what is
        usual are left out if it does not, and wherever batches are remembered in momentum or in pairs.
      momentum: ``momentum(state, given) -> rate`` of the gradient's moving average in this step, from the
        one that the user gave.
      guarded: whether batches far from what is usual may be left out at all, and a step after which the
        loss is far above that before. False for the papers' step, which knows no such guard; what is not
        finite is left out there too.

    Example:
      Half of every step, a rule of one's own:

      >>> import jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> from typing import NamedTuple
      >>> class Steps(NamedTuple):
      ...     made: jax.Array
      >>> half = kfqn.StepRule(
      ...     init=lambda params: Steps(jnp.zeros([], jnp.int32)),
      ...     propose=lambda state, proposal: (proposal.direction, state),
      ...     review=lambda state, outcome: (0.5, Steps(state.made + 1)),
      ... )
    """

    init: Callable[[optax.Params], Any]
    propose: Callable[[Any, Proposal], tuple[optax.Updates, Any]]
    review: Callable[[Any, Outcome], tuple[jax.Array | float, Any]]
    damping: Callable[[Any, jax.Array, Curvature], jax.Array] = _damping
    due: Callable[[Any], jax.Array] = never
    wary: bool = False
    momentum: Callable[[Any, Any], Any] = as_given
    guarded: bool = True


def checked(rule: StepRule) -> StepRule:
    """The rule with an error where one of its functions returns something else than it must."""

    def damping(state, given, curvature):
        value = rule.damping(state, given, curvature)
        check_returned("StepRule.damping", value, given, "one number")
        return value

    def momentum(state, given):
        rate = rule.momentum(state, given)
        check_returned("StepRule.momentum", rate, given, "one number")
        return rate

    def propose(state, proposal):
        returned = rule.propose(state, proposal)
        check_returned("StepRule.propose", returned, (proposal.direction, state), "(step, state)")
        return returned

    def review(state, outcome):
        returned = rule.review(state, outcome)
        check_returned("StepRule.review", returned, (outcome.value, state), "(share, state)")
        return returned

    own = as_given if rule.momentum is as_given else momentum
    return rule._replace(damping=damping, momentum=own, propose=propose, review=review)
