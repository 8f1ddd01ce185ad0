"""``scale_by_kfqn``: the Kronecker-factored quasi-Newton method as an Optax transformation.

A step, in order: the sides learn from the batch (``learn``), M is scaled to the direction
(``_precondition``), the step rule says how far to go, the sides that ask for it see the batch again at the
end of that step (``_second_pass``), the rule reviews how much of it is made, and what a step left out has
taught is forgotten (``_remembered``).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from optax import Params as ArrayTree

from kfqn_optax._capture.curvature import Curvature, check_curvature
from kfqn_optax._capture.layers import Layer, Layers
from kfqn_optax._capture.parameters import (
    get_matrices,
    layers_within,
    set_matrices,
)
from kfqn_optax._constants import check_constants, check_factor_dtype, check_number, check_precision
from kfqn_optax._divided import check_mesh, divided, gathered, whole
from kfqn_optax._learning import Sides, learn
from kfqn_optax._meshes import in_any_mesh
from kfqn_optax._method import Method
from kfqn_optax._numerics import all_finite, ema, inner, settled, wide_dtype
from kfqn_optax._objective import objective
from kfqn_optax._over_layers import copied, each
from kfqn_optax._sides import others
from kfqn_optax._sides.side import Side
from kfqn_optax._state import ScaleByKfqnState, check_state, key_bits, key_of
from kfqn_optax._steps.capped import as_rule
from kfqn_optax._steps.measured import MEASURED
from kfqn_optax._steps.rule import Outcome, Proposal, StepRule, never
from kfqn_optax._usual import UsualState, believed, far, kept, look
from kfqn_optax._views import homogeneous, of_inputs, of_outputs, view
from kfqn_optax._warnings import warn_once


def scale_by_kfqn(
    layers: Layers,
    *,
    input_side: Callable[[Layer], Side],
    output_side: Callable[[Layer], Side],
    probe_step: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule = 0.1,
    momentum: float = 0.9,
    step_rule: StepRule | float | None = MEASURED,
    update_every: int = 1,
    learn_every: int = 1,
    others_decay: float | None = 0.95,
    statistics_rows: int | Literal["auto"] | None = None,
    factor_dtype: Any = None,
    factor_mesh: jax.sharding.Mesh | None = None,
    precision: str = "highest",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Scale the averaged gradient M of each layer to H_a M H_g, and go as far along it as a rule says.

    Args:
      layers: what :func:`find_layers` returned.
      input_side: how H_a of a layer is kept, for example ``lambda layer: hessian_action(decay=0.9)``.
      output_side: how H_g of a layer is kept, for example
        ``lambda layer: secant(bfgs, double_damping, decay=0.9, mu1=0.2)``.
      probe_step: length along the direction at which the second pass is made, a number or a schedule.
        With the learning rate, the pairs are measured where the parameters go.
      damping: lambda > 0, a number or a schedule, which the step rule may scale. Where both sides know the
        scale of what they invert, l_A = sqrt(lambda) pi and l_G = sqrt(lambda) / pi, with pi^2 the ratio of
        their mean diagonal elements; else l_A = sqrt(lambda / T) and l_G = sqrt(lambda T), with T the
        positions of a convolution, and 1 for other layers.
      momentum: rate of the gradient's moving average, which starts at 0 without bias correction.
      step_rule: how far to go: :func:`measured` by default, :func:`quadratic`, a number for
        :func:`capped`, None for the papers' step, or a :class:`StepRule` of one's own.
      update_every: the second pass and both factor updates are made every this many steps.
      learn_every: where no side makes a second pass, the sides see the batches of the first 30 steps
        and then of one in this many; the statistics of the others are not computed.
      others_decay: parameters that belong to no layer are divided by the diagonal of the Gauss-Newton
        matrix plus lambda, averaged at this rate; None leaves them their averaged gradient.
      statistics_rows: of how many examples sides like :func:`fisher` take their statistics, drawn
        across the batch, if ``value_and_grad`` knows by ``batch_argnums`` what an example is; None for
        all. "auto" for 250, or for fewer with convolutions, see :func:`kfac`.
      factor_dtype: dtype of the factors; None for that of the parameters, and float32 at least.
      factor_mesh: each device of this mesh holds, and updates, its share of the factors; None for all on
        every device. Their sides are grown to multiples of the number of devices.
      precision: of products of the factor algebra and of the step rule's passes over the model, as in
        ``jax.default_matmul_precision``.
      seed: of all that is drawn, kept as a key in the state: labels of sampled gradients, and the examples
        of parts of the batch.

    Returns:
      A transformation whose ``update`` takes ``curvature=``, see :func:`value_and_grad`.

    Raises:
      ValueError: while tracing, for a constant out of its range, for an update without ``curvature``,
        or for parameters that are not those of ``layers``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn, optax
      >>> model, x = nn.Dense(2), jnp.ones((8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> sides = kfqn.hessian_action(0.9), kfqn.secant(kfqn.bfgs, kfqn.dp_dlm, 0.9, 0.2)
      >>> scale = kfqn.scale_by_kfqn(
      ...     kfqn.find_layers(model, variables, x),
      ...     input_side=lambda layer: sides[0],
      ...     output_side=lambda layer: sides[1],
      ...     probe_step=0.1,
      ... )
      >>> tx = optax.chain(scale, optax.scale_by_learning_rate(0.1))
      >>> tx.init(variables["params"])[0].outputs["."].factor.shape
      (2, 2)
    """
    check_constants(probe_step=probe_step, damping=damping, momentum=momentum, update_every=update_every)
    check_constants(learn_every=learn_every, seed=seed)
    check_factor_dtype(factor_dtype)
    check_mesh(factor_mesh)
    check_precision(precision)
    if not isinstance(layers, Layers):
        raise TypeError(f"kfqn: layers is a {type(layers).__name__}, not what kfqn.find_layers returns.")
    check_constants(others_decay=others_decay)
    if not (isinstance(statistics_rows, str) and statistics_rows == "auto"):
        check_constants(statistics_rows=statistics_rows)
    settings = Method(
        layers,
        inputs={layer.name: input_side(layer) for layer in layers},
        outputs={layer.name: output_side(layer) for layer in layers},
        rule=as_rule(step_rule),
        probe_step=probe_step,
        damping=damping,
        momentum=momentum,
        update_every=update_every,
        learn_every=learn_every,
        others_decay=others_decay,
        statistics_rows=statistics_rows,
        factor_dtype=factor_dtype,
        factor_mesh=factor_mesh,
        precision=precision,
        seed=seed,
    )

    def init_fn(params):
        return jax.tree.map(jnp.copy, _init(settings, params))  # no two leaves in one buffer: donation

    def update_fn(updates, state, params=None, *, curvature=None, **extra_args):
        del params, extra_args
        _advise(updates, state)
        present = layers_within(layers, updates, "kfqn: update")
        check_state(state, jax.eval_shape(functools.partial(_init, settings), updates))
        method = settings.within(present)
        state = _whole(method, present, state)
        curvature = check_curvature(curvature, present).within(updates, present)
        key = jax.random.fold_in(key_of(state), state.count)
        curvature = curvature.with_parts(key, method.factor_rows)
        curvature, grads, unit, decay = objective(curvature, updates)
        step_length = _at("the learning rate", probe_step, state.count)
        given = _at("the damping", method.damping, state.count)
        damping = method.rule.damping(state.rule, given, curvature)
        sane = all_finite(updates) & jnp.isfinite(curvature.value)
        sane &= jnp.isfinite(step_length) & (damping > 0) & jnp.isfinite(damping)
        usual, sane = look(state.usual, curvature, present, updates, sane, method.leaves_out)
        sides, rest, batch, dampings = learn(
            method, present, state, updates, curvature, damping + decay, sane
        )
        with method.precise():
            average = _average(method, state, updates, sane)
            direction = _precondition(present, method, sides, rest, average, damping + decay)
            sane &= jnp.isfinite(inner(average, direction))
        proposal = Proposal(grads, average, direction, step_length, damping, curvature)
        with method.precise():
            step, rule_state = method.rule.propose(state.rule, proposal)
        sane &= all_finite(step)
        step = jax.tree.map(lambda d: jnp.where(sane, d, 0), step)
        update = jax.tree.map(lambda d: -step_length * d, step)
        sides, value_after, known, finite = _second_pass(
            method, present, state, sides, batch, dampings, curvature, update
        )
        if method.rule.guarded:
            finite &= ~far(state.usual, curvature.value, value_after, known)
        outcome = Outcome(
            value=curvature.value,
            value_after=value_after,
            known=known,
            slope=curvature.slope(update, grads),
            mean_slope=unit * curvature.slope(update, average),
            sane=sane & finite,
            update=update,
        )
        share, rule_state = method.rule.review(rule_state, outcome)
        rule_state = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), rule_state, state.rule)
        accept = outcome.sane & (share > 0)
        # A rule that refuses a step may learn from that; one that is overruled saw a step that is not made.
        reviewed = sane & (outcome.sane | ~(share > 0))
        share, accept, reviewed, rule_state = settled((share, accept, reviewed, rule_state), state.count)
        momentum, sides, rest = _remembered(method, state, average, sides, rest, accept)
        state = ScaleByKfqnState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            key=state.key,
            momentum=gathered(momentum, factor_mesh),
            inputs=_divided(method, present, sides.inputs),
            outputs=_divided(method, present, sides.outputs),
            others=rest,
            usual=kept(state.usual, usual, accept),
            rule=optax.tree.where(reviewed, rule_state, state.rule),
            damping=jnp.where(sane, jnp.asarray(damping, jnp.float32), state.damping),
            share=jnp.asarray(jnp.where(accept, share, 0), jnp.float32),
            rejected=state.rejected + (~accept).astype(jnp.int32),
        )
        scaled = jax.tree.map(
            lambda d, u: jnp.where(accept, share * d, 0).astype(jnp.result_type(u)), step, updates
        )
        return gathered(scaled, factor_mesh), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init(method: Method, params: ArrayTree) -> ScaleByKfqnState:
    present = layers_within(method.layers, params, "kfqn: init")
    method = method.within(present)
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), params)
    rest = others.paths(present, params)
    return ScaleByKfqnState(
        count=jnp.zeros([], jnp.int32),
        key=key_bits(method.seed),
        momentum=() if method.without_momentum else zeros,
        inputs=_divided(method, present, _input_states(method, present)),
        outputs=_divided(method, present, _output_states(method, present)),
        others=others.init(present, params) if method.others_decay is not None and rest else (),
        usual=UsualState.start(params),
        rule=method.rule.init(params),
        damping=jnp.zeros([], jnp.float32),
        share=jnp.ones([], jnp.float32),
        rejected=jnp.zeros([], jnp.int32),
    )


def _input_states(method: Method, present: Layers) -> dict[str, Any]:
    new = lambda layer: method.inputs[layer.name].init(layer.rows, method.dtype_of(layer))
    return {layer.name: copied(layer, new(layer)) for layer in present}


def _output_states(method: Method, present: Layers) -> dict[str, Any]:
    new = lambda layer: method.outputs[layer.name].init(layer.out_dim, method.dtype_of(layer))
    return {layer.name: copied(layer, new(layer)) for layer in present}


def _divided(method: Method, present: Layers, states: dict[str, Any]) -> dict[str, Any]:
    """The states of sides as they are kept."""
    return {
        layer.name: divided(states[layer.name], len(layer.copies), method.factor_mesh) for layer in present
    }


def _whole(method: Method, present: Layers, state: ScaleByKfqnState) -> ScaleByKfqnState:
    """The state with those of the sides as they work on them."""
    if method.factor_mesh is None:
        return state
    inputs, outputs = (
        whole(kept, jax.eval_shape(functools.partial(new, method, present)), method.factor_mesh)
        for kept, new in ((state.inputs, _input_states), (state.outputs, _output_states))
    )
    return state._replace(inputs=inputs, outputs=outputs)


def _average(method: Method, state: ScaleByKfqnState, grads: ArrayTree, sane: jax.Array):
    """M; an average leaves out gradients that are not finite, and bounds the others."""
    if method.without_momentum:
        return jax.tree.map(lambda g: g.astype(wide_dtype(g)), grads)
    rate = method.rule.momentum(state.rule, method.momentum)
    part = believed(state.usual, grads) if method.rule.guarded else 1
    average = jax.tree.map(lambda m, g: ema(m, (part * g).astype(m.dtype), rate), state.momentum, grads)
    return gathered(optax.tree.where(sane, average, state.momentum), method.factor_mesh)


def _precondition(
    present: Layers,
    method: Method,
    sides: Sides,
    rest: others.OthersState | tuple[()],
    average: ArrayTree,
    damping: jax.Array,
) -> ArrayTree:
    """The direction: H_a M H_g in each layer."""

    def direct(sides, rest, average, damping):
        matrices = get_matrices(present, average)
        rows_done = each(present, method.inputs, "apply", sides.inputs, matrices)
        transposed = {name: matrix.mT for name, matrix in rows_done.items()}
        done = each(present, method.outputs, "apply", sides.outputs, transposed)
        done = {name: _falling(matrices[name], matrix.mT) for name, matrix in done.items()}
        if isinstance(rest, others.OthersState):
            scaled = others.apply(rest, present, average, damping)
        else:
            scaled = average
        direction = set_matrices(present, scaled, done)
        return jax.tree.map(lambda d, m: d.astype(m.dtype), direction, average)

    return gathered(in_any_mesh(direct, sides, rest, average, damping, like=average), method.factor_mesh)


def _second_pass(
    method: Method,
    present: Layers,
    state: ScaleByKfqnState,
    sides: Sides,
    batch: Any,
    dampings: Any,
    curvature: Curvature,
    update: ArrayTree,
) -> tuple[Sides, jax.Array, jax.Array, jax.Array]:
    """The sides after they saw the batch at the end of the step, the loss there, whether it is known, and
    whether what was measured there is finite."""
    value_before = jnp.asarray(curvature.value)

    def look(sides):
        with method.precise():
            asking = Layers(tuple(x for x in present if method.inputs[x.name].query), (), "")
            vectors = each(asking, method.inputs, "query", sides.inputs, batch.inputs)
        end = curvature.after(update, homogeneous(asking, method.layers, vectors))
        after = view(present, end.statistics, method.dtype_of)
        with method.precise():
            ends = of_inputs(after), of_outputs(after)
            inputs = each(
                present, method.inputs, "update", sides.inputs, batch.inputs, ends[0], dampings.inputs
            )
            outputs = each(
                present, method.outputs, "update", sides.outputs, batch.outputs, ends[1], dampings.outputs
            )
        measured = [(x.preactivations, x.preactivation_grads) for x in after.values()]
        finite = all_finite(measured) & jnp.isfinite(end.value)
        return Sides(inputs, outputs), end.value, jnp.asarray(True), finite

    def pass_by(sides):
        if method.second_pass or method.rule.due is never:
            return sides, value_before, jnp.asarray(False), jnp.asarray(True)
        due = method.rule.due(state.rule)
        value = jax.lax.cond(due, lambda: curvature.value_at(update), lambda: value_before)
        return sides, value, due, jnp.asarray(True)

    if not method.second_pass:
        return pass_by(sides)
    if isinstance(method.update_every, int) and method.update_every == 1:
        return look(sides)
    return jax.lax.cond(state.count % method.update_every == 0, look, pass_by, sides)


def _remembered(
    method: Method,
    state: ScaleByKfqnState,
    average: ArrayTree,
    sides: Sides,
    rest: others.OthersState | tuple[()],
    accept: jax.Array,
) -> tuple[ArrayTree, Sides, others.OthersState | tuple[()]]:
    """Momentum, sides and others as they are kept: those before, if the step is left out."""
    learnt = (() if method.without_momentum else average, sides, rest)
    before = (state.momentum, Sides(state.inputs, state.outputs), state.others)
    if method.second_pass:
        return optax.tree.where(accept, learnt, before)
    # The sides changed nothing in most steps: a condition reads them once, a selection both in every step.
    return jax.lax.cond(accept, lambda learnt, _: learnt, lambda _, before: before, learnt, before)


def _advise(*trees: Any) -> None:
    """Warn of a step that is run operation by operation."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))
    if not traced and not getattr(jax.config, "jax_disable_jit", False):
        warn_once(
            "kfqn: update was called outside jax.jit, where it takes seconds a step. Put"
            " kfqn.value_and_grad(...), tx.update(...) and optax.apply_updates(...) into one function under"
            " jax.jit (nnx.jit with an nnx.Optimizer)."
        )


def _at(name: str, value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    if not callable(value):
        return jnp.asarray(value)
    now = value(count)
    check_number(f"kfqn: the schedule of {name} returned ", now)
    return jnp.asarray(now)


def _falling(matrix: jax.Array, direction: jax.Array) -> jax.Array:
    """The direction D of one layer, and M itself where rounding made a factor indefinite: <M, D> < 0."""
    slope = (matrix * direction).sum((-2, -1), keepdims=True)
    return jnp.where(slope < 0, matrix, direction)
