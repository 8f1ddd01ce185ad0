"""What a user plots: how each layer's factors are doing."""

import functools
import operator
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.nnx import as_arrays
from kfqn_optax._state import ScaleByKfqnState, states_of


class SideReport(TypedDict):
    """Of one side of a layer; a number each, or one for each of the layer's stacked copies."""

    taken: jax.Array
    damped: jax.Array
    skipped: jax.Array
    ratio: jax.Array
    norm: jax.Array


class LayerReport(TypedDict):
    """Of one layer."""

    input: SideReport
    output: SideReport


class Report(TypedDict):
    """What :func:`diagnostics` returns."""

    count: jax.Array
    rejected: jax.Array
    outliers: jax.Array
    damping: jax.Array
    share: jax.Array
    rule: dict[str, jax.Array]
    layers: dict[str, LayerReport]


def diagnostics(opt_state: optax.OptState) -> Report:
    """Numbers about the optimizer's last step and its pairs so far; may be called under ``jax.jit``.

    Args:
      opt_state: an optimizer state with a kfqn_optax state in it, or several (``optax.partition``);
        ``optimizer.opt_state`` of an ``nnx.Optimizer``.

    Returns:
      A dictionary of

      * ``"count"``: updates made, ``"rejected"``: those that were left out because a number was not
        finite, the batch far from what is usual, or the loss after the step far above that before;
        ``"outliers"``: batches far from what is usual, which are left out, or count for less with
        :func:`quadratic` alone;
      * ``"damping"`` of the last update, ``"share"``: the part of the proposed step that was made in it, 0
        if it was left out; ``"rule"``: the numbers that the step rule keeps, such as ``"cap"`` of
        :func:`measured`, or ``"alpha"``, ``"mu"`` and ``"ratio"`` of :func:`quadratic`;
      * ``"layers"``: for each layer name ``{"input": ..., "output": ...}``, each with ``"taken"``,
        ``"damped"`` and ``"skipped"`` (numbers of pairs), ``"ratio"`` (s^T y / y^T H y of the last
        pair before damping) and ``"norm"`` (Frobenius norm of the factor's arrays). Layers with
        stacked copies have one number for each.

      Of several states, as ``optax.partition`` has them, ``"layers"`` holds those of all, ``"rejected"``
      and ``"outliers"`` are sums, ``"count"`` and ``"damping"`` the largest, ``"share"`` the least.
      ``"rule"`` has all five of each state, and the numbers of its rule, as ``"label/name"``: the label is
      that of the group, or the place in ``opt_state``.

    Raises:
      ValueError: if there is no kfqn_optax state in ``opt_state``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Dense(2), jnp.ones((8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> opt_state = kfqn.kbfgs(0.3, kfqn.find_layers(model, variables, x)).init(variables["params"])
      >>> kfqn.diagnostics(opt_state)["layers"]["."]["output"]["taken"]
      Array(0, dtype=int32)
    """
    states = states_of(as_arrays(opt_state), "kfqn.diagnostics")
    reports = {label: _report(state) for label, state in states.items()}
    if len(reports) == 1:
        return next(iter(reports.values()))
    over = lambda function, key: functools.reduce(function, (own[key] for own in reports.values()))
    numbers = {
        f"{label}/{name}": own[name]
        for label, own in reports.items()
        for name in ("count", "rejected", "outliers", "damping", "share")
    }
    rules = {f"{label}/{name}": x for label, own in reports.items() for name, x in own["rule"].items()}
    return {
        "count": over(jnp.maximum, "count"),
        "rejected": over(jnp.add, "rejected"),
        "outliers": over(jnp.add, "outliers"),
        "damping": over(jnp.maximum, "damping"),
        "share": over(jnp.minimum, "share"),
        "rule": numbers | rules,
        "layers": over(operator.or_, "layers"),
    }


def _report(state: ScaleByKfqnState) -> Report:
    rule = state.rule._asdict() if hasattr(state.rule, "_asdict") else {}
    return {
        "count": state.count,
        "rejected": state.rejected,
        "outliers": state.usual.outliers,
        "damping": state.damping,
        "share": state.share,
        "rule": {name: value for name, value in rule.items() if getattr(value, "ndim", None) == 0},
        "layers": {
            name: {"input": _side(state.inputs[name]), "output": _side(state.outputs[name])}
            for name in state.inputs
        },
    }


def _side(side: Any) -> SideReport:
    copies = side.pairs.ratio.ndim
    squares = [
        jnp.square(leaf).sum(tuple(range(copies, leaf.ndim))) for leaf in jax.tree.leaves(side.factor)
    ]
    taken, damped, skipped = jnp.moveaxis(side.pairs.counts, -1, 0)
    return {
        "taken": taken,
        "damped": damped,
        "skipped": skipped,
        "ratio": side.pairs.ratio,
        "norm": jnp.sqrt(sum(squares[1:], start=squares[0])),
    }
