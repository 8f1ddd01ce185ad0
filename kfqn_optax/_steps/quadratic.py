"""The step of a quadratic model of the loss in two directions, and a damping that follows its success."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import safe_divide
from kfqn_optax._steps.rule import StepRule, inner

GOOD, POOR = 0.75, 0.25


class QuadraticState(NamedTuple):
    """State of :func:`quadratic`.

    Attributes:
      last: the last update, shaped like the parameters.
      count: steps so far.
      scale: the damping, as a multiple of the one that the user gave.
      alpha: coefficient of the preconditioned gradient in the last step.
      mu: coefficient of the update before, in the last step.
      predicted: the change of the loss that the model predicts for the last step, negative.
      ratio: actual over predicted change, as of the last time it was measured.
    """

    last: chex.ArrayTree
    count: jax.Array
    scale: jax.Array
    alpha: jax.Array
    mu: jax.Array
    predicted: jax.Array
    ratio: jax.Array


def quadratic(
    *,
    every: int = 5,
    rate: float = 0.85,
    floor: float = 0.002,
    ceiling: float = 1e6,
    rows: int | None = 125,
) -> StepRule:
    """The step alpha d + mu delta that is best by a quadratic model, d = -H_a g H_g, delta the last update.

    With U = (d, delta), r_i = <g, u_i> and Q_ij = <u_i, (C + lambda) u_j>, where C is the Gauss-Newton
    matrix of the batch's loss (the loss's own second derivatives where it has no :func:`outputs`), the
    coefficients are -Q^-1 r. One direction alone is taken where the two are nearly parallel, and in the
    first step. There is no learning rate to choose: that of the transformation, usually 1, multiplies the
    step.

    The damping lambda follows the model's success (Levenberg and Marquardt): every ``every`` steps, and at
    once if the loss rose, rho = actual / predicted change of the loss; rho > 3/4 multiplies lambda by
    rate^every, rho < 1/4 divides it by it. A step after which the loss rose is shortened to the
    minimum of the parabola through what is known, half of it at most; one after which the loss is not
    finite is not made.

    Made for the factors of :func:`fisher`, which are inverted anew as the damping falls. A factor of secant
    pairs (:func:`secant`, :func:`hessian_action`) keeps what it learnt at larger dampings and cannot
    follow: with those give ``rate=1.0``, which keeps the damping where it is.

    Args:
      every: steps from one check of the damping to the next.
      rate: in (0, 1]; 1 for a fixed damping.
      floor, ceiling: bounds of the damping as multiples of the one given.
      rows: examples of the batch of which C is taken, the last ones, if ``value_and_grad`` knows by
        ``batch_argnums`` what an example is; None for all. The factors' statistics should be of
        others: on the same rows the model is blind where d is largest.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> kfqn.quadratic(every=10).init({"w": jnp.zeros(3)}).scale
      Array(1., dtype=float32)

    Source: Martens, Grosse 2015, arXiv 1503.05671, sections 6.4, 6.5 and 7; their model uses all rows.
    """
    check_constants(every=every, rate=rate, floor=floor, ceiling=ceiling, rows=rows)

    def init(params):
        one, zero = jnp.ones([], jnp.float32), jnp.zeros([], jnp.float32)
        last = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), _wide(p)), params)
        return QuadraticState(last, jnp.zeros([], jnp.int32), one, zero, zero, zero, one)

    def damping(state, given):
        return given * state.scale

    def propose(state, proposal):
        down = jax.tree.map(jnp.negative, proposal.direction)
        directions = [down, state.last]
        forms = proposal.curvature.forms(directions, rows=rows)
        gram = jnp.stack([jnp.stack([inner(u, v) for v in directions]) for u in directions])
        matrix = forms.matrix + proposal.damping * gram
        slopes = jnp.stack([inner(proposal.grads, u) for u in directions])
        alpha, mu = coefficients = minimum(matrix, slopes)
        step = jax.tree.map(lambda u, v: (-alpha * u - mu * v).astype(u.dtype), *directions)
        a = proposal.learning_rate
        predicted = a * coefficients @ slopes + 0.5 * a**2 * coefficients @ matrix @ coefficients
        return step, state._replace(alpha=_f32(alpha), mu=_f32(mu), predicted=_f32(predicted))

    def due(state):
        return state.count % every == 0

    def review(state, outcome):
        change = outcome.value_after - outcome.value
        rose = outcome.known & ~(change <= 0)
        ratio = jnp.where(jnp.isfinite(change), safe_divide(change, state.predicted), -1)
        ratio = jnp.where(outcome.known, ratio, state.ratio)
        factor = jnp.where(ratio > GOOD, rate**every, jnp.where(ratio < POOR, rate**-every, 1.0))
        checked = outcome.known & (due(state) | rose) & outcome.sane
        scale = jnp.where(checked, jnp.clip(state.scale * factor, floor, ceiling), state.scale)
        share = jnp.where(rose, shortened(outcome.slope, change), 1)
        share = jnp.where(outcome.sane, share, 0)
        last = jax.tree.map(lambda u: jnp.where(share > 0, share * u, 0).astype(u.dtype), outcome.update)
        return share, state._replace(
            last=last,
            count=state.count + 1,
            scale=_f32(scale),
            ratio=_f32(jnp.where(outcome.sane, ratio, state.ratio)),
        )

    return StepRule(init, propose, review, damping, due)


def minimum(matrix: jax.Array, slopes: jax.Array) -> jax.Array:
    """The coefficients c that minimise <c, slopes> + <c, matrix c> / 2 in two directions.

    The matrix is scaled to a unit diagonal. Where it is nearly singular then, or the second direction is
    zero, the first direction is taken alone; an indefinite matrix is taken by the magnitudes of its
    eigenvalues.

    Args:
      matrix: symmetric. (2, 2).
      slopes: (2,).
    """
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(matrix)))
    unit = safe_divide(matrix, scale[:, None] * scale[None, :])
    values, vectors = _eigen(unit)
    both = (values.min() > 1e-6) & (scale > 0).all()
    rotated = vectors.T @ safe_divide(slopes, scale)
    two = -safe_divide(vectors @ safe_divide(rotated, values), scale)
    alone = -safe_divide(slopes[0], scale[0] ** 2)
    return jnp.where(both, two, jnp.stack([alone, jnp.zeros_like(alone)]))


def _eigen(unit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Magnitudes of the eigenvalues of [[a, c], [c, b]] with a, b of +1 or -1, and its eigenvectors."""
    a, b, c = unit[0, 0], unit[1, 1], unit[0, 1]
    angle = 0.5 * jnp.arctan2(2 * c, a - b)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    vectors = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
    values = jnp.diagonal(vectors.T @ unit @ vectors)
    return jnp.abs(values), vectors


def shortened(slope: jax.Array, change: jax.Array) -> jax.Array:
    """The share of a step along which the loss rose that ends at the parabola's minimum; half at most."""
    bend = change + slope
    share = jnp.clip(safe_divide(slope, 2 * bend), 0, 0.5)
    return jnp.where(jnp.isfinite(change) & (slope > 0), share, 0)


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _f32(value: chex.Numeric) -> jax.Array:
    return jnp.asarray(value, jnp.float32)


QUADRATIC = quadratic()
