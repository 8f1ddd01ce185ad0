"""The step of a quadratic model of the loss in two directions, and a damping that follows its success."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import Params as ArrayTree

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import OUTLIER, all_finite, ema, inner, safe_divide, settled, wide_dtype
from kfqn_optax._steps.evidence import SURE, Evidence, rounding, weighed
from kfqn_optax._steps.gain import Losses, watched
from kfqn_optax._steps.noise import Noise, followed, followed_by_slopes
from kfqn_optax._steps.rule import StepRule, as_given
from kfqn_optax._steps.success import POOR, Success

PLATEAU = 0.005
FORGET = 0.9
OUTPUTS, LEAST, ALIKE = 100_000, 125, 500
FEW = 32
EARLY, LEFT, CLASSES = 20, 0.02, {"categorical", "bernoulli"}
LONGER, FORGET_LENGTH = 2.0, 0.8


class Along(NamedTuple):
    """The loss along a step by the model.

    Attributes:
      start, end: its slopes at both ends, times the step.
      change: what the model with its damping promises.
    """

    start: jax.Array
    end: jax.Array
    change: jax.Array


class QuadraticState(NamedTuple):
    """State of :func:`quadratic`.

    Attributes:
      last: the last update, shaped like the parameters.
      count: steps so far.
      scale: the damping as a multiple of the one that the user gave.
      level: moving average of the magnitude of the loss, before this step.
      early: what ``level`` was after twenty steps.
      gain: the part of the model's step that the losses of new batches allow.
      losses: the losses that ``gain`` follows.
      noise: how much of what the steps win the next batches lose.
      momentum: rate of the average of gradients in the next step.
      alpha: coefficient of the preconditioned gradient in the last step.
      mu: coefficient of the update before, in the last step.
      length: moving average of the lengths of the model's steps.
      share: the part of the last step that was made, below 1 where the loss rose along it.
      ratio: actual over predicted change of the loss in the last step, -1 if the loss rose; of the step
        before, by the slopes at both its ends, where the loss's values are in doubt or not finite.
      evidence: whether the loss's values are in doubt.
      along: the last step.
      undefined: in how many steps second derivatives or the loss of the rows of the model were not finite,
        so that the damping alone stood for them.
    """

    last: ArrayTree
    count: jax.Array
    scale: jax.Array
    level: jax.Array
    early: jax.Array
    gain: jax.Array
    losses: Losses
    noise: Noise
    momentum: jax.Array
    alpha: jax.Array
    mu: jax.Array
    length: jax.Array
    share: jax.Array
    ratio: jax.Array
    evidence: Evidence
    along: Along
    undefined: jax.Array


def quadratic(
    *,
    every: int = 5,
    rate: float = 0.7,
    floor: float = 0.05,
    ceiling: float = 1e6,
    trust: float = 0.5,
    patience: int | None = 20,
    momentum: float = 0.7,
    rows: int | None = None,
) -> StepRule:
    """The step alpha d + mu delta that is best by a quadratic model, d = -H_a g H_g, delta the last update.

    With U = (d, delta), r_i = <g, u_i> and Q_ij = <u_i, (C + lambda) u_j>, where C is the Gauss-Newton
    matrix of the batch's loss (the loss's own second derivatives where it has no :func:`outputs`), the
    coefficients are -Q^-1 r, with |mu| at most 1: an update is at most repeated or taken back. One
    direction alone is taken where the two are nearly parallel, and in the first step. There is no learning
    rate to choose: that of the transformation, usually 1, multiplies the step. No step is longer than
    ``trust`` times the parameters, nor than twice the last one or the running mean of those before: what a
    few examples say of a step that long is not to be believed of the others.

    The damping is lambda = damping scale level / |params|^2, with ``damping`` what the transformation was
    given, ``level`` the running loss, in which no batch counts for more than ten times as much: it has the
    units of C, so that neither the loss's scale nor the parameters' matters. Where all marks are of classes
    (``"categorical"``, ``"bernoulli"``) it counts for a fiftieth of that after 20 steps at least: C itself
    falls with such a loss, and what is left of both at the end is of few examples. For a loss that is 0,
    such as one less its own stopped value, |g| / |params| takes the place of level / |params|^2.

    ``scale`` starts at 10, so that the first steps, in which the loss falls most and the deep layers know
    least, leave few ReLUs dead. It follows the model's success (Levenberg and Marquardt): the loss is
    looked at where the step ends, and every ``every`` steps, and once after two, a ratio of actual to
    predicted change above 3/4 multiplies it by rate^every; one below 1/4 divides it by that, but after
    two. A step along which the loss rose is shortened to the minimum of the parabola through what is
    known, half of it at most; one after which the loss is not finite is not made. Where less than a tenth
    of a step is left, the damping rises at once. On a plateau, where the model itself promises less than
    half a percent of the loss, it is the damping that holds the steps: it falls three times as fast there,
    and to a ten-thousandth of ``floor``.

    The model knows its own batch alone, and its steps suit the others less and less as the gradients
    become noise. So the losses of the batches, before their steps, are watched: where the mean of
    ``patience`` of them is above that of those before, ``gain``, the part of the model's step that is
    made, is multiplied by 0.7, and it grows again where they fall by more than their noise.

    And where the next batch's loss shows that more than half of what a step won on its own batch was
    noise, two things change, by m = 2 q - 1, with q the part lost: 0 for a batch that is always the same,
    near 1 where the next has nothing of what a step won. The damping falls no further than to
    ``floor + (1 - floor) m``: below the given one the steps fit what a few examples do not share with the
    others, those of the test set too. And the direction is made of an average of gradients, of the rate
    ``momentum m``: the model, which knows one batch, would take back a momentum of delta that helps all
    the others. Batches of fewer than 32 examples do without the average: of those the model may see no
    curvature along the gradients of others.

    Where a value says nothing of the step, it moves neither damping nor length: a change below the rounding
    of the loss, or, in three shorter and shorter steps, one that is not what the gradient says (a loss over
    its own stopped value, a temporal difference). The slopes at both ends of the steps stand for it then.

    Made for the factors of :func:`fisher`, which are inverted anew as the damping falls. A factor of secant
    pairs (:func:`secant`, :func:`hessian_action`) keeps what it learnt at larger dampings and cannot
    follow: with those give ``rate=1.0``, which keeps ``scale`` at 1.

    Args:
      every: steps from one change of the damping to the next.
      rate: in (0, 1]; 1 for a ``scale`` of 1 throughout.
      floor, ceiling: bounds of ``scale``; a ten-thousandth of ``floor`` on a plateau, up to 1 where batches
        are noise.
      trust: the longest step, as a part of the length of the parameters.
      patience: batches whose mean losses are compared; ``patience / gain`` of them once the steps are
        shorter. None keeps ``gain`` at 1, for a schedule of one's own.
      momentum: the rate of that average if nothing is left of what a step wins; 0 for none.
      rows: of how many examples C is taken and the loss looked at, drawn across the batch and as far as
        possible others than those of the factors, if ``value_and_grad`` knows by ``batch_argnums`` what an
        example is. None: of so many that the marked outputs of these are 100,000 numbers, and of 125 at
        least; of 500 at most if all marks are ``"normal"``; of all where the loss has no mark. Examples
        with few outputs differ much in their curvature (that of a class known for certain is 0), and too
        few of them make a model that takes steps far too long for the others.

    Example:
      >>> import jax.numpy as jnp, kfqn_optax as kfqn
      >>> kfqn.quadratic(every=10).init({"w": jnp.zeros(3)}).scale
      Array(10., dtype=float32)

    Source: Martens, Grosse 2015, arXiv 1503.05671, sections 6.4, 6.5 and 7; their model uses all rows,
    their damping has no units, they do not limit the step's length nor look at new batches.
    """
    check_constants(every=every, rate=rate, floor=floor, ceiling=ceiling, trust=trust)
    check_constants(patience=patience, momentum=momentum, rows=rows)
    if floor > ceiling:
        raise ValueError(f"kfqn.quadratic: floor={floor!r} is above ceiling={ceiling!r}. Lower the floor.")
    success = Success(every, rate, floor, ceiling)

    def init(params):
        one, zero = jnp.ones([], jnp.float32), jnp.zeros([], jnp.float32)
        wide = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
        return QuadraticState(
            last=jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), params),
            count=jnp.zeros([], jnp.int32),
            scale=success.start * one,
            level=zero,
            early=zero,
            gain=one,
            losses=Losses.start(),
            noise=Noise.start(wide),
            momentum=jnp.zeros([], wide),
            alpha=zero,
            mu=zero,
            length=zero,
            share=one,
            ratio=one,
            evidence=Evidence.start(),
            along=Along(*[jnp.zeros([], wide)] * 3),
            undefined=jnp.zeros([], jnp.int32),
        )

    def usual(state, curvature):
        """The loss, no further from 0 than ten times the level."""
        now = jnp.asarray(curvature.value, wide_dtype(curvature.value))
        most = OUTLIER * state.level
        return jnp.where(state.level > 0, jnp.clip(now, -most, most), now)

    def level_of(state, curvature):
        now = jnp.abs(usual(state, curvature))
        return jnp.where(state.count == 0, now, ema(state.level, now, FORGET))

    def early_of(state, level):
        return jnp.where(state.count < EARLY, level, state.early)

    def damping(state, given, curvature):
        level = level_of(state, curvature)
        if curvature.distributions and CLASSES.issuperset(curvature.distributions):
            level = jnp.maximum(level, LEFT * early_of(state, level))
        of_loss = safe_divide(level, curvature.squared_norm)
        # A loss less its own stopped value is always 0: the gradient over the parameters has the unit too.
        grads = curvature.of_own(curvature.grads)
        size = jnp.sqrt(inner(grads, grads))
        of_gradient = safe_divide(size, jnp.sqrt(curvature.squared_norm))
        return given * state.scale * jnp.where(of_loss > 0, of_loss, of_gradient)

    def longest_step(state, curvature, last):
        of_params = trust * jnp.sqrt(curvature.squared_norm)
        usual = LONGER * jnp.maximum(state.length, last)
        return jnp.where(usual > 0, jnp.minimum(of_params, usual), of_params)

    def lengths(running, length):
        """The running mean, which no step of length 0 ends."""
        started = jnp.where(running > 0, ema(running, length, FORGET_LENGTH), length)
        return jnp.where(length > 0, started, running)

    def propose(state, proposal):
        curvature = proposal.curvature
        curvature.check_marks(proposal.direction)
        directions = [proposal.direction, state.last]
        taken = _enough(curvature) if rows is None else rows
        forms = curvature.forms(directions, rows=taken)
        across = inner(*directions)
        first, second = (inner(u, u) for u in directions)
        gram = jnp.array([[first, across], [across, second]])
        defined = all_finite(forms.matrix)
        of_loss = jnp.where(defined, forms.matrix, 0)
        matrix = of_loss + proposal.damping * gram
        slopes = jnp.stack([inner(proposal.grads, u) for u in directions])
        a, c = proposal.learning_rate, minimum(matrix, slopes)
        longest, length = longest_step(state, curvature, jnp.sqrt(second)), jnp.sqrt(c @ gram @ c)
        c = c * jnp.where(length > longest, safe_divide(longest, length), 1)
        length = jnp.minimum(length, longest)
        promised = -(c @ slopes + 0.5 * c @ matrix @ c)
        value, level = usual(state, curvature), level_of(state, curvature)
        plateau = promised < PLATEAU * jnp.minimum(jnp.abs(value), level)
        plateau &= ~state.evidence.doubt
        c = jnp.stack(settled(list(state.gain * c), state.count))
        step = jax.tree.map(lambda d, last: -(c[0] * d + c[1] * last).astype(d.dtype), *directions)

        update = jax.tree.map(lambda x: (-a * x).astype(x.dtype), step)
        slope = a * c @ slopes
        predicted = slope + 0.5 * a**2 * c @ matrix @ c
        # The slope is known of the whole batch, what bends the loss along the step of these rows.
        value_after = curvature.value_at(update, rows=taken)
        of_rows = a * c @ forms.slopes
        seen = jnp.isfinite(forms.value) & jnp.isfinite(of_rows)
        change = slope + (value_after - forms.value - of_rows)
        error = rounding(forms.value, value_after)
        sure = seen & (jnp.abs(predicted) > SURE * error)
        in_gradients = safe_divide(a**2 * c @ gram @ c, -of_rows)
        evidence = weighed(state.evidence, value_after - forms.value, of_rows, in_gradients, sure)
        ignored = ~seen | (evidence.doubt & (change <= level))
        rose = ~(jnp.isfinite(change) & (change <= error)) & ~ignored
        share = settled(jnp.where(rose, shortened(-slope, change), 1), state.count)
        shortly = lambda x: jnp.where(share > 0, share * x, 0).astype(x.dtype)

        ratio = jnp.where(rose, -1, safe_divide(change, predicted))
        # The gradient at the end of the last step is this one, of this batch: known without another pass.
        by_slopes = safe_divide((state.along.start + slopes[1]) / 2, state.along.change)
        ratio = jnp.where(ignored, by_slopes, ratio)
        told = jnp.where(ignored, state.along.change < 0, rose | sure)
        count = state.count + 1
        begins = evidence.doubt & ~state.evidence.doubt
        noise = optax.tree.where(
            evidence.doubt,
            followed_by_slopes(state.noise, slopes[1] - state.along.end, -share * predicted),
            followed(state.noise, value, change, (share == 1) & sure),
        )
        noise = optax.tree.where(begins, Noise.start(state.noise.won.dtype), noise)
        noisy = jnp.maximum(2 * noise.part - 1, 0)
        few = curvature.count_examples() < FEW  # they may have no curvature along others' gradients
        losses, gain = state.losses, state.gain
        if patience is not None:
            losses, gain = watched(losses, gain, value, patience)
            losses = optax.tree.where(evidence.doubt, Losses.start(), losses)
            gain = jnp.where(evidence.doubt, 1, gain)
        left = jnp.where(~seen & (ratio < POOR), 0, share)  # nothing was looked at where the step ends
        scale = success.after(state.scale, count, ratio, left, plateau, noisy)
        scale = jnp.where(
            begins, jnp.minimum(state.scale, success.start), jnp.where(told, scale, state.scale)
        )
        return jax.tree.map(shortly, step), QuadraticState(
            last=jax.tree.map(shortly, update),
            count=count,
            scale=scale,
            level=level,
            early=early_of(state, level),
            gain=gain,
            losses=losses,
            noise=noise,
            momentum=jnp.where(few, 0, momentum * noisy),
            alpha=-c[0],
            mu=c[1],
            length=jnp.where(told, lengths(state.length, length), state.length),
            share=share,
            ratio=ratio,
            evidence=evidence,
            along=Along(share * slope, share * (slope + a**2 * c @ of_loss @ c), share * predicted),
            undefined=state.undefined + (~(defined & seen)).astype(jnp.int32),
        )

    def review(state, outcome):
        made = outcome.sane & (state.share > 0)
        last = jax.tree.map(lambda u: jnp.where(made, u, 0), state.last)
        noise = state.noise._replace(fall=jnp.where(made, state.noise.fall, 0))
        along = Along(*(jnp.where(made, number, 0) for number in state.along))
        return made.astype(jnp.float32), state._replace(last=last, noise=noise, along=along)

    rate_of = as_given if momentum == 0 else lambda state, given: jnp.maximum(given, state.momentum)
    return StepRule(init, propose, review, damping, wary=True, momentum=rate_of)


def minimum(matrix: jax.Array, slopes: jax.Array) -> jax.Array:
    """The coefficients c that minimise <c, slopes> + <c, matrix c> / 2 in two directions.

    The second is between -1 and 1. The matrix is scaled to a unit diagonal. Where it is nearly singular
    then, or the second direction is zero, the first direction is taken alone; an indefinite matrix is taken
    by the magnitudes of its eigenvalues.

    Args:
      matrix: symmetric. (2, 2).
      slopes: (2,).
    """
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(matrix)))
    unit = safe_divide(matrix, scale[:, None] * scale[None, :])
    values, vectors = _eigen(unit)
    both = (values.min() > 1e-6) & (scale > 0).all()
    rotated = vectors.T @ safe_divide(slopes, scale)
    free = -safe_divide(vectors @ safe_divide(rotated, values), scale)
    second = jnp.where(both, jnp.clip(free[1], -1, 1), 0)
    first = -safe_divide(slopes[0] + matrix[0, 1] * second, scale[0] ** 2)
    return jnp.where(both & (second == free[1]), free, jnp.stack([first, second]))


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
    return jnp.where(jnp.isfinite(bend) & (slope > 0), share, 0)


def _enough(curvature: Curvature) -> int | None:
    """Of how many examples to take C; None for all."""
    if not curvature.outputs:
        return None
    rows = max(LEAST, -(-OUTPUTS // curvature.outputs))
    return min(rows, ALIKE) if set(curvature.distributions) == {"normal"} else rows


def is_quadratic(rule: object) -> bool:
    """Whether a step rule chooses the length of its steps as :func:`quadratic` does."""
    return isinstance(rule, StepRule) and isinstance(jax.eval_shape(rule.init, {}), QuadraticState)


QUADRATIC = quadratic()
