"""The cotangent tap: an identity whose backward rule delivers a layer's statistics as its slot's gradient.

So the statistics have no side effect to leak; ``slot.py`` lists them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.custom_batching
import jax.custom_derivatives
import jax.numpy as jnp

from kfqn_optax._capture.routes import TapCall
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


def tap(
    call: TapCall, outputs: jax.Array, kernel: jax.Array, slot: Slot, sums: Slot, axes: OutputAxes
) -> jax.Array:
    """Return ``outputs`` unchanged; the gradient of the slot is ``sums``, and ``grads``.

    That holds for the derivative that moves the slot, if the layer's ``kernel`` depends on the parameters.
    A derivative that the loss takes itself passes through as it is.
    """
    probe = slot["rows"] if call.probe is None else call.probe
    return _tap(axes, call, outputs, kernel, probe, dict(slot), jax.lax.stop_gradient(dict(sums)))


def add_virtual_bias(call: TapCall, outputs: jax.Array, slot: Slot, axes: OutputAxes) -> jax.Array:
    """Return ``outputs`` plus zeros, of which the gradient is ``grads``; any kind of differentiation.

    Unlike ``tap`` it allows forward mode, and delivers nothing but ``grads``.
    """
    call.live = True
    lengths = [length for i, length in enumerate(outputs.shape) if i not in axes.rows]
    ordered = [lengths[i] for i in axes.order]
    inverse = sorted(range(len(axes.order)), key=axes.order.__getitem__)
    bias = slot["grads"].reshape(ordered).transpose(inverse)
    full = [1 if i in axes.rows else length for i, length in enumerate(outputs.shape)]
    return outputs + bias.reshape(full).astype(outputs.dtype)


@jax.custom_batching.custom_vmap
def _without_taylor_mode(outputs):
    """``outputs``, through an operation that ``jax.experimental.jet`` has no rule for.

    Taylor mode passes over custom derivatives without a word, and would pass over the tap: what is
    differentiated then has no statistics. It stops here with an error, which ``loss.py`` explains.
    """
    return outputs


@_without_taylor_mode.def_vmap
def _without_taylor_mode_batched(axis_size, in_batched, outputs):
    del axis_size
    return _without_taylor_mode(outputs), in_batched[0]


@jax.custom_batching.custom_vmap
def _once_for_each(sums, cotangent):
    """``sums``, which are those of each copy where ``jax.vmap`` maps the cotangent and not them.

    JAX 0.10.2 counts a cotangent that does not depend on what is mapped once for all copies
    (findings/custom_vjp_cotangent_under_vmap.sh), such as sums over a batch that copies of weights share.
    """
    del cotangent
    return sums


@_once_for_each.def_vmap
def _once_for_each_batched(axis_size, in_batched, sums, cotangent):
    mapped, of_cotangent = in_batched
    sums = {
        key: jnp.broadcast_to(value, (axis_size, *value.shape))
        if of_cotangent and not mapped[key]
        else value
        for key, value in sums.items()
    }
    return _once_for_each(sums, cotangent), {key: one or of_cotangent for key, one in mapped.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(axes, call, outputs, kernel, probe, slot, sums):
    del axes, call, kernel, probe, slot, sums
    return _without_taylor_mode(outputs)


def _tap_forward(axes, call, outputs, kernel, probe, slot, sums):
    # Each argument says whether the derivative being taken moves it. Any derivative that does not move the
    # probe is one that the loss takes, and the outer one must meet a tap again.
    counts = kernel.perturbed if call.counts is None else call.counts
    live = counts and probe.perturbed and slot["grads"].perturbed
    call.moved |= kernel.perturbed
    call.live |= live
    call.idle |= probe.perturbed and not kernel.perturbed
    arguments = outputs, kernel, probe, slot, sums
    outputs, kernel, probe, slot, sums = jax.custom_derivatives.custom_vjp_primal_tree_values(arguments)
    # Only sums over rows are kept for the backward pass: never an activation, and nothing that would
    # make rematerialisation run the layer again.
    ours = {key: value for key, value in slot.items() if key not in sums}
    # ``live`` is an array, since what is kept must have one structure: where calls of both kinds share a
    # jitted trace, JAX 0.10.2 uses that of the last one for all (findings/custom_vjp_residuals.sh).
    return _tap(axes, call, outputs, kernel, probe, slot, sums), (jnp.asarray(live), sums, ours)


def _tap_backward(axes, call, residuals, cotangent):
    live, sums, ours = residuals
    slot_grads = sums | in_any_mesh(functools.partial(_sums_of_grads, axes), cotangent, ours)
    slot_grads["vector"] = jnp.zeros_like(ours["vector"])
    slot_grads = _once_for_each(*jax.lax.stop_gradient((slot_grads, cotangent)))
    slot_grads = {
        key: _as_varying(jnp.where(live, value, jnp.zeros_like(value)), ours["grads"])
        for key, value in slot_grads.items()
    }
    return cotangent, None, None, slot_grads, None


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


_tap.defvjp(_tap_forward, _tap_backward, symbolic_zeros=True)
