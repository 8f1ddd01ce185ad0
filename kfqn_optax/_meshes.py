"""Arrays that are divided over the devices of a mesh whose axes are explicit in their types."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from optax import Params as ArrayTree


def in_any_mesh(function: Callable[..., Any], *args: Any, like: ArrayTree | None = None) -> Any:
    """``function(*args)``, with results divided as the arrays of ``like`` are, or the same on all devices.

    Where a mesh has axes of type ``Explicit``, a sum over an axis that is divided among devices has to say
    where its result goes. Inside ``function`` the compiler decides, as it does everywhere in other meshes.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return function(*args)
    specs = PartitionSpec() if like is None else jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
    return jax.sharding.auto_axes(function, out_sharding=specs)(*args)
