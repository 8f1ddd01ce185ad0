"""Which rows count in a layer's means: the weights that a loss gives, for padding."""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp

from kfqn_optax._capture.program import equations
from kfqn_optax._capture.slot import Slot
from kfqn_optax._meshes import in_any_mesh
from kfqn_optax._shown import shown


class _Local(threading.local):
    value: jax.Array | None = None
    doubtful = False


_local = _Local()

# Part of JAX's trace-cache key, as in ``routes.py``: a function that is jitted on its own, or the body of a
# loop or a checkpoint that is defined once, is traced anew within each ``with``.
_tracing = jax.make_user_context(None)
_contexts = itertools.count()


@contextlib.contextmanager
def weights(value: jax.Array) -> Iterator[None]:
    """Within this context, inside ``loss_fn``, rows count in the layers' means by these weights.

    Padding then does not count: give the mask of the tokens or examples that the loss counts.

    Args:
      value: weights, 0 for padding and 1 otherwise, or any number from 0; its axes are the leading axes
        of the layers' rows, for example (batch, length). Axes over which ``jax.vmap`` maps the model are
        leading axes too, the outermost first, unless the weights fit the rows of each mapped call. A layer
        with more axes repeats the weights over the rest. In a layer with fewer axes, as after pooling, a
        row counts if any weight in it is positive.

    Raises:
      ValueError: while tracing, if the axes of a layer's rows do not start with those of the weights; from
        ``value_and_grad``, if a layer with fewer axes is called in a loop, as the cell of a recurrent layer
        is: a step of the loop cannot tell which of the weights are its own.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Dense(2), jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])
      >>> mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> def loss_fn(params, x):
      ...     with kfqn.weights(mask):
      ...         outputs = model.apply({"params": params}, x)
      ...     return (mask[..., None] * outputs**2).sum() / mask.sum()
      >>> layers = kfqn.find_layers(model, variables, x)
      >>> _, _, curvature = kfqn.value_and_grad(loss_fn, layers)(variables["params"], x)
      >>> float(curvature.statistics["."].rows)
      5.0
    """
    if not hasattr(value, "dtype") and not isinstance(value, (int, float, list, tuple)):
        raise TypeError(
            f"kfqn.weights: got {shown(value)}. Give an array of numbers, such as the loss's mask."
        )
    with _set(jnp.asarray(value)), _tracing(next(_contexts)):
        yield


@contextlib.contextmanager
def _set(value: jax.Array | None) -> Iterator[None]:
    before = _local.value
    _local.value = value
    try:
        yield
    finally:
        _local.value = before


def row_weights(rows: jax.Array, dtype: jnp.dtype) -> jax.Array | None:
    """The weights of a layer's rows, or None where all rows count alike.

    Args:
      rows: any array with one element a row, for its shape, and for the axes over which it is mapped.
      dtype: of the weights.
    """
    if _local.value is None:
        return None
    return _weights_of(*jax.lax.stop_gradient((rows, _local.value.astype(dtype))))


def _fitted(rows: jax.Array, w: jax.Array) -> jax.Array:
    common = min(rows.ndim, w.ndim)
    if rows.shape[:common] != w.shape[:common]:
        _local.doubtful = True  # an outer vmap may bring the axes that are missing
        return kfqn_weights_that_do_not_fit(rows, w)
    if w.ndim > rows.ndim:
        _local.doubtful = True
        return kfqn_pooled_weights(w, rows.ndim)
    return jnp.broadcast_to(w.reshape(w.shape + (1,) * (rows.ndim - w.ndim)), rows.shape)


# These two are jitted to have names in the program, by which ``check`` finds them.
MISFIT, POOLED = "kfqn_weights_that_do_not_fit", "kfqn_pooled_weights"


@jax.jit
def kfqn_weights_that_do_not_fit(rows: jax.Array, w: jax.Array) -> jax.Array:
    del w
    return jnp.zeros(rows.shape, jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def kfqn_pooled_weights(w: jax.Array, axes: int) -> jax.Array:
    """Whether any weight is positive, for each index of the leading axes."""
    return (w > 0).any(tuple(range(axes, w.ndim))).astype(w.dtype)


_weights_of = jax.custom_batching.custom_vmap(_fitted)


@_weights_of.def_vmap
def _weights_of_mapped(axis_size, in_batched, rows, w):
    """An axis over which rows are mapped, and the weights are not, is one of those in front of the rows.

    Unless the weights fit the rows without it: then they were given to each mapped call.
    """
    if in_batched == [True, False]:
        inside = 0 < w.ndim < rows.ndim and rows.shape[1 : 1 + w.ndim] == w.shape
        if inside and rows.shape[: w.ndim] == w.shape:
            raise ValueError(
                f"kfqn.weights: weights of shape {w.shape} may be those of an axis of length {axis_size}"
                f" that is mapped by jax.vmap, or of the rows of each mapped call, {rows.shape[1:]}. Give"
                f" weights with all axes, {rows.shape}."
            )
        return (_fitted(rows[0], w), False) if inside else (_weights_of(rows, w), True)
    axes = tuple(0 if batched else None for batched in in_batched)
    return jax.vmap(_fitted, axes)(rows, w), True


@contextlib.contextmanager
def doubts() -> Iterator[Callable[[], bool]]:
    """Within this context, whether a layer was met of whose weights the program must be asked."""
    before, _local.doubtful = _local.doubtful, False
    try:
        yield lambda: _local.doubtful
    finally:
        _local.doubtful = before


def check(program: Any) -> None:
    """Raise ``ValueError`` if weights do not fit in a program, or are pooled in a loop of it."""
    for equation, in_loop in equations(program):
        name = equation.params.get("name")
        if name == MISFIT:
            rows, w = (variable.aval.shape for variable in equation.invars)
            raise ValueError(
                f"kfqn.weights: weights of shape {w} do not fit a layer whose rows have shape {rows}. Give"
                " weights whose axes are the leading axes of every layer's rows, such as (batch, length)."
            )
        if name == POOLED and in_loop:
            raise ValueError(
                f"kfqn.weights: weights of shape {equation.invars[0].aval.shape} have more axes than the"
                f" rows, {equation.outvars[0].aval.shape}, of a layer that is called in a loop, such as the"
                " cell of a recurrent layer. A step of the loop cannot tell which weights are its own. Put"
                " kfqn.weights around what follows the recurrent layer alone (inside the model, where both"
                " are one call), or give weights with one axis, those of the examples."
            )


def weights_now() -> jax.Array | None:
    """The weights of this context, if there are any."""
    return _local.value


def over_rows(
    sums_of: Callable[[jax.Array, Slot], dict[str, jax.Array]], inputs: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    """``sums_of(inputs, slot)``, sums over rows that may be divided over the devices of any mesh."""

    def weighted(inputs, slot, w):
        with _set(w):
            return sums_of(inputs, slot)

    return in_any_mesh(weighted, inputs, slot, weights_now())
