"""Flax linen layers as linear maps."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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


def form_of(
    base: type[nn.Module],
    module: Any,
    params: dict[str, Any],
    inputs: jax.Array,
    outputs: jax.Array,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Form:
    """The form of a layer called with ``inputs`` and returning ``outputs``; raises ``Unsupported``."""
    kind = base.__name__
    if base is nn.Embed:
        return embedding_form(kind, params["embedding"].shape, outputs.ndim)
    kernel = params["kernel"].shape
    if base is nn.Dense:
        return linear_form(kind, kernel, inputs.ndim)
    if base is nn.DenseGeneral:
        return dense_general_form(
            kind, kernel, _sequence(module.axis), _sequence(module.batch_dims), inputs.ndim
        )
    if base is nn.Einsum:
        given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
        return einsum_form(kind, given or module.einsum_str, kernel, inputs.ndim)
    if base is nn.ConvLocal:
        raise Unsupported("has weights of its own at every position")
    if module.mask is not None:
        raise Unsupported("with a mask over its kernel")
    groups = module.feature_group_count if base is nn.Conv else 1
    return convolution_form(kind, kernel, groups, _is_transposed(base, module), outputs.shape)


def sums_of(
    form: Form, base: type[nn.Module], module: Any, inputs: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    """The sums over rows of a layer's inputs, for ``tap``."""
    if base not in (nn.Conv, nn.ConvTranspose):
        return form_sums(form, inputs, slot)
    dtype = slot["inputs"].dtype
    settings = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(base)
        if field.init and field.name not in ("parent", "name", "features", "feature_group_count")
    }
    settings.update(use_bias=False, dtype=dtype, param_dtype=dtype, precision="highest")
    build: Any = base

    def one_output(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        groups = kernel.shape[-1]
        of_call = (
            {"features": groups, "feature_group_count": groups} if base is nn.Conv else {"features": 1}
        )
        module = build(**settings, **of_call, parent=None)
        return jnp.asarray(module.apply({"params": {"kernel": kernel}}, inputs))

    return form_sums(form, inputs, slot, one_output)


def _is_transposed(base: type[nn.Module], module: Any) -> bool:
    return base is nn.ConvTranspose and module.transpose_kernel


def _sequence(axes: Any) -> tuple[int, ...]:
    return tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
