"""Factors divided over the devices of a mesh: each device holds, and updates, its share of them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optax import Params as ArrayTree

from kfqn_optax._meshes import in_any_mesh


def check_mesh(mesh: Any) -> None:
    """Raise ``TypeError`` unless ``mesh`` is one of devices, or None."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(
            f"kfqn: factor_mesh is a {type(mesh).__name__}, but it must be a jax.sharding.Mesh. Give what"
            " jax.make_mesh returned, or None to keep all factors on every device."
        )


def divided(state: Any, copies: int, mesh: Mesh | None) -> Any:
    """The state of a side, its matrices divided over all devices of ``mesh``; as it is without one.

    Along the first axis of copies if there is one that they divide, else along the longer of the last two
    axes, which is filled up with zeros to a multiple of the devices.

    Args:
      state: arrays, each with ``copies`` axes in front.
      copies: of a layer's stacked copies, how many axes they have.
      mesh: the mesh.
    """
    if mesh is None:
        return state

    def divide(leaf: jax.Array) -> jax.Array:
        axis = _axis(leaf.shape, copies, mesh.size)
        if axis is None:
            return _placed(leaf, mesh, PartitionSpec())
        missing = -leaf.shape[axis] % mesh.size
        grown = jnp.pad(leaf, [(0, missing if i == axis else 0) for i in range(leaf.ndim)])
        spec = PartitionSpec(*[mesh.axis_names if i == axis else None for i in range(leaf.ndim)])
        return _placed(grown, mesh, spec)

    return jax.tree.map(divide, state)


def gathered(tree: ArrayTree, mesh: Mesh | None) -> ArrayTree:
    """The tree, all of it on every device of ``mesh``."""
    if mesh is None or AxisType.Explicit in mesh.axis_types:
        return tree
    return jax.tree.map(lambda leaf: _placed(leaf, mesh, PartitionSpec()), tree)


def whole(state: Any, like: ArrayTree, mesh: Mesh | None) -> Any:
    """What :func:`divided` was given, in the shapes of ``like``; the compiler leaves it where it is."""
    if mesh is None:
        return state

    def cut(state):
        shortened = lambda leaf, of: leaf[tuple(map(slice, of.shape))]
        return jax.tree.map(shortened, state, like)

    return in_any_mesh(cut, state)


def over_devices(
    function: Callable[[jax.Array], jax.Array], matrices: jax.Array, mesh: Mesh | None
) -> jax.Array:
    """``function`` of each of these matrices (k, d, d), each on one device of ``mesh``."""
    if mesh is None or AxisType.Explicit in mesh.axis_types:
        return jax.vmap(function)(matrices)
    missing = -len(matrices) % mesh.size
    filled = jnp.concatenate([matrices, jnp.broadcast_to(matrices[:1], (missing, *matrices.shape[1:]))])
    spec = PartitionSpec(mesh.axis_names)
    shared = jax.shard_map(jax.vmap(function), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return shared(filled)[: len(matrices)]


def _placed(array: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    put: Any = jax.lax.with_sharding_constraint
    if AxisType.Explicit in mesh.axis_types:
        put = jax.sharding.reshard
    return put(array, NamedSharding(mesh, spec))


def _axis(shape: tuple[int, ...], copies: int, devices: int) -> int | None:
    """Along which axis an array is divided; None for one without a matrix in it."""
    if len(shape) - copies < 2 or math.prod(shape) == 0:
        return None
    if copies and shape[0] % devices == 0:
        return 0
    longer = len(shape) - (2 if shape[-2] >= shape[-1] else 1)
    return longer if shape[longer] >= devices else None
