"""What the sides learn from a batch before the step: ``learn``, and its parts in their order."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.statistics import Statistics
from kfqn_optax._method import Method
from kfqn_optax._numerics import safe_divide
from kfqn_optax._over_layers import each, inverses
from kfqn_optax._sides import others
from kfqn_optax._state import ScaleByKfqnState
from kfqn_optax._views import of_inputs, of_outputs, view

LEARN_AT_FIRST = 30
PI_RANGE = (1e-12, 1e12)


class Batch(NamedTuple):
    """One batch as the sides see it: statistics by layer name, in the factors' dtype."""

    before: dict[str, Statistics]
    inputs: dict[str, Statistics]
    outputs: dict[str, Statistics]
    sampled: ArrayTree | None


class Sides(NamedTuple):
    """The states of all sides, by layer name, and the damping of each."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]


def learn(
    method: Method,
    present: Layers,
    state: ScaleByKfqnState,
    grads: ArrayTree,
    curvature: Curvature,
    damping: jax.Array,
    sane: jax.Array,
) -> tuple[Sides, Any, Batch | None, Sides | None]:
    """The sides after they saw the batch, if it is one that they are to see, and what they were shown."""
    if method.of_factors:
        curvature.check_marks(grads)

    def look():
        batch = _batch(method, present, curvature, sane)
        with method.precise():
            dampings = _split(method, present, state, batch, damping)
            sides, rest = _observe(method, present, state, grads, batch, dampings, curvature, sane)
        return sides, rest, batch, dampings

    if method.second_pass or (isinstance(method.learn_every, int) and method.learn_every == 1):
        return look()
    made = state.count - state.rejected
    due = (made < LEARN_AT_FIRST) | (made % method.learn_every == 0)
    unseen = Sides(state.inputs, state.outputs), state.others
    return *jax.lax.cond(due, lambda: look()[:2], lambda: unseen), None, None


def _batch(method: Method, present: Layers, curvature: Curvature, sane: jax.Array) -> Batch:
    """What the sides see of the batch; one with a bad gradient is one that no layer saw."""

    def seen(statistics):
        found = view(present, statistics, method.dtype_of)
        return {name: s._replace(rows=jnp.where(sane, s.rows, 0)) for name, s in found.items()}

    before = seen(curvature.statistics)
    if not method.of_factors:
        return Batch(before, of_inputs(before), of_outputs(before), None)
    statistics, sampled = curvature.factors(rows=method.factor_rows)
    of_factors = seen(statistics)

    def chosen(sides):
        return {name: of_factors[name] if sides[name].of_factors else before[name] for name in before}

    inputs, outputs = of_inputs(chosen(method.inputs)), of_outputs(chosen(method.outputs))
    return Batch(before, inputs, outputs, sampled)


def _split(
    method: Method, present: Layers, state: ScaleByKfqnState, batch: Batch, damping: jax.Array
) -> Sides:
    """l_A and l_G of each layer, with l_A l_G = damping."""
    root = jnp.sqrt(damping)
    both = [
        layer for layer in present if method.inputs[layer.name].scale and method.outputs[layer.name].scale
    ]
    knowing = Layers(tuple(both), (), "")
    of_inputs = each(knowing, method.inputs, "scale", state.inputs, batch.inputs)
    of_outputs = each(knowing, method.outputs, "scale", state.outputs, batch.outputs)
    l_a, l_g = {}, {}
    for layer in present:
        if layer.name in of_inputs:
            ratio = safe_divide(of_inputs[layer.name], of_outputs[layer.name])
            pi = jnp.sqrt(jnp.clip(jnp.where(ratio > 0, ratio, 1), *PI_RANGE))
        else:
            pi = jnp.full(layer.copies, layer.positions**-0.5)
        dtype = method.dtype_of(layer)
        l_a[layer.name] = jnp.asarray(root * pi, dtype)
        l_g[layer.name] = jnp.asarray(root / pi, dtype)
    return Sides(l_a, l_g)


def _observe(
    method: Method,
    present: Layers,
    state: ScaleByKfqnState,
    grads: ArrayTree,
    batch: Batch,
    dampings: Sides,
    curvature: Curvature,
    sane: jax.Array,
) -> tuple[Sides, others.OthersState | tuple[()]]:
    """All sides, and what belongs to no layer, after they saw the batch and before the step."""
    inputs = each(present, method.inputs, "observe", state.inputs, batch.inputs, dampings.inputs)
    outputs = each(present, method.outputs, "observe", state.outputs, batch.outputs, dampings.outputs)
    sides = _start(method, present, Sides(inputs, outputs), dampings, sane)
    if not isinstance(state.others, others.OthersState):
        return sides, ()
    examples = curvature.examples
    if examples is None:
        examples = _max_rows(present, batch.before)
    examples = examples * curvature.devices
    decay = 0.0 if method.others_decay is None else method.others_decay
    rest = others.observe(state.others, present, grads, batch.sampled, examples, sane, decay)
    return sides, rest


def _start(method: Method, present: Layers, sides: Sides, dampings: Sides, sane: jax.Array) -> Sides:
    """Start the sides that can start now; rare, so all of it is under one condition."""
    of_inputs, of_outputs = (
        Layers(tuple(layer for layer in present if chosen[layer.name].matrix is not None), (), "")
        for chosen in (method.inputs, method.outputs)
    )
    if not of_inputs.found and not of_outputs.found:
        return sides

    def start(sides):
        a = each(of_inputs, method.inputs, "matrix", sides.inputs, dampings.inputs)
        g = each(of_outputs, method.outputs, "matrix", sides.outputs, dampings.outputs)
        a, g = inverses((a, g), method.factor_mesh)
        inputs = each(of_inputs, method.inputs, "start", sides.inputs, a)
        outputs = each(of_outputs, method.outputs, "start", sides.outputs, g)
        return Sides(sides.inputs | inputs, sides.outputs | outputs)

    waiting = (
        each(of_inputs, method.inputs, "starting", sides.inputs),
        each(of_outputs, method.outputs, "starting", sides.outputs),
    )
    due = jnp.stack([flag.any() for flag in jax.tree.leaves(waiting)]).any()
    return jax.lax.cond(due & sane, start, lambda sides: sides, sides)


def _max_rows(layers: Layers, statistics: dict[str, Statistics]) -> jax.Array:
    """The number of examples of the batch as far as the layers know it."""
    rows = [statistics[layer.name].rows.max() / layer.positions for layer in layers]
    return functools.reduce(jnp.maximum, rows)
