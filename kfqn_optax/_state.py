"""The state of ``scale_by_kfqn``, found in that of a chain, and told from that of another method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._sides import others
from kfqn_optax._usual import UsualState


class ScaleByKfqnState(NamedTuple):
    """State of :func:`scale_by_kfqn`; arrays only, the same tree and shapes in every step.

    Attributes:
      count: how many times ``update`` was called.
      momentum: moving average of the gradient, shaped like the parameters; empty without momentum.
      inputs: for each layer name the state of its input side.
      outputs: for each layer name the state of its output side.
      others: of the parameters that belong to no layer, if they have a diagonal factor; empty otherwise.
      usual: what batches usually are like. One that is ten times as large is left out; just counted with a
        step rule that is wary, without momentum and second pass.
      rule: what the step rule keeps.
      damping: the damping of the last step that was not left out for its batch.
      share: the part of the proposed step that was made in the last update.
      rejected: how many steps were left out: because the loss, a gradient, the direction, or the loss or
        statistics after the step were not finite; because the batch was far from what is usual, or the loss
        after the step far above that before; or for what a schedule gave, a learning rate that is not
        finite, a damping that is not positive and finite. Their update was zero.
    """

    count: jax.Array
    momentum: ArrayTree
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    others: others.OthersState | tuple[()]
    usual: UsualState
    rule: Any
    damping: jax.Array
    share: jax.Array
    rejected: jax.Array


def check_state(state: Any, expected: ScaleByKfqnState) -> None:
    """Raise unless ``state`` is shaped like ``expected``, what this method's ``init`` makes."""
    if not isinstance(state, ScaleByKfqnState):
        raise other_state(f"of type {type(state).__name__}")
    names = {"step rule": "rule", "momentum": "momentum"}
    parts = {name: (getattr(state, field), getattr(expected, field)) for name, field in names.items()}
    for kind, given, wanted in (
        ("input", state.inputs, expected.inputs),
        ("output", state.outputs, expected.outputs),
    ):
        if set(given) != set(wanted):
            raise other_state(f"with the layers {sorted(given)}, not {sorted(wanted)}")
        parts |= {f"{kind} side of {name!r}": (given[name], wanted[name]) for name in wanted}
    for part, (given, wanted) in parts.items():
        if _summary(given) != _summary(wanted):
            raise other_state(f"whose {part} is {_summary(given)}, not {_summary(wanted)}")


def other_state(what: str) -> ValueError:
    """The error of an update with a state that is another one's."""
    return ValueError(
        f"kfqn: update was given a state {what}. Pass what this transformation's init(params) returned, or"
        " a checkpoint of it: a state does not go from one method, setting of one, or model to another."
    )


def _summary(part: Any) -> str:
    shapes = ", ".join(str(jnp.shape(leaf)) for leaf in jax.tree.leaves(part))
    kind = type(part).__name__ if hasattr(part, "_fields") else "arrays"
    return f"{kind}: {shapes}" if shapes else "empty"


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
