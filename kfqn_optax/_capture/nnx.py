"""Flax NNX: what is a model or a state, the modules in one, and the arrays that variables hold."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from kfqn_optax._capture.layers import Path

_as_pure: Callable[[Any], Any] = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
# Gradients of some of a model's variables need the graph mode, whatever the user has set it to.
_PARAMETERS = inspect.signature(nnx.value_and_grad).parameters
GRAPH: dict[str, Any] = {name: True for name in ("graph", "graph_updates") if name in _PARAMETERS}
jit_with_models = nnx.jit


def is_model(value: object) -> bool:
    return isinstance(value, nnx.Module)


def is_state(value: object) -> bool:
    return isinstance(value, nnx.State)


def is_box(value: object) -> bool:
    """Whether it is a leaf with what is known about it around (``nn.Partitioned``, ``nnx.Param``)."""
    return isinstance(value, (meta.AxisMetadata, nnx.Variable))


def as_arrays(tree: Any) -> Any:
    """``tree`` with the arrays that NNX variables hold in the place of the variables."""
    return _as_pure(tree)


def assign(tree: Any, arrays: Any) -> Any:
    """``tree`` with these arrays; where all of it is NNX variables, they are set, and it is returned."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    if all(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable))):
        nnx.update(tree, nnx.state(arrays))
        return tree
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(arrays))


def modules_of(model: Any) -> dict[Path, Any]:
    """The modules in a model, each once, under the first of its paths."""
    return {
        tuple(str(key) for key in path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    }
