"""``scale_by_kfqn``: the Kronecker-factored quasi-Newton method as an Optax transformation."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._capture.layers import (
    Layer,
    Layers,
    get_matrices,
    layers_within,
    set_matrices,
)
from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import all_finite, ema, select
from kfqn_optax._over_layers import copied, each
from kfqn_optax._sides.side import Side
from kfqn_optax._steps.measured import MEASURED, NormConstraint, as_constraint


class ScaleByKfqnState(NamedTuple):
    """State of :func:`scale_by_kfqn`; arrays only, the same tree and shapes in every step.

    Attributes:
      count: how many times ``update`` was called.
      momentum: moving average of the gradient, shaped like the parameters.
      inputs: for each layer name the state of its input side.
      outputs: for each layer name the state of its output side.
      cap: the factor nu <= 1 by which the norm constraint shortened the last step.
      reach: what the norm constraint keeps from step to step.
      rejected: how many steps were left out because a gradient, the direction, or the loss or statistics
        after the step were not finite; their update was zero.
    """

    count: jax.Array
    momentum: chex.ArrayTree
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    cap: jax.Array
    reach: jax.Array
    rejected: jax.Array


def scale_by_kfqn(
    layers: Layers,
    *,
    input_side: Callable[[Layer], Side],
    output_side: Callable[[Layer], Side],
    probe_step: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule = 0.1,
    momentum: float = 0.9,
    norm_constraint: NormConstraint | float | None = MEASURED,
    update_every: int = 1,
    factor_dtype: Any = None,
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Scale the averaged gradient M of each layer to nu H_a M H_g.

    Parameters that belong to no layer get nu times their averaged gradient.

    Args:
      layers: what :func:`find_layers` returned.
      input_side: how H_a of a layer is kept, for example ``lambda layer: hessian_action(decay=0.9)``.
      output_side: how H_g of a layer is kept, for example
        ``lambda layer: secant(bfgs, double_damping, decay=0.9, mu1=0.2)``.
      probe_step: length along the direction at which the second pass is made, a number or a schedule.
        With the learning rate, the pairs are measured where the parameters go.
      damping: lambda > 0; l_A = sqrt(lambda / T) and l_G = sqrt(lambda T), with T the positions of a
        convolution, and 1 for other layers. A number or a schedule.
      momentum: rate of the gradient's moving average, which starts at 0 without bias correction.
      norm_constraint: what nu is, :func:`measured` by default; a number kappa, in units of the loss, for
        nu = min(1, sqrt(kappa / (probe_step^2 <M, H_a M H_g>))), the sum over all parameters; None for 1.
      update_every: the second pass and both factor updates are made every this many steps.
      factor_dtype: dtype of the factors; None for that of the parameters, and float32 at least.
      precision: precision of the factor algebra, as in ``jax.default_matmul_precision``.

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
    constraint = as_constraint(norm_constraint)
    if not isinstance(layers, Layers):
        raise TypeError(f"kfqn: layers is a {type(layers).__name__}, not what kfqn.find_layers returns.")
    input_sides = {layer.name: input_side(layer) for layer in layers}
    output_sides = {layer.name: output_side(layer) for layer in layers}

    def dtype_of(layer):
        return jnp.promote_types(factor_dtype or layer.dtype, jnp.float32)

    def init_fn(params):
        present = layers_within(layers, params, "kfqn: init")
        return ScaleByKfqnState(
            count=jnp.zeros([], jnp.int32),
            momentum=jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), _wide(p)), params),
            inputs={
                layer.name: copied(layer, input_sides[layer.name].init(layer.rows, dtype_of(layer)))
                for layer in present
            },
            outputs={
                layer.name: copied(layer, output_sides[layer.name].init(layer.out_dim, dtype_of(layer)))
                for layer in present
            },
            cap=jnp.ones([], jnp.float32),
            reach=jnp.full([], constraint.start, jnp.float32),
            rejected=jnp.zeros([], jnp.int32),
        )

    def update_fn(updates, state, params=None, *, curvature=None, **extra_args):
        del params, extra_args
        present = layers_within(layers, updates, "kfqn: update")
        curvature = _check_curvature(curvature, present)
        step = _at(probe_step, state.count)
        root = jnp.sqrt(_at(damping, state.count))
        sane = all_finite(updates)
        before = {  # a batch with a bad gradient is one that no layer saw
            name: value._replace(rows=jnp.where(sane, value.rows, 0))
            for name, value in _view(present, curvature.statistics, dtype_of).items()
        }

        def scaled_root(scale):
            return {layer.name: jnp.asarray(root * scale(layer), dtype_of(layer)) for layer in present}

        l_a = scaled_root(lambda layer: layer.positions**-0.5)
        l_g = scaled_root(lambda layer: layer.positions**0.5)
        on_inputs = functools.partial(each, present, input_sides)
        on_outputs = functools.partial(each, present, output_sides)

        with jax.default_matmul_precision(precision):
            average = jax.tree.map(lambda m, g: ema(m, g, momentum), state.momentum, updates)
            average = select(sane, average, state.momentum)
            inputs = on_inputs("observe", state.inputs, _of_inputs(before), l_a)
            outputs = on_outputs("observe", state.outputs, _of_outputs(before), l_g)
            inputs, outputs = _start(on_inputs, on_outputs, inputs, outputs, l_a, l_g)
            matrices = get_matrices(present, average)
            rows_done = on_inputs("apply", inputs, matrices)
            done = on_outputs("apply", outputs, {k: v.mT for k, v in rows_done.items()})
            done = {k: _falling(matrices[k], v.mT) for k, v in done.items()}
            direction = set_matrices(present, average, done)
            direction = jax.tree.map(lambda d, m: d.astype(m.dtype), direction, average)
            slope = _inner(average, direction)
            sane &= jnp.isfinite(slope)
            nu = constraint.before(state.reach, step**2 * slope)
            direction = jax.tree.map(lambda d: jnp.where(sane, nu * d, 0), direction)

        def refresh(inputs, outputs):
            with jax.default_matmul_precision(precision):
                asking = Layers(tuple(x for x in present if input_sides[x.name].query), (), "")
                vectors = each(asking, input_sides, "query", inputs, _of_inputs(before))
            probe = jax.tree.map(lambda d: -step * d, direction)
            end = curvature.after(probe, _homogeneous(asking, layers, vectors))
            after = _view(present, end.statistics, dtype_of)
            with jax.default_matmul_precision(precision):
                inputs = on_inputs("update", inputs, _of_inputs(before), _of_inputs(after), l_a)
                outputs = on_outputs("update", outputs, _of_outputs(before), _of_outputs(after), l_g)
            measured = [(x.preactivations, x.preactivation_grads) for x in after.values()]
            share, reach = jnp.ones_like(nu), state.reach
            if constraint.after is not None:
                slopes = curvature.slope(end, updates), curvature.slope(end, average)
                share, reach = constraint.after(nu, curvature.value, end.value, *slopes)
                reach = jnp.where(sane, reach, state.reach).astype(state.reach.dtype)
            return inputs, outputs, all_finite(measured), share.astype(nu.dtype), reach

        def keep(inputs, outputs):
            return inputs, outputs, jnp.asarray(True), jnp.ones_like(nu), state.reach

        sides = (*input_sides.values(), *output_sides.values())
        if constraint.after is None and not any(side.second_pass for side in sides):
            inputs, outputs, after_finite, share, reach = keep(inputs, outputs)
        elif isinstance(update_every, int) and update_every == 1:
            inputs, outputs, after_finite, share, reach = refresh(inputs, outputs)
        else:
            due = state.count % update_every == 0
            inputs, outputs, after_finite, share, reach = jax.lax.cond(due, refresh, keep, inputs, outputs)

        accept = sane & after_finite & (share > 0)
        state = ScaleByKfqnState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            momentum=select(sane, average, state.momentum),
            inputs=inputs,
            outputs=outputs,
            cap=jnp.asarray(jnp.where(accept, nu * share, 0), jnp.float32),
            reach=reach,
            rejected=state.rejected + ~accept,
        )
        scaled = jax.tree.map(
            lambda d, u: jnp.where(accept, share * d, 0).astype(jnp.result_type(u)), direction, updates
        )
        return scaled, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _wide(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _at(value: optax.ScalarOrSchedule, count: jax.Array) -> jax.Array:
    return jnp.asarray(value(count) if callable(value) else value)


def _view(
    layers: Layers, statistics: dict[str, Statistics], dtype_of: Callable[[Layer], Any]
) -> dict[str, Statistics]:
    """The statistics in the factors' dtype, without the homogeneous 1 of a bias that is masked."""
    views = {}
    for layer in layers:
        full, rows = statistics[layer.name], layer.rows
        moment = full.second_moment
        view = full._replace(
            inputs=full.inputs[..., :rows],
            squares=full.squares[..., :rows],
            product=full.product[..., :rows],
            second_moment=None if moment is None else moment[..., :rows, :rows],
        )
        views[layer.name] = jax.tree.map(operator.methodcaller("astype", dtype_of(layer)), view)
    return views


def _of_inputs(statistics: dict[str, Statistics]) -> dict[str, Any]:
    """What an input side sees: nothing whose shape depends on the layer's outputs."""
    fields = ("preactivations", "preactivation_grads", "grad_moment", "part_preactivations", "part_grads")
    absent: Any = dict.fromkeys(fields)
    return {name: value._replace(**absent) for name, value in statistics.items()}


def _of_outputs(statistics: dict[str, Statistics]) -> dict[str, Any]:
    """What an output side sees: nothing whose shape depends on the layer's inputs."""
    absent: Any = dict.fromkeys(("inputs", "squares", "product", "second_moment"))
    return {name: value._replace(**absent) for name, value in statistics.items()}


def _homogeneous(asking: Layers, layers: Layers, vectors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Vectors as the capture takes them: with a 0 for the 1 of a bias that is masked."""
    full = {}
    for layer in asking:
        missing = layers[layer.name].rows - layer.rows
        pad = [(0, 0)] * len(layer.copies) + [(0, missing)]
        full[layer.name] = jnp.pad(vectors[layer.name], pad) if missing else vectors[layer.name]
    return full


def _start(on_inputs, on_outputs, inputs, outputs, l_a, l_g):
    """Start the sides that can start now; rare, so all of it is under one condition."""

    def start(inputs, outputs):
        return on_inputs("start", inputs, l_a), on_outputs("start", outputs, l_g)

    waiting = (on_inputs("starting", inputs), on_outputs("starting", outputs))
    due = jnp.stack([flag.any() for flag in jax.tree.leaves(waiting)]).any()
    return jax.lax.cond(due, start, lambda inputs, outputs: (inputs, outputs), inputs, outputs)


def _falling(matrix: jax.Array, direction: jax.Array) -> jax.Array:
    """The direction D of one layer, and M itself where rounding made a factor indefinite: <M, D> < 0."""
    slope = (matrix * direction).sum((-2, -1), keepdims=True)
    return jnp.where(slope < 0, matrix, direction)


def _inner(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y).real, a, b)
    return sum(jax.tree.leaves(products), start=jnp.zeros([]))


def _check_curvature(curvature: Any, layers: Layers) -> Curvature:
    if curvature is None:
        raise ValueError(
            "kfqn: update was called without curvature. A train step makes it and passes it on:\n"
            "  value_and_grad = kfqn.value_and_grad(loss_fn, layers)\n"
            "  loss, grads, curvature = value_and_grad(params, batch)\n"
            "  updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)\n"
            "If you do pass it, a wrapper drops it: a plain optax.GradientTransformation around this one"
            " must be an optax.GradientTransformationExtraArgs."
        )
    if not isinstance(curvature, Curvature):
        raise ValueError(
            f"kfqn: update was called with curvature={type(curvature).__name__}. Pass the third of the"
            " values that kfqn.value_and_grad(loss_fn, layers)(params, ...) returns."
        )
    missing = [layer.name for layer in layers if layer.name not in curvature.statistics]
    if missing:
        raise ValueError(
            f"kfqn: the curvature has no statistics of {missing}, only of"
            f" {list(curvature.statistics)}. Give kfqn.value_and_grad the same layers as the optimizer."
        )
    return curvature


def map_states(function: Callable[[ScaleByKfqnState], ScaleByKfqnState], opt_state: Any, call: str) -> Any:
    """``opt_state`` with ``function`` applied to every :class:`ScaleByKfqnState` in it."""
    is_state = lambda node: isinstance(node, ScaleByKfqnState)
    nodes, structure = jax.tree.flatten(opt_state, is_leaf=is_state)
    if not any(is_state(node) for node in nodes):
        raise ValueError(
            f"{call}: there is no kfqn_optax state in the opt_state given. Pass what tx.init(params)"
            " returned, with tx from kfqn_optax."
        )
    return jax.tree.unflatten(structure, [function(n) if is_state(n) else n for n in nodes])
