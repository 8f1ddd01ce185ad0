"""Arrays that are divided over the devices of a mesh whose axes are explicit in their types."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import Params as ArrayTree


def in_any_mesh(
    function: Callable[..., Any],
    *args: Any,
    like: ArrayTree | None = None,
    specs: ArrayTree | None = None,
) -> Any:
    """``function(*args)``, with results divided as the arrays of ``like`` are, or by ``specs``.

    Without both the results are the same on all devices. Where a mesh has axes of type ``Explicit``, a sum
    over an axis that is divided among devices has to say where its result goes. Inside ``function`` the
    compiler decides, as it does everywhere in other meshes.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    if like is not None:
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, like)
    elif specs is None:
        specs = PartitionSpec()
    # With the mesh itself, for arrays that are placed on it where no jax.set_mesh says so.
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.sharding.auto_axes(function, out_sharding=places)(*args)


def spec_with(leaf: jax.Array, rows: int) -> PartitionSpec:
    """How ``leaf`` is divided over devices, for an array like it with another number of rows.

    The rows are the same on all devices if these cannot have equal parts of them.
    """
    sharding = jax.typeof(leaf).sharding
    if not len(sharding.spec) or sharding.spec[0] is None:
        return sharding.spec
    first, *others = sharding.spec
    names = first if isinstance(first, tuple) else (first,)
    parts = math.prod(sharding.mesh.shape[name] for name in names)
    return sharding.spec if rows % parts == 0 else PartitionSpec(None, *others)


def _explicit_mesh(tree: ArrayTree) -> Any:
    """The mesh around, or of an array, if it has explicit axes; else None."""
    around = jax.sharding.get_abstract_mesh()
    leaves = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    meshes = [around, *(jax.typeof(leaf).sharding.mesh for leaf in leaves)]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
