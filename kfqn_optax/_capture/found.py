"""From the forms that were found in a model to its layers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._capture.forms import Form
from kfqn_optax._capture.layers import Layer, Layers, Path
from kfqn_optax._capture.slot import slot_shapes
from kfqn_optax._numerics import wide_dtype

MAX_PATCH = 2048


def layer_of(
    form: Form,
    path: Path,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    kernel_axes: tuple[int, ...],
    bias_axes: tuple[int, ...],
    slot_axes: tuple[int, ...],
    rank: int,
    max_dim: int,
) -> Layer:
    """The static facts of a layer whose parameters have copies stacked along these axes.

    ``rank`` is the number of axes of one copy's slot.
    """
    stack = tuple(jnp.shape(kernel)[axis] for axis in kernel_axes)
    shapes = slot_shapes(
        form.groups,
        form.in_dim,
        form.out_dim,
        rank=rank,
        second_moment=form.in_dim < max_dim and (form.dense or (form.patches and form.in_dim <= MAX_PATCH)),
        grad_moment=form.out_dim <= max_dim,
    )
    return Layer(
        path=path,
        kind=form.kind,
        groups=form.groups,
        in_dim=form.in_dim,
        out_dim=form.out_dim,
        use_bias=bias is not None,
        positions=form.positions,
        stack=stack,
        kernel_axes=kernel_axes,
        bias_axes=() if bias is None else bias_axes,
        slot_axes=slot_axes,
        kernel_name=form.kernel_name,
        kernel_split=form.kernel_split,
        kernel_order=form.kernel_order,
        bias_order=form.output_axes.order,
        kernel_shape=jnp.shape(kernel),
        bias_shape=None if bias is None else jnp.shape(bias),
        slot_shapes={key: _insert(shape, slot_axes, stack) for key, shape in shapes.items()},
        dtype=wide_dtype(kernel),
    )


def with_parts(layers: Layers, parts: int) -> Layers:
    """The same layers, with slots that keep sums for this many equal parts of the rows, if several."""
    if parts == 1:
        return layers
    found = []
    for layer in layers:
        grown = dict(layer.slot_shapes)
        for key, of in (("part_rows", "rows"), ("part_inputs", "inputs"), ("part_grads", "grads")):
            one = [x for i, x in enumerate(layer.slot_shapes[of]) if i not in layer.slot_axes]
            grown[key] = _insert((parts * one[0], *one[1:]), layer.slot_axes, layer.stack)
        found.append(dataclasses.replace(layer, slot_shapes=grown))
    return dataclasses.replace(layers, found=tuple(found))


def layers_of(
    found: Sequence[Layer],
    params: Mapping[Path, Any],
    skipped: Mapping[Path, str],
    model: str,
    strict: bool,
) -> Layers:
    """The layers of ``model`` and its other parameters, with the reason why a module was skipped."""
    taken = {path for layer in found for path in layer.parameter_shapes}
    others = [
        (path, jnp.shape(leaf), skipped.get(path[:-1], "belongs to no layer that this call runs"))
        for path, leaf in params.items()
        if path not in taken
    ]
    layers = Layers(tuple(found), tuple(others), model)
    if not layers.found:
        raise ValueError(f"kfqn.find_layers: {model} has no layer that can be preconditioned.\n{layers}")
    if strict and layers.others:
        raise ValueError(
            f"kfqn.find_layers: with strict=True every parameter must belong to a preconditioned layer."
            f"\n{layers}"
        )
    return layers


def _insert(shape: tuple[int, ...], axes: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[int, ...]:
    grown = list(shape)
    for axis, length in zip(axes, lengths, strict=True):  # axes ascend
        grown.insert(axis, length)
    return tuple(grown)
