"""How long a step may be: tables of two functions, called before the second pass and after it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import safe_divide

START, GROWTH, DECLINE, PATIENCE = 0.01, 1.25, 0.1, 0.3


class NormConstraint(NamedTuple):
    """What shortens a step -a D, with a the learning rate, D = H_a M H_g in each layer.

    Attributes:
      before: ``before(reach, length) -> nu`` in (0, 1], with ``length`` = a^2 <M, D>; the second pass is
        made at the end of the step -nu a D. ``reach`` is a number kept from step to step.
      after: ``after(nu, value, value_after, slope, mean_slope) -> (share, reach)``, the part of that step
        that is made and the reach from now on. ``value`` and ``value_after`` are the losses of the batch
        before the step and at its end, ``slope`` = nu a <g, D> and ``mean_slope`` = nu a <M, D> what it
        falls by to first order, by the gradient of the batch and by the averaged one. None for a
        constraint that need not know.
      start: the reach before the first step.
    """

    before: Callable[[jax.Array, jax.Array], jax.Array]
    after: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    start: float = 1.0


def measured() -> NormConstraint:
    """Steps end about where the loss of their batch is least along them, as the second pass measured it.

    With d = nu D, the loss of the batch along the step is taken for the parabola
    L - t a <g, d> + t^2 bend, t from 0 to 1, and the second pass tells bend = L(end) - L + a <g, d>. If it
    is positive, the step made is the share

    t = min(1, a max(<g, d>, <M, d>) / (2 bend))

    of the step probed. The averaged gradient has the word where this batch's says less, but only for 0.3
    of the step if the loss rose along it. The loss where the step made ends is not measured again.

    The next step is probed at 1.25 times the length made, up to the learning rate, and at a tenth at
    least of the one before; the first at a hundredth of the learning rate, since the factors know nothing
    yet. A step at whose end the loss is not finite is not made. Nothing here has a unit: a constant added
    to the loss changes no step.

    Example:
      >>> import kfqn_optax as kfqn
      >>> constraint = kfqn.measured()
      >>> # The loss was to fall by 1 and rose by 1: it is least after a quarter of this step.
      >>> share, _ = constraint.after(nu=1.0, value=5.0, value_after=6.0, slope=1.0, mean_slope=0.5)
      >>> float(share)
      0.25
    """

    def before(reach, length):
        del length
        return jnp.minimum(1, GROWTH * reach)

    def after(nu, value, value_after, slope, mean_slope):
        value, value_after = jnp.asarray(value), jnp.asarray(value_after)
        bend = value_after - value + slope
        rounding = 4 * jnp.finfo(value.dtype).eps * (jnp.abs(value) + jnp.abs(value_after))
        minimum, mean_minimum = (safe_divide(x, 2 * bend) for x in (slope, mean_slope))
        mean_minimum = jnp.where(value_after > value, jnp.minimum(mean_minimum, PATIENCE), mean_minimum)
        share = jnp.clip(jnp.maximum(minimum, mean_minimum), 0, 1)
        share = jnp.where(bend > rounding, share, 1)
        share = jnp.where(jnp.isfinite(value_after), share, 0)
        return share, nu * jnp.maximum(share, DECLINE)

    return NormConstraint(before, after, START)


MEASURED = measured()


def fixed(kappa: float) -> NormConstraint:
    """nu = min(1, sqrt(kappa / (a^2 <M, D>))): kappa bounds twice the fall that the factors predict.

    Args:
      kappa: positive, in units of the loss.
    """
    check_constants(norm_constraint=kappa)

    def before(reach, length):
        del reach
        return jnp.where(length > 0, jnp.sqrt(jnp.minimum(safe_divide(kappa, length), 1)), 1)

    return NormConstraint(before)


def unconstrained() -> NormConstraint:
    """nu = 1: the papers' step."""
    return NormConstraint(lambda reach, length: jnp.ones_like(length))


def as_constraint(norm_constraint: NormConstraint | float | None) -> NormConstraint:
    """A number is the kappa of :func:`fixed`, and None is no constraint."""
    if isinstance(norm_constraint, NormConstraint):
        return norm_constraint
    return unconstrained() if norm_constraint is None else fixed(norm_constraint)
