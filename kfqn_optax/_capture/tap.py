"""The cotangent tap: an identity whose backward rule delivers a layer's statistics as its slot's gradient.

So the statistics have no side effect to leak; ``slot.py`` lists them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._capture.slot import Slot
from kfqn_optax._capture.sums import split_rows
from kfqn_optax._meshes import in_any_mesh


class OutputAxes(NamedTuple):
    """Where a layer's output keeps what the kernel produced.

    Attributes:
      rows: axes that are examples or positions.
      order: for the remaining axes, the order that puts groups first and then output features.
    """

    rows: tuple[int, ...]
    order: tuple[int, ...]


def tap(outputs: jax.Array, slot: Slot, sums: Slot, axes: OutputAxes) -> jax.Array:
    """Return ``outputs`` unchanged; the gradient of the slot is ``sums``, and ``grads``."""
    _check_dtype(slot)
    return _tap(axes, outputs, dict(slot), jax.lax.stop_gradient(dict(sums)))


def add_virtual_bias(outputs: jax.Array, slot: Slot, axes: OutputAxes) -> jax.Array:
    """Return ``outputs`` plus zeros, of which the gradient is ``grads``; any kind of differentiation.

    Unlike ``tap`` it allows forward mode, and delivers nothing but ``grads``.
    """
    _check_dtype(slot)
    lengths = [length for i, length in enumerate(outputs.shape) if i not in axes.rows]
    ordered = [lengths[i] for i in axes.order]
    inverse = sorted(range(len(axes.order)), key=axes.order.__getitem__)
    bias = slot["grads"].reshape(ordered).transpose(inverse)
    full = [1 if i in axes.rows else length for i, length in enumerate(outputs.shape)]
    return outputs + bias.reshape(full).astype(outputs.dtype)


def _check_dtype(slot: Slot) -> None:
    dtype = slot["rows"].dtype
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"kfqn.value_and_grad: the parameters reached the model as {dtype}, and so did the statistics,"
            " which need float32. Do not cast the parameters inside loss_fn: give the modules"
            f" dtype={dtype} instead, and leave param_dtype at float32."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(axes, outputs, slot, sums):
    del axes, slot, sums
    return outputs


def _tap_forward(axes, outputs, slot, sums):
    # Only sums over rows are kept for the backward pass: never an activation, and nothing that would
    # make rematerialisation run the layer again. Where the loss differentiates the model itself, this
    # rule is that inner derivative's, and the outer one must meet a tap again.
    ours = {key: value for key, value in slot.items() if key not in sums}
    return _tap(axes, outputs, slot, sums), (sums, ours)


def _tap_backward(axes, residuals, cotangent):
    sums, ours = residuals
    slot_grads = sums | in_any_mesh(functools.partial(_sums_of_grads, axes), cotangent, ours)
    slot_grads["vector"] = jnp.zeros_like(ours["vector"])
    slot_grads = {key: _as_varying(value, ours["grads"]) for key, value in slot_grads.items()}
    return cotangent, slot_grads, jax.tree.map(jnp.zeros_like, sums)


def _sums_of_grads(axes, cotangent, ours):
    """Those sums of the slot ``ours`` that are of dL/dh."""
    g = cotangent.astype(ours["grads"].dtype)
    total = g.sum(axes.rows).transpose(axes.order)
    squares = jnp.square(g).sum(axes.rows).transpose(axes.order)
    sums = {
        key: value.reshape(ours[key].shape) for key, value in (("grads", total), ("grad_squares", squares))
    }
    if "part_grads" in ours:
        split = split_rows(g, axes.rows[0], ours["part_grads"].shape[0] // ours["grads"].shape[0])
        totals = jax.vmap(lambda part: part.sum(axes.rows).transpose(axes.order))(split)
        sums["part_grads"] = totals.reshape(ours["part_grads"].shape)
    if "grad_moment" in ours:
        groups, out_dim = ours["grad_moment"].shape[:2]
        others = [i for i in range(g.ndim) if i not in axes.rows]
        rows = g.transpose(axes.rows + tuple(others[i] for i in axes.order))
        rows = rows.reshape([g.shape[i] for i in axes.rows] + [groups, out_dim])
        moment = jnp.einsum("...gi,...gj->gij", rows, rows, precision="highest")
        sums["grad_moment"] = moment.reshape(ours["grad_moment"].shape)
    return sums


def _as_varying(array: jax.Array, like: jax.Array) -> jax.Array:
    """The sum over the axes of a ``jax.shard_map`` along which ``array`` varies and ``like`` does not.

    So are the cotangents of whatever does not vary.
    """
    axes = varying(array) - varying(like)
    return jax.lax.psum(array, tuple(axes)) if axes else array


def varying(array: jax.Array) -> frozenset[str]:
    kind: Any = jax.typeof(array)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # until and since JAX 0.10


_tap.defvjp(_tap_forward, _tap_backward)
