"""The way between a tree of parameters, or of anything shaped like them, and the layers it holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import Params as ArrayTree

from kfqn_optax._capture.layers import Layer, Layers, Path
from kfqn_optax._capture.nnx import is_box


def is_masked(leaf: object) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def leaves_by_path(tree: ArrayTree) -> tuple[dict[Path, Any], Any]:
    """The leaves of a tree (and its ``MaskedNode``), keyed by path, in tree order, and its structure."""
    # A box around a leaf (nn.Partitioned) is not a place in the tree: its attribute is not in the path.
    ends = lambda node: is_masked(node) or is_box(node)
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=ends)
    leaves = {
        _path(keys): leaf for keys, node in nodes for leaf in jax.tree.leaves(node, is_leaf=is_masked)
    }
    return leaves, jax.tree.structure(tree, is_leaf=is_masked)


def _path(keys: tuple[object, ...]) -> Path:
    unnamed = jax.tree_util.FlattenedIndexKey  # what is in a box of another package
    while len(keys) > 1 and isinstance(keys[-1], unnamed):
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def put(tree: Any, path: Path, key: str, value: Any) -> Any:
    """``tree`` with ``value`` at ``key`` in the branch at ``path``; the tree given is not changed."""
    if hasattr(tree, "_replace"):  # a NamedTuple
        return tree._replace(**{path[0]: put(getattr(tree, path[0]), path[1:], key, value)})
    if dataclasses.is_dataclass(tree):
        changed: Any = dataclasses.replace
        return changed(tree, **{path[0]: put(getattr(tree, path[0]), path[1:], key, value)})
    if isinstance(tree, (list, tuple)):
        branches = list(tree)
        branches[int(path[0])] = put(branches[int(path[0])], path[1:], key, value)
        return type(tree)(branches)
    if path:
        branch = next(k for k in tree if str(k) == path[0])  # keys need not be strings
        key, value = branch, put(tree[branch], path[1:], key, value)
    grown = {**tree, key: value}
    return grown if isinstance(tree, dict) else type(tree)(grown)  # an nnx.State stays one


def check_parameters(layers: Layers, params: ArrayTree, call: str) -> None:
    """Raise ``ValueError`` unless ``params`` has every layer's parameters, with the shapes found."""
    present, _ = leaves_by_path(params)
    for path, leaf in present.items():
        if not is_masked(leaf) and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"{call}: {'/'.join(path)!r} is of {jnp.result_type(leaf)}, of which there is no gradient."
                " Keep it out of the parameters, in another collection or argument of the loss."
            )
    for layer in layers:
        for path, shape in layer.parameter_shapes.items():
            leaf = _lookup(present, path)
            if leaf is None:
                raise ValueError(_not_there(layers, layer, path, present, call))
            if not is_masked(leaf) and jnp.shape(leaf) != shape:
                raise ValueError(
                    f"{call}: the parameter {'/'.join(path)!r} has shape {jnp.shape(leaf)}, but it had"
                    f" {shape} when kfqn.find_layers looked at {layers.model}. Call find_layers again"
                    " with the model and the variables that you train."
                )


def check_like(params: ArrayTree, tree: ArrayTree, call: str) -> None:
    """Raise ``ValueError`` unless ``tree`` is shaped like ``params``, or has ``MaskedNode`` in places."""
    wanted, _ = leaves_by_path(params)
    given, _ = leaves_by_path(tree)
    shapes, own = (
        {path: jnp.shape(leaf) for path, leaf in leaves.items() if not is_masked(leaf)}
        for leaves in (wanted, given)
    )
    for path in {**own, **shapes}:
        if own.get(path) != shapes.get(path) and not is_masked(_lookup(given, path)):
            has, has_not = "an array of shape {}", "no array"
            of_tree, of_params = (
                has.format(found[path]) if path in found else has_not for found in (own, shapes)
            )
            raise ValueError(
                f"{call}: the tree given has {of_tree} at {'/'.join(path)!r}, where the parameters have"
                f" {of_params}. Give a tree shaped like the parameters."
            )


def _lookup(leaves: Mapping[Path, jax.Array], path: Path) -> jax.Array | None:
    """The leaf at ``path``, or the ``MaskedNode`` that stands for the branch holding it."""
    for length in range(len(path), -1, -1):
        leaf = leaves.get(path[:length])
        if leaf is not None and (length == len(path) or is_masked(leaf)):
            return leaf
    return None


def _not_there(
    layers: Layers, layer: Layer, path: Path, present: Mapping[Path, jax.Array], call: str
) -> str:
    if list(present) == [()] and "value_and_grad" in call:
        return (
            f"{call}: the parameters are one array of shape {jnp.shape(present[()])}. Call it with the"
            " parameters first, and the batch after them."
        )
    if list(present) == [()]:
        return (
            f"{call}: the parameters are one array of shape {jnp.shape(present[()])}, in which no layer"
            " can be told from another. optax.flatten cannot go around a Kronecker-factored"
            " transformation: put it inside the chain, around the other transformations only."
        )
    shown = ["/".join(leaf) for leaf in present][:8]
    nested = [leaf[: -len(path)] for leaf in present if leaf[-len(path) :] == path]
    remedy = "Call find_layers on the model whose parameters loss_fn takes."
    if nested and nested[0] == ("params",):
        remedy = "These are the variables of the model: pass variables['params']."
    elif nested and nested[0]:
        remedy = (
            f"The same path is there below {'/'.join(nested[0])!r}: join each model's layers with"
            f" kfqn.join_layers({{{nested[0][0]!r}: layers, ...}})."
        )
    return (
        f"{call}: layer {layer.name!r} of {layers.model} has a parameter {'/'.join(path)!r}, but the"
        f" parameters given hold {shown}{' ...' if len(present) > len(shown) else ''}. {remedy}"
    )


def layers_within(layers: Layers, tree: ArrayTree, call: str) -> Layers:
    """The layers whose parameters ``tree`` holds unmasked; a masked bias leaves the kernel's rows.

    A tree of some of the parameters (``nnx.Optimizer(wrt=...)``) may leave layers out: these are masked.
    """
    present, _ = leaves_by_path(tree)
    held = [
        layer
        for layer in layers
        if any(_lookup(present, path) is not None for path in layer.parameter_shapes)
    ]
    layers = dataclasses.replace(layers, found=tuple(held) or layers.found)
    check_parameters(layers, tree, call)
    for path, leaf in present.items():
        if not is_masked(leaf) and jnp.iscomplexobj(leaf):
            raise ValueError(
                f"{call}: {'/'.join(path)!r} is of {leaf.dtype}, not of real numbers. Keep its real and"
                " imaginary parts apart, or leave it to another optimizer with optax.partition."
            )
    kept = []
    for layer in layers:
        masked = {path[-1] for path in layer.parameter_shapes if is_masked(_lookup(present, path))}
        if layer.kernel_name not in masked:
            kept.append(dataclasses.replace(layer, use_bias=layer.use_bias and not masked))
    return dataclasses.replace(layers, found=tuple(kept))


def trained(layers: Layers, tree: ArrayTree) -> list[Layer]:
    """The layers whose kernels ``tree`` holds unmasked."""
    present, _ = leaves_by_path(tree)
    kernels = ((layer, _lookup(present, (*layer.path, layer.kernel_name))) for layer in layers)
    return [layer for layer, kernel in kernels if kernel is not None and not is_masked(kernel)]


def get_matrices(layers: Layers, tree: ArrayTree) -> dict[str, jax.Array]:
    """For each layer its matrix (*copies, d_in [+ 1], d_out) from a tree shaped like the parameters."""
    leaves, _ = leaves_by_path(tree)
    return {
        layer.name: layer.get_matrix(
            leaves[*layer.path, layer.kernel_name],
            leaves[*layer.path, "bias"] if layer.use_bias else None,
        )
        for layer in layers
    }


def set_matrices(layers: Layers, tree: ArrayTree, matrices: Mapping[str, jax.Array]) -> ArrayTree:
    """``tree`` with the layers' leaves replaced from their matrices; all other leaves as they are."""
    leaves, structure = leaves_by_path(tree)
    for layer in layers:
        kernel, bias = layer.set_matrix(matrices[layer.name])
        leaves[*layer.path, layer.kernel_name] = kernel
        if bias is not None:
            leaves[*layer.path, "bias"] = bias
    return jax.tree.unflatten(structure, list(leaves.values()))
