"""Steps that end about where the loss of their batch is least along them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import safe_divide
from kfqn_optax._steps.evidence import SURE, Evidence, rounding, weighed
from kfqn_optax._steps.rule import StepRule

START, GROWTH, DECLINE, PATIENCE = 0.01, 1.25, 0.1, 0.3
WINDOW, SHORTER, SHORTEST = 10, 0.5, 1e-4
ALIKE = 0.5
AGAINST = GROWTH**-2  # so that the next probe is shorter by as much as it would be longer


class MeasuredState(NamedTuple):
    """State of :func:`measured`.

    Attributes:
      cap: the part nu of the learning rate that was tried in the last step. ().
      reach: the part of it that was made. ().
      limit: the most that is tried. ().
      count: batches since the last look at their losses. ().
      window: the sum of those losses. ().
      before: that of the ten batches before them. ().
      evidence: whether the loss's values are in doubt.
    """

    cap: jax.Array
    reach: jax.Array
    limit: jax.Array
    count: jax.Array
    window: jax.Array
    before: jax.Array
    evidence: Evidence


def measured(*, enough: int = 8) -> StepRule:
    """Steps end about where the loss of their batch is least along them, as the second pass measured it.

    With d = nu D, the loss of the batch along the step is taken for the parabola
    L - t a <g, d> + t^2 bend, t from 0 to 1, and the second pass tells bend = L(end) - L + a <g, d>. If it
    is positive, the step made is the share

    t = min(1, a max(<g, d>, <M, d>) / (2 bend))

    of the step probed. The averaged gradient has the word where this batch's says less, but only for 0.3
    of the step if the loss rose along it. The loss where the step made ends is not measured again.

    The next step is probed at 1.25 times the length made, up to the learning rate, and at a tenth at
    least of the one before; the first at a hundredth of the learning rate, since the factors know nothing
    yet. A step at whose end the loss is not finite is not made. Where ten new batches have a larger loss,
    before their steps, than the ten before them, steps suit the batches they are made of and no other: the
    most that is probed is halved then, and doubled where they have a smaller one, up to the learning rate.
    Nothing here has a unit: a constant added to the loss changes no step. The damping stays as it is given.

    A step to the minimum of few examples is one to where the others have a larger loss. Of n examples, less
    than ``enough``, n / enough of the learning rate is probed at most.

    Args:
      enough: from how many examples in a batch on the whole learning rate is probed; 1 for a loss that has
        no more examples than one batch of it. They are counted by the ``batch_argnums`` of
        ``value_and_grad``, without it by the most rows of a layer.

    Raises:
      ValueError: for a number that is not whole and positive.

    Example:
      >>> import kfqn_optax as kfqn
      >>> rule = kfqn.measured()
      >>> rule.init({}).reach
      Array(0.01, dtype=float32)
    """

    check_constants(call="kfqn.measured", enough=enough)

    def init(params):
        del params
        one, zero = jnp.ones([], jnp.float32), jnp.zeros([], jnp.float32)
        most = jnp.full([], jnp.finfo(jnp.float32).max)
        none = jnp.zeros([], jnp.int32)
        return MeasuredState(one, START * one, one, none, zero, most, Evidence.start())

    def propose(state, proposal):
        of_examples = jnp.clip(proposal.curvature.count_examples() / enough, 1 / enough, 1)
        nu = jnp.minimum(jnp.minimum(state.limit, of_examples), GROWTH * state.reach)
        step = jax.tree.map(lambda d: (nu * d).astype(d.dtype), proposal.direction)
        return step, state._replace(cap=nu)

    def review(state, outcome):
        state = watched(state, jnp.asarray(outcome.value, jnp.float32))
        made = share(outcome.value, outcome.value_after, outcome.slope, outcome.mean_slope)
        change = outcome.value_after - outcome.value
        sure = outcome.slope > SURE * rounding(outcome.value, outcome.value_after)
        alike = outcome.slope > ALIKE * outcome.mean_slope  # or steps are compared on batches that differ
        evidence = weighed(state.evidence, change, -outcome.slope, state.cap, outcome.known & sure & alike)
        unknown = ~sure & (jnp.abs(change) <= rounding(outcome.value, outcome.value_after))
        unknown &= jnp.isfinite(change)
        ignored = unknown | (evidence.doubt & (change <= jnp.abs(outcome.value)))
        made = jnp.where(ignored, jnp.where(outcome.slope < 0, AGAINST, 1), made)
        state = state._replace(evidence=evidence, limit=jnp.where(evidence.doubt, 1, state.limit))
        made = jnp.where(outcome.sane, made, 0)
        reach = jnp.where(outcome.known, state.cap * jnp.maximum(made, DECLINE), state.reach)
        made = jnp.where(outcome.known, made, outcome.sane.astype(made.dtype))
        return made, state._replace(cap=state.cap * made, reach=jnp.asarray(reach, jnp.float32))

    return StepRule(init, propose, review, due=lambda state: jnp.asarray(True))


def watched(state: MeasuredState, value: jax.Array) -> MeasuredState:
    """The state after a batch with this loss: every ten batches the limit follows what the steps did."""
    window, look = state.window + value, state.count + 1 == WINDOW
    rise = window - state.before
    factor = jnp.where(rise > rounding(window, state.before), SHORTER, 1 / SHORTER)
    limit = jnp.clip(state.limit * factor, SHORTEST, 1)
    return state._replace(
        limit=jnp.where(look, limit, state.limit),
        count=jnp.where(look, 0, state.count + 1),
        window=jnp.where(look, 0, window),
        before=jnp.where(look, window, state.before),
    )


def share(value: jax.Array, value_after: jax.Array, slope: jax.Array, mean_slope: jax.Array) -> jax.Array:
    """The part of a step that ends at the minimum of the parabola, between 0 and 1."""
    bend = value_after - value + slope
    minimum, mean_minimum = (safe_divide(x, 2 * bend) for x in (slope, mean_slope))
    mean_minimum = jnp.where(value_after > value, jnp.minimum(mean_minimum, PATIENCE), mean_minimum)
    made = jnp.clip(jnp.maximum(minimum, mean_minimum), 0, 1)
    made = jnp.where(bend > rounding(value, value_after), made, 1)
    return jnp.where(jnp.isfinite(value_after), made, 0)


MEASURED = measured()
