"""Flax NNX layers as linear maps."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from kfqn_optax._capture.forms import (
    Form,
    Unsupported,
    convolution_form,
    dense_general_form,
    einsum_form,
    embedding_form,
    form_sums,
    linear_form,
)
from kfqn_optax._capture.slot import Slot

BASES: tuple[type[nnx.Module], ...] = (
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Einsum,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.Embed,
)
_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)


def form_of(base: type[nnx.Module], module: Any, ndim: int, outputs: tuple[int, ...]) -> Form:
    """The form of a layer for inputs with ``ndim`` axes and outputs of this shape.

    Everything else is read off the layer's static attributes, which know nothing of stacked copies.
    Raises ``Unsupported``.
    """
    kind, (kernel, _) = base.__name__, one_copy(base, module)
    if base is nnx.Embed:
        return embedding_form(kind, kernel, len(outputs))
    if base is nnx.Linear:
        return linear_form(kind, kernel, ndim)
    if base is nnx.LinearGeneral:
        return dense_general_form(kind, kernel, module.axis, tuple(module.batch_axis), ndim)
    if base is nnx.Einsum:
        return einsum_form(kind, module.einsum_str, kernel, ndim)
    if module.mask is not None:
        raise Unsupported("with a mask over its kernel")
    groups = module.feature_group_count if base is nnx.Conv else 1
    transposed = base is nnx.ConvTranspose and module.transpose_kernel
    return convolution_form(kind, kernel, groups, transposed, outputs)


def form_of_any_call(base: type[nnx.Module], module: Any) -> Form:
    """The form of a layer before it is called: the axes of rows are made up, positions are unknown."""
    kernel, _ = one_copy(base, module)
    ndim = len(kernel)
    if base is nnx.LinearGeneral:
        ndim = len(module.batch_axis) + 2 * max(abs(axis) for axis in module.axis) + 1
    elif base is nnx.Einsum:
        ndim = len(module.einsum_str.replace(" ", "").replace("...", "").split(",")[0])
    return form_of(base, module, ndim, (0,) * len(kernel))


def needs_call(form: Form) -> bool:
    """Whether only a call shows how many positions the layer has."""
    return form.kind in ("Conv", "ConvTranspose")


def one_copy(base: type[nnx.Module], module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes that the kernel and the bias have in one copy of the layer."""
    try:
        if base is nnx.Embed:
            return (module.num_embeddings, module.features), ()
        if base is nnx.Linear:
            return (module.in_features, module.out_features), (module.out_features,)
        if base is nnx.LinearGeneral:
            batch, outputs = tuple(module.batch_axis.values()), tuple(module.out_features)
            return (*batch, *module.in_features, *outputs), (*batch, *outputs)
        if base is nnx.Einsum:
            kernel = tuple(module.kernel_shape)
            operands, out = module.einsum_str.replace(" ", "").split("->")
            lengths = dict(zip(operands.split(",")[1], kernel, strict=False))
            return kernel, tuple(lengths[c] for c in out if c in lengths)
        return tuple(module.kernel_shape), (module.out_features,)
    except AttributeError as error:
        raise Unsupported(f"without the attribute {error.name!r} of nnx.{base.__name__}") from error


class StackedAxes(NamedTuple):
    """Where independent copies of a layer are stacked."""

    kernel: tuple[int, ...]
    bias: tuple[int, ...]
    slot: tuple[int, ...]
    rank: int


def stacked_axes(
    kernel: tuple[int, ...], bias: tuple[int, ...] | None, one: tuple[tuple[int, ...], tuple[int, ...]]
) -> StackedAxes:
    """The stacked axes of parameters of these shapes, whose single copies have the shapes ``one``.

    They are the same for all parameters of a layer, counted from the front or else from the end. Where
    lengths leave a choice, they are the first ones.
    """
    rank, extra = max(3, len(one[0])), len(kernel) - len(one[0])
    shapes = [(kernel, one[0])] + ([] if bias is None else [(bias, one[1])])
    lengths = (len(kernel), len(kernel if bias is None else bias), rank + extra)
    for axes in itertools.combinations(range(len(kernel)), max(extra, 0)):
        if all(_remove(shape, axes) == single for shape, single in shapes):
            return StackedAxes(axes, axes, axes, rank)
        from_end = [axis - len(kernel) for axis in axes]
        if all(_remove(shape, from_end) == single for shape, single in shapes):
            kernel_axes, bias_axes, slot_axes = (tuple(k + n for k in from_end) for n in lengths)
            return StackedAxes(kernel_axes, bias_axes, slot_axes, rank)
    given = kernel if bias is None else (kernel, bias)
    raise Unsupported(f"with parameters of shape {given}, which do not fit its attributes")


def _remove(shape: tuple[int, ...], axes: Any) -> tuple[int, ...] | None:
    n = len(shape)
    if any(not -n <= axis < n for axis in axes):
        return None
    gone = {axis % n for axis in axes}
    return tuple(length for axis, length in enumerate(shape) if axis not in gone)


def sums_of(
    form: Form, base: type[nnx.Module], module: Any, inputs: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    """The sums over rows of a layer's inputs, for ``tap``."""
    if base not in _CONVOLUTIONS:
        return form_sums(form, inputs, slot)
    dtype = slot["inputs"].dtype
    names = ["strides", "padding", "kernel_dilation"]
    if base is nnx.Conv:
        names += ["input_dilation", "conv_general_dilated"]
    else:
        names += ["transpose_kernel"]
    settings = {name: getattr(module, name) for name in names}
    settings.update(use_bias=False, dtype=dtype, param_dtype=dtype, precision="highest")
    build: Any = base

    def one_output(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        groups = {"feature_group_count": kernel.shape[-1]} if base is nnx.Conv else {}
        layer = build(
            inputs.shape[-1],
            kernel.shape[-1] if base is nnx.Conv else 1,
            module.kernel_size,
            kernel_init=lambda *_: kernel,
            rngs=nnx.Rngs(0),
            **settings,
            **groups,
        )
        return jnp.asarray(layer(inputs))

    return form_sums(form, inputs, slot, one_output)
