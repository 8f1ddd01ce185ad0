"""What a user plots: how each layer's factors are doing."""

import functools
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


class Group(TypedDict):
    """Of one kfqn_optax state."""

    count: jax.Array
    rejected: jax.Array
    outliers: jax.Array
    damping: jax.Array
    share: jax.Array
    rule: dict[str, jax.Array]
    layers: dict[str, LayerReport]


class Report(Group):
    """What :func:`diagnostics` returns."""

    groups: dict[str, Group]


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
        stacked copies have one number for each;
      * ``"groups"``: the same for each kfqn_optax state on its own, by its label in ``optax.partition``, by
        its place in ``opt_state`` elsewhere. With several, ``"layers"`` above holds those of all,
        ``"rejected"`` and ``"outliers"`` are sums over them, ``"share"`` is the least, ``"count"`` the
        most, and ``"damping"`` and ``"rule"`` are those of the first.

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
    groups = {label: _group(state) for label, state in states.items()}
    first, *others = own = list(groups.values())
    if not others:
        return {**first, "groups": groups}
    over = lambda function, key: functools.reduce(function, (group[key] for group in own))
    return {
        "count": over(jnp.maximum, "count"),
        "rejected": over(jnp.add, "rejected"),
        "outliers": over(jnp.add, "outliers"),
        "damping": first["damping"],
        "share": over(jnp.minimum, "share"),
        "rule": first["rule"],
        "layers": {name: layer for group in own for name, layer in group["layers"].items()},
        "groups": groups,
    }


def _group(state: ScaleByKfqnState) -> Group:
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
