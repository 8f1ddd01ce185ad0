"""What a user plots: how each layer's factors are doing."""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from kfqn_optax._capture.nnx import as_arrays
from kfqn_optax._state import ScaleByKfqnState, map_states


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
      opt_state: an optimizer state with one kfqn_optax state anywhere in it; ``optimizer.opt_state`` of
        an ``nnx.Optimizer``.

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
    found: list[ScaleByKfqnState] = []

    def collect(state: ScaleByKfqnState) -> ScaleByKfqnState:
        found.append(state)
        return state

    map_states(collect, as_arrays(opt_state), "kfqn.diagnostics")
    layers: dict[str, LayerReport] = {}
    for state in found:  # several with optax.partition, each for its own layers
        for name in state.inputs:
            layers[name] = {
                "input": _side(state.inputs[name]),
                "output": _side(state.outputs[name]),
            }
    first = found[0]
    rule = first.rule._asdict() if hasattr(first.rule, "_asdict") else {}
    return {
        "count": first.count,
        "rejected": first.rejected,
        "outliers": first.usual.outliers,
        "damping": first.damping,
        "share": first.share,
        "rule": {name: value for name, value in rule.items() if getattr(value, "ndim", None) == 0},
        "layers": layers,
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
