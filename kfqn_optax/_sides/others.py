"""A diagonal factor for the parameters that belong to no layer, in the units of the layers' factors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.parameters import is_masked, leaves_by_path
from kfqn_optax._numerics import ema, wide_dtype


class OthersState(NamedTuple):
    """State of the parameters that belong to no layer, by their path.

    Attributes:
      mean: moving average of the gradient.
      second_moment: moving average of the diagonal of the Gauss-Newton matrix.
      count: batches seen.
    """

    mean: dict[str, jax.Array]
    second_moment: dict[str, jax.Array]
    count: jax.Array


def init(layers: Layers, params: ArrayTree) -> OthersState:
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in _others(layers, params).items()}
    return OthersState(zeros, dict(zeros), jnp.zeros([], jnp.int32))


def observe(
    state: OthersState,
    layers: Layers,
    grads: ArrayTree,
    sampled: ArrayTree | None,
    examples: jax.Array | float,
    good: jax.Array,
    decay: float,
) -> OthersState:
    """Averages of the diagonal of the Gauss-Newton matrix C.

    Args:
      grads: the gradient of the batch.
      sampled: the gradient of labels sampled from the model, of which the expected square is the diagonal
        of C; None if the loss does not name a distribution. C is then taken to be ``examples`` times the
        variance of ``grads`` from batch to batch.
      examples: how many examples a batch has.
      good: whether this batch counts.
      decay: rate of the averages, which are plain means at first.
    """
    own = _others(layers, grads)
    drawn = None if sampled is None else _others(layers, sampled)
    mean, second = {}, {}
    for name, g in own.items():
        if drawn is None:
            square = jnp.square(g - state.mean[name]) * jnp.asarray(examples, g.dtype)
        else:
            square = jnp.square(drawn[name])
        beta = jnp.minimum(decay, 1 - 1 / (state.count + 1).astype(g.dtype)).astype(g.dtype)
        mean[name] = jnp.where(good, ema(state.mean[name], g, beta), state.mean[name])
        usable = good & jnp.isfinite(square)
        second[name] = jnp.where(
            usable, ema(state.second_moment[name], square, beta), state.second_moment[name]
        )
    return OthersState(mean, second, state.count + good.astype(jnp.int32))


def apply(state: OthersState, layers: Layers, tree: ArrayTree, damping: jax.Array) -> ArrayTree:
    """(diag C + damping)^-1 times those leaves of ``tree`` that belong to no layer; the rest as it is."""
    leaves, structure = leaves_by_path(tree)
    for path in paths(layers, tree):
        second = state.second_moment["/".join(path)]
        leaves[path] = leaves[path] / (second + damping.astype(second.dtype))
    return jax.tree.unflatten(structure, list(leaves.values()))


def paths(layers: Layers, tree: ArrayTree) -> list[tuple[str, ...]]:
    """Where the parameters are that belong to no layer and are not masked."""
    taken = {path for layer in layers for path in layer.parameter_shapes}
    leaves, _ = leaves_by_path(tree)
    return [path for path, leaf in leaves.items() if path not in taken and not is_masked(leaf)]


def _others(layers: Layers, tree: ArrayTree) -> dict[str, jax.Array]:
    leaves, _ = leaves_by_path(tree)
    wide = lambda leaf: jnp.asarray(leaf, wide_dtype(leaf))
    return {"/".join(path): wide(leaves[path]) for path in paths(layers, tree)}
