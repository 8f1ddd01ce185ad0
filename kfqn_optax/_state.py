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
      key: the bits of the PRNG key that ``seed`` gives, the same in all steps: draws take it folded with
        ``count``. int32, as the counts are: what knows no keys (checkpoints, tree maps) keeps it as it is.
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
    key: jax.Array
    momentum: ArrayTree
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    others: others.OthersState | tuple[()]
    usual: UsualState
    rule: Any
    damping: jax.Array
    share: jax.Array
    rejected: jax.Array


def key_bits(seed: int | jax.Array) -> jax.Array:
    """The ``key`` of a state."""
    return jax.lax.bitcast_convert_type(jax.random.key_data(jax.random.key(seed)), jnp.int32)


def key_of(state: ScaleByKfqnState) -> jax.Array:
    """The PRNG key of a state."""
    return jax.random.wrap_key_data(jax.lax.bitcast_convert_type(state.key, jnp.uint32))


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
    states_of(opt_state, call)
    return jax.tree.map(lambda n: function(n) if _is_state(n) else n, opt_state, is_leaf=_is_state)


def states_of(opt_state: Any, call: str) -> dict[str, ScaleByKfqnState]:
    """Every :class:`ScaleByKfqnState` in ``opt_state``, by the keys on the way to it, or its path."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_state)
    found = [(path, node) for path, node in nodes if _is_state(node)]
    if not found:
        raise ValueError(
            f"{call}: there is no kfqn_optax state in the opt_state given. Pass what tx.init(params)"
            " returned, with tx from kfqn_optax."
        )
    keys = [[str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)] for path, _ in found]
    labels = ["/".join(own) for own in keys]
    if len(set(labels)) < len(labels) or not all(labels):
        labels = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    return dict(zip(labels, (node for _, node in found), strict=True))


def _is_state(node: Any) -> bool:
    return isinstance(node, ScaleByKfqnState)
