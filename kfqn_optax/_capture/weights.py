"""Which rows count in a layer's means: the weights that a loss gives, for padding."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from kfqn_optax._capture.slot import Slot
from kfqn_optax._meshes import in_any_mesh
from kfqn_optax._shown import shown


class _Weights(threading.local):
    value: jax.Array | None = None


_weights = _Weights()


@contextlib.contextmanager
def weights(value: jax.Array) -> Iterator[None]:
    """Within this context, inside ``loss_fn``, rows count in the layers' means by these weights.

    Padding then does not count: give the mask of the tokens or examples that the loss counts.

    Args:
      value: weights, 0 for padding and 1 otherwise, or any number from 0; its axes are the leading axes
        of the layers' rows, for example (batch, length). A layer with more axes repeats them over the
        rest. In a layer with fewer axes, as after pooling, a row counts if any weight in it is positive.

    Raises:
      ValueError: while tracing, if the axes of a layer's rows do not start with those of the weights.

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
    before = _weights.value
    _weights.value = jnp.asarray(value)
    try:
        yield
    finally:
        _weights.value = before


def row_weights(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array | None:
    """The weights of rows that have these axes, or None where all rows count alike."""
    if _weights.value is None:
        return None
    w = jax.lax.stop_gradient(_weights.value).astype(dtype)
    common = min(len(shape), w.ndim)
    if shape[:common] != w.shape[:common]:
        raise ValueError(
            f"kfqn.weights: weights of shape {w.shape} do not fit a layer whose rows have shape {shape}."
            " Give weights whose axes are the leading axes of every layer's rows, such as (batch, length)."
        )
    if w.ndim > len(shape):
        return (w > 0).any(tuple(range(common, w.ndim))).astype(dtype)
    return jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(shape) - w.ndim)), shape)


def weights_now() -> jax.Array | None:
    """The weights of this context, if there are any."""
    return _weights.value


def over_rows(
    sums_of: Callable[[jax.Array, Slot], dict[str, jax.Array]], inputs: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    """``sums_of(inputs, slot)``, sums over rows that may be divided over the devices of any mesh."""

    def weighted(inputs, slot, w):
        with contextlib.nullcontext() if w is None else weights(w):
            return sums_of(inputs, slot)

    return in_any_mesh(weighted, inputs, slot, weights_now())
