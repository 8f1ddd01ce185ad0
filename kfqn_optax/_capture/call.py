"""One call of a loss as something that can be made again at other parameters, with slots for the sums."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.nnx import is_state
from kfqn_optax._capture.parameters import put
from kfqn_optax._capture.reached import Reached
from kfqn_optax._capture.slot import SLOT


class Call(Protocol):
    """One call of losses, which can be repeated at other parameters; slots and sums by layer name."""

    @property
    def params(self) -> Any: ...

    @property
    def args(self) -> tuple[Any, ...]: ...

    def with_args(self, args: tuple[Any, ...]) -> "Call": ...

    def value(self, loss_fn: Callable[..., Any], params: Any, has_aux: bool) -> jax.Array: ...

    def value_and_grad(
        self, loss_fn: Callable[..., Any], slots: Mapping[str, Any], has_aux: bool, reached: Reached
    ) -> tuple[Any, Any, Any]: ...

    def slot_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any], has_aux: bool
    ) -> tuple[jax.Array, Any]: ...

    def all_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any]
    ) -> tuple[Any, Any]: ...


@dataclasses.dataclass(frozen=True)
class TreeCall:
    """A call of losses that are functions of a tree of parameters."""

    layers: Layers
    params: ArrayTree
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def with_args(self, args):
        return dataclasses.replace(self, args=args)

    def value(self, loss_fn, params, has_aux):
        value = loss_fn(params, *self.args, **self.kwargs)
        return value[0] if has_aux else value

    def value_and_grad(self, loss_fn, slots, has_aux, reached):
        watched = self._with_slots(loss_fn, reached.watch)
        function = jax.value_and_grad(watched, argnums=(0, 1), has_aux=has_aux)
        value, (grads, sums) = function(self.params, slots)
        return value, grads, sums

    def slot_grads(self, loss_fn, params, slots, has_aux):
        function = jax.value_and_grad(self._with_slots(loss_fn), argnums=1, has_aux=has_aux)
        value, sums = function(params, slots)
        return (value[0] if has_aux else value), sums

    def all_grads(self, loss_fn, params, slots):
        return jax.grad(self._with_slots(loss_fn), argnums=(0, 1))(params, slots)

    def _with_slots(self, loss_fn, watch=lambda slots: slots):
        def loss(params, slots):
            slots = watch(slots)
            for layer in self.layers:
                params = put(params, layer.path, SLOT, slots[layer.name])
            return loss_fn(params, *self.args, **self.kwargs)

        return loss


def without_slots(params: Any) -> Any:
    """``params`` as given to ``value_and_grad``, for use inside ``loss_fn``.

    There the parameters hold the slots of the statistics too. Most losses need not care: the slots are
    zeros, and add nothing to a sum of squares. A loss does that combines the whole tree with another one
    (the distance to older parameters, say), counts its elements, takes a norm of each leaf, or a penalty
    whose derivative is not zero at 0: that derivative would be added to the statistics.

    Example:
      >>> import kfqn_optax as kfqn
      >>> kfqn.without_slots({"dense": {"kernel": 1.0, "kfqn_slot": {"rows": 0.0}}})
      {'dense': {'kernel': 1.0}}
    """
    if not hasattr(params, "items"):
        return params
    plain = {key: without_slots(value) for key, value in params.items() if key != SLOT}
    return type(params)(plain) if is_state(params) else plain


def slots_of(layers: Layers, vectors: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    slots = {}
    for layer in layers:
        slot = {key: jnp.zeros(shape, layer.dtype) for key, shape in layer.slot_shapes.items()}
        if layer.name in vectors:
            slot["vector"] = layer.slot_vector(vectors[layer.name].astype(layer.dtype))
        slots[layer.name] = slot
    return slots
