"""One function of a side over all layers and their copies; equal shapes are done as one."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._capture.layers import Layer, Layers
from kfqn_optax._divided import over_devices
from kfqn_optax._returned import check_returned
from kfqn_optax._sides.inverse import BLOCK, inverse
from kfqn_optax._sides.side import Side

RETURNS = {
    "apply": (1, "H x"),
    "observe": (0, "the state"),
    "start": (0, "the state"),
    "update": (0, "the state"),
}
"""Which of its arguments a function of a side returns another value of, and what it is."""


def copied(layer: Layer, state: Any) -> Any:
    """The state of one copy, repeated over the layer's copies."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, layer.copies + leaf.shape), state)


def each(
    layers: Layers, sides: dict[str, Side], function: str, *arguments: dict[str, Any]
) -> dict[str, Any]:
    """For each layer one function of its side, over all copies; arguments are found by layer name.

    Layers with the same side and shapes are stacked and done as one: a deep model of equal blocks
    compiles, and launches, as few kernels as a single block.
    """
    groups: dict[Any, list[tuple[Layer, Any]]] = {}
    for layer in layers:
        given = [_over_copies(layer, argument[layer.name]) for argument in arguments]
        leaves, structure = jax.tree.flatten(given)
        key = (id(sides[layer.name]), structure, *((x.shape, x.dtype) for x in leaves))
        groups.setdefault(key, []).append((layer, given))
    values = {}
    for members in groups.values():
        first, given = members[0]
        mapped = getattr(sides[first.name], function)
        for _ in first.copies:
            mapped = jax.vmap(mapped)
        if len(members) == 1:
            values[first.name] = _called(function, mapped, given)
            continue
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(given for _, given in members))
        together = _called(function, jax.vmap(mapped), stacked)
        for i, (layer, _) in enumerate(members):
            values[layer.name] = jax.tree.map(operator.itemgetter(i), together)
    return values


def _called(function: str, mapped: Callable[..., Any], given: list[Any]) -> Any:
    """What the function of a side returns, and an error where a side must not return that."""
    value = mapped(*given)
    if function in RETURNS:
        place, what = RETURNS[function]
        check_returned(f"Side.{function}", value, given[place], what)
    return value


def _over_copies(layer: Layer, argument: Any) -> Any:
    """Scalars are the same for all copies."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, layer.copies) if leaf.ndim == 0 else leaf, argument
    )


def inverses(tree: Any, mesh: jax.sharding.Mesh | None = None) -> Any:
    """The inverses of all matrices (..., d, d) of a tree.

    They are grown to multiples of 64 rows and columns, and those of one size are done in one loop, so that
    a network of many widths compiles few of them; with a mesh each on one of its devices.
    """
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        size = -(-leaf.shape[-1] // BLOCK) * BLOCK
        groups.setdefault((size, leaf.dtype), []).append(i)
    done = list(leaves)
    for (size, dtype), members in groups.items():
        grown = []
        for i in members:
            dim = leaves[i].shape[-1]
            added = jnp.diag(jnp.arange(size) >= dim).astype(dtype)
            margin = [(0, 0), (0, size - dim), (0, size - dim)]
            grown.append(jnp.pad(leaves[i].reshape(-1, dim, dim), margin) + added[None])
        together = over_devices(inverse, jnp.concatenate(grown), mesh)
        start = 0
        for i in members:
            shape = leaves[i].shape
            count = math.prod(shape[:-2])
            own = together[start : start + count, : shape[-1], : shape[-1]]
            done[i] = own.reshape(shape)
            start += count
    return jax.tree.unflatten(structure, done)
