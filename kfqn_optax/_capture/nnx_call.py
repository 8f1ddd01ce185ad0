"""One call of a loss of an NNX model, which can be made again at other parameters."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from optax import Params as ArrayTree

from kfqn_optax._capture.layers import Layers, Path
from kfqn_optax._capture.nnx import GRAPH, as_arrays
from kfqn_optax._capture.nnx_tap import attach, detach
from kfqn_optax._capture.parameters import leaves_by_path
from kfqn_optax._capture.routes import Candidate, Found, Record, Routes, active, routing
from kfqn_optax._capture.slot import SLOT, Slot
from kfqn_optax._shown import shown


class ModelCall:
    """One call of losses on a model, which can be repeated from where the model was at the start.

    Attributes:
      params: the parameters at the start, a State of arrays.
    """

    def __init__(self, layers: Layers, model: nnx.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        self.params = as_arrays(nnx.state(model, nnx.Param))
        self._layers = layers
        self._found = Found()
        self._model, self.args, self._kwargs = model, args, kwargs
        # Random streams and metrics among the arguments are brought back to the start, too.
        self._leaves, self._structure = jax.tree.flatten((args, dict(kwargs)), is_leaf=_is_node)
        graphdef, state = nnx.split((model, *filter(_is_node, self._leaves)))
        self._start = graphdef, as_arrays(state)

    def value_and_grad(
        self, loss_fn: Callable[..., Any], slots: Mapping[str, Slot], has_aux: bool, record: Record
    ) -> tuple[Any, Any, Any]:
        """Value, gradients and slot gradients; everything else the loss does to the model happens to it."""
        argnums = (nnx.DiffState(0, nnx.Param), 1)
        loss = self._with_slots(loss_fn, record=record)
        function = nnx.value_and_grad(loss, argnums=argnums, has_aux=has_aux, **GRAPH)
        value, (grads, sums) = function(self._model, dict(slots), self.args, dict(self._kwargs))
        self._found.counts = None if record.mixed else record.counts
        return value, grads, sums

    def slot_grads(
        self, loss_fn: Callable[..., Any], params: ArrayTree, slots: Mapping[str, Slot], has_aux: bool
    ) -> tuple[jax.Array, Any]:
        """The loss and the slot gradients at ``params``; the model stays as it is."""
        model, args, kwargs = self._at(params)
        counts = self._found.counts
        moved: Any = (nnx.DiffState(0, nnx.Param), 1) if counts is None else 1
        loss = self._with_slots(loss_fn, counts=counts)
        function = nnx.value_and_grad(loss, argnums=moved, has_aux=has_aux, **GRAPH)
        value, sums = function(model, dict(slots), args, kwargs)
        return (value[0] if has_aux else value), sums[1] if counts is None else sums

    def all_grads(
        self, loss_fn: Callable[..., Any], params: ArrayTree, slots: Mapping[str, Slot]
    ) -> tuple[Any, Any]:
        """The gradients at ``params``, of the parameters and the slots; the model stays as it is."""
        model, args, kwargs = self._at(params)
        argnums = (nnx.DiffState(0, nnx.Param), 1)
        grads, sums = nnx.grad(self._with_slots(loss_fn), argnums=argnums, **GRAPH)(
            model, dict(slots), args, kwargs
        )
        return as_arrays(grads), sums

    def value(self, loss_fn: Callable[..., Any], params: ArrayTree, has_aux: bool) -> jax.Array:
        """The loss at ``params``; the model stays as it is."""
        model, args, kwargs = self._at(params)
        value = loss_fn(model, *args, **kwargs)
        return value[0] if has_aux else value

    def with_args(self, args: tuple[Any, ...]) -> "ModelCall":
        """The same call with other arrays among its positional arguments."""
        call = copy.copy(self)
        call.args = args
        call._leaves = jax.tree.leaves((args, dict(self._kwargs)), is_leaf=_is_node)
        return call

    def _at(self, params: ArrayTree) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Copies of the model, at ``params``, and of the arguments, as they were at the start."""
        graphdef, state = self._start
        model, *nodes = nnx.merge(graphdef, state, copy=True)
        nnx.update(model, params)
        copies = iter(nodes)
        leaves = [next(copies) if _is_node(leaf) else leaf for leaf in self._leaves]
        return model, *jax.tree.unflatten(self._structure, leaves)

    def _with_slots(
        self,
        loss_fn: Callable[..., Any],
        counts: Mapping[int, bool] | None = None,
        record: Record | None = None,
    ) -> Callable[..., Any]:
        layers = {layer.path: [Candidate((), layer)] for layer in self._layers}

        def loss(model, slots, args, kwargs):
            slots = slots if record is None else record.watch(slots)
            attach(model, layers, {x.path: slots[x.name] for x in self._layers if x.stack})
            routes = Routes(
                self._layers, {}, slots, lambda params: loss_fn(model, *args, **kwargs), counts, record
            )
            with routing(routes):
                value = loss_fn(model, *args, **kwargs)
            detach(model)
            return value

        return loss


def _is_node(leaf: object) -> bool:
    return isinstance(leaf, (nnx.Pytree, nnx.Variable))


def copier(tree: Any) -> Callable[[], Any]:
    """A function that returns ``tree`` with copies of its NNX nodes, made where it is called.

    What they hold may then be changed inside a transformation that does not know of them.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_node)
    nodes = [leaf for leaf in leaves if _is_node(leaf)]
    if not nodes:
        return lambda: tree
    graphdef, state = nnx.split(nodes)

    def copied():
        copies = iter(nnx.merge(graphdef, state, copy=True))
        return jax.tree.unflatten(structure, [next(copies) if _is_node(leaf) else leaf for leaf in leaves])

    return copied


def merge(graphdef: Any, *states: Any) -> Any:
    """``nnx.merge`` for a loss of the parameters alone, as the functional style of NNX has it.

    Inside the loss of ``kfqn.value_and_grad`` it taps the layers of the model that it returns, of which
    plain ``nnx.merge`` knows nothing; anywhere else it is ``nnx.merge(..., copy=True)``.

    Args:
      graphdef, *states: what ``nnx.split`` returned, the parameters among them.

    Returns:
      The model, a copy.

    Example:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((8, 3))
      >>> layers = kfqn.find_layers(model, x)
      >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
      >>> def loss_fn(params, rest, x):
      ...     return jnp.mean(kfqn.merge(graphdef, params, rest)(x) ** 2)
      >>> loss, grads, curvature = kfqn.value_and_grad(loss_fn, layers)(params, rest, x)
      >>> curvature.statistics["."].inputs
      Array([1., 1., 1., 1.], dtype=float32)
    """
    if not isinstance(graphdef, nnx.GraphDef) or not states:
        raise TypeError(
            f"kfqn.merge: got {shown(graphdef)} and {len(states)} states. Write kfqn.merge(graphdef,"
            " params, rest) with what nnx.split(model, nnx.Param, ...) returned, in its order."
        )
    for state in states:
        if not isinstance(state, (nnx.State, Mapping)):
            raise TypeError(
                f"kfqn.merge: expected an nnx.State, got a {type(state).__name__}. Call what"
                " kfqn.value_and_grad returned with the State of the parameters, as nnx.split gave it."
            )
    beside: dict[Path, Slot] = {}
    plain = [_without_slots(state, (), beside) for state in states]
    model, routes = nnx.merge(graphdef, *plain, copy=True), active()
    if routes is not None:
        visible, _ = leaves_by_path(as_arrays(nnx.state(model, nnx.Param)))
        with routes.enter((), visible) as stacked:
            found = {
                path: routes.candidates(path, kernel, whole=True) for path, kernel in _kernels(visible)
            }
        attach(model, {path: layers for path, layers in found.items() if layers}, stacked | beside)
    return model


def _kernels(visible: Mapping[Path, jax.Array]) -> list[tuple[Path, jax.Array]]:
    return [
        (path[:-1], leaf) for path, leaf in visible.items() if path[-1:] in (("kernel",), ("embedding",))
    ]


def _without_slots(state: Any, path: Path, slots: dict[Path, Slot]) -> Any:
    """``state`` without the slots of :func:`with_slots`, which are entered in ``slots``."""
    if not isinstance(state, (nnx.State, dict)):
        return state
    if SLOT in state:
        slots[path] = state[SLOT]
    return type(state)(
        {
            key: _without_slots(value, (*path, str(key)), slots)
            for key, value in state.items()
            if key != SLOT
        }
    )
