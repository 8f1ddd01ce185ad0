"""The cotangent tap: the statistics of a layer, delivered as the gradient of a slot of zeros.

A *slot* is a small dictionary of zero arrays that travels beside a layer's kernel. The layer's output
passes through ``tap``, an identity whose backward rule returns, as the slot's "gradient",

=================  ======================  =========================================================
key                shape of the slot       what ``jax.grad`` returns for it
=================  ======================  =========================================================
``rows``           (1, 1, 1)               number of rows (examples x positions) the layer saw
``inputs``         (groups, d_in, 1)       sum over rows of the layer's inputs a
``squares``        (groups, d_in, 1)       sum over rows of a^2, element by element
``grads``          (groups, d_out, 1)      sum over rows of dL/dh, h the layer's output
``second_moment``  (groups, d_in, d_in)    sum over rows of a a^T; only where a layer has this key, and
                                           for a convolution estimated from the first few examples
``product``        (groups, d_in, 1)       sum over rows of a (a^T v), v the *value* of ``vector``
``bias_product``   (groups, 1, 1)          sum over rows of a^T v
``vector``         (groups, d_in, 1)       nothing; it brings v to the layer
``grad_moment``    (groups, d_out, d_out)  sum over rows of dL/dh (dL/dh)^T; only where it is there
``part_rows``      (parts, 1, 1)           ``rows`` of each of several equal parts of the batch
``part_inputs``    (parts groups, d_in, 1)   ``inputs`` of each part; parts come before groups
``part_grads``     (parts groups, d_out, 1)  ``grads`` of each part; only where a slot has these keys
=================  ======================  =========================================================

so the statistics have no side effect to leak: they are stacked by scan and vmap, and summed over weight
sharing, micro-batches and devices, exactly as gradients are. A slot may carry trailing axes of length
one, which give it the rank that a lifted transformation expects of it. What is not used of a slot's
gradient, XLA does not compute.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._meshes import in_any_mesh
from kfqn_optax._numerics import safe_divide
from kfqn_optax._shown import shown

SLOT = "kfqn_slot"
Slot = Mapping[str, jax.Array]


def slot_shapes(
    groups: int, in_dim: int, out_dim: int, rank: int, second_moment: bool, grad_moment: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of the slot of one layer, every leaf of rank ``rank`` (at least 3)."""
    shapes = {
        "rows": (1, 1, 1),
        "inputs": (groups, in_dim, 1),
        "squares": (groups, in_dim, 1),
        "grads": (groups, out_dim, 1),
        "product": (groups, in_dim, 1),
        "bias_product": (groups, 1, 1),
        "vector": (groups, in_dim, 1),
    }
    if second_moment:
        shapes["second_moment"] = (groups, in_dim, in_dim)
    if grad_moment:
        shapes["grad_moment"] = (groups, out_dim, out_dim)
    return {key: shape + (1,) * (rank - 3) for key, shape in shapes.items()}


def dense_sums(inputs: jax.Array, slot: Slot) -> dict[str, jax.Array]:
    """Sums over all leading axes of inputs (..., groups, d_in), shaped like ``slot``."""
    groups, in_dim = inputs.shape[-2:]
    a = jax.lax.stop_gradient(inputs).astype(slot["inputs"].dtype)
    w = _row_weights(a.shape[:-2], a.dtype)
    weighted = a if w is None else a * w[..., None, None]
    axes = tuple(range(a.ndim - 2))
    a_sum = weighted.sum(axes)
    projected = jnp.einsum("...gi,gi->...g", a, _vector(slot, groups, in_dim), precision="highest")
    if w is not None:
        projected *= w[..., None]
    sums = {
        "rows": _count(a_sum, math.prod(a.shape[:-2]) if w is None else w.sum()),
        "inputs": a_sum,
        "squares": (weighted * a).sum(axes),
        "product": jnp.einsum("...gi,...g->gi", a, projected, precision="highest"),
        "bias_product": projected.sum(axes),
    }
    if "second_moment" in slot:
        sums["second_moment"] = jnp.einsum("...gi,...gj->gij", weighted, a, precision="highest")
    return _shaped(sums, slot)


def convolution_sums(
    layer: Callable[[jax.Array, jax.Array], jax.Array], inputs: jax.Array, kernel: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    """Sums over positions of the patches that a convolution sees, which are never materialised.

    For a layer linear in its kernel, the layer with one output channel and kernel v gives every
    patch's a^T v, and its transpose in the kernel gives sums of patches. Only for ``second_moment`` are
    patches formed, of some examples.

    Args:
      layer: ``layer(inputs, kernel) -> (*rows, groups)``, the layer with one output a group.
      inputs: the layer's inputs.
      kernel: zeros of the shape of that one-output kernel, (..., groups); in C order without its last
        axis it is a row of d_in numbers.
      slot: the slot.
    """
    groups = kernel.shape[-1]
    a = jax.lax.stop_gradient(inputs).astype(slot["inputs"].dtype)
    outputs, transpose = jax.vjp(functools.partial(layer, a), kernel)
    w = _row_weights(outputs.shape[:-1], a.dtype)
    ones = jnp.ones_like(outputs) if w is None else jnp.broadcast_to(w[..., None], outputs.shape)
    a_sum = transpose(ones)[0]
    vector = _vector(slot, groups, kernel.size // groups)
    projected = ones * layer(a, vector.T.reshape(kernel.shape))
    _, transpose_of_squares = jax.vjp(functools.partial(layer, a * a), kernel)

    def row(array: jax.Array) -> jax.Array:
        return array.reshape(-1, groups).T

    sums = {
        "rows": _count(a_sum, outputs.size // groups if w is None else w.sum()),
        "inputs": row(a_sum),
        "squares": row(transpose_of_squares(ones)[0]),
        "product": row(transpose(projected)[0]),
        "bias_product": projected.sum(tuple(range(projected.ndim - 1))),
    }
    if "second_moment" in slot:
        sums["second_moment"] = _patches_moment(layer, a, kernel, outputs.shape[:-1], w, row(a_sum))
    return _shaped(sums, slot)


PATCHES = 4096


def _patches_moment(
    layer: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    rows: tuple[int, ...],
    w: jax.Array | None,
    total: jax.Array,
) -> jax.Array:
    """Sum over rows of a a^T, (groups, d_in, d_in), a the patches of a convolution, ``total`` their sum.

    The covariance of the patches of the first examples, as many as have ``PATCHES`` rows, stands for that
    of all; the mean is that of all, which leaves A positive semidefinite. Patches are the outputs of the
    layer for the kernels that pick one element of a patch.
    """
    groups = kernel.shape[-1]
    in_dim = kernel.size // groups
    has_examples = len(rows) > kernel.ndim - 2  # and not positions alone
    examples = max(1, PATCHES // max(1, math.prod(rows[1:])))
    some = has_examples and examples < rows[0]
    w = jnp.ones(rows, inputs.dtype) if w is None else w
    seen = w[:examples] if some else w
    picks = jnp.eye(in_dim, dtype=inputs.dtype).reshape(in_dim, *kernel.shape[:-1], 1)
    picks = jnp.broadcast_to(picks, (in_dim, *kernel.shape))
    patches = jax.vmap(functools.partial(layer, inputs[:examples] if some else inputs))(picks)
    weighted = patches * seen[None, ..., None]
    moment = jnp.einsum("i...g,j...g->gij", weighted, patches, precision="highest")
    if not some:
        return moment
    mean = safe_divide(weighted.sum(tuple(range(1, weighted.ndim - 1))).T, seen.sum())
    mean_of_all = safe_divide(total, w.sum())
    outer = lambda m: m[:, :, None] * m[:, None, :]
    return w.sum() * (safe_divide(moment, seen.sum()) - outer(mean) + outer(mean_of_all))


def embedding_sums(ids: jax.Array, slot: Slot) -> dict[str, jax.Array]:
    """Sums for an embedding, a dense layer whose inputs are one-hot rows: counts of the ids."""
    zeros = jnp.zeros_like(slot["inputs"]).reshape(-1)
    w = _row_weights(ids.shape, zeros.dtype)
    ones = jnp.ones(ids.shape, zeros.dtype) if w is None else w
    counts = zeros.at[ids].add(ones)
    vector = _vector(slot, 1, zeros.size)[0]
    sums = {
        "rows": counts.sum(),
        "inputs": counts,
        "squares": counts,
        "product": counts * vector,
        "bias_product": counts @ vector,
    }
    return _shaped(sums, slot)


def part_sums(
    sums_of: Callable[[jax.Array, Slot], Mapping[str, jax.Array]], inputs: jax.Array, axis: int, slot: Slot
) -> dict[str, jax.Array]:
    """``part_rows`` and ``part_inputs``: the sums of equal parts of the inputs along ``axis``.

    Args:
      sums_of: ``sums_of(inputs, slot)``, the sums over rows of some of the inputs.
      inputs: the layer's inputs.
      axis: where they have the first axis of the layer's rows.
      slot: the slot, which tells how many parts.
    """
    parts, w = len(slot["part_rows"]), _weights.value
    w = None if w is None or w.ndim == 0 else w

    def of_one(inputs, w):
        with contextlib.nullcontext() if w is None else weights(w):
            sums = sums_of(inputs, slot)
        return sums["rows"], sums["inputs"]

    split = None if w is None else w.reshape((parts, -1, *w.shape[1:]))
    rows, totals = jax.vmap(of_one)(_split(inputs, axis, parts), split)
    return {
        "part_rows": rows.reshape(slot["part_rows"].shape),
        "part_inputs": totals.reshape(slot["part_inputs"].shape),
    }


def _split(array: jax.Array, axis: int, parts: int) -> jax.Array:
    """Equal parts along an axis, on a new axis in front."""
    length = array.shape[axis]
    if length % parts:
        raise ValueError(
            f"kfqn.value_and_grad: groups={parts} does not divide the first of the axes of a layer's rows,"
            f" which has length {length} (in an array of shape {array.shape}). Give batches whose size is"
            " a multiple of groups."
        )
    shape = (*array.shape[:axis], parts, length // parts, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _vector(slot: Slot, groups: int, in_dim: int) -> jax.Array:
    return jax.lax.stop_gradient(slot["vector"]).reshape(groups, in_dim)


def _shaped(sums: dict[str, jax.Array], slot: Slot) -> dict[str, jax.Array]:
    return {key: value.reshape(slot[key].shape) for key, value in sums.items()}


def _count(reference: jax.Array, count: int | jax.Array) -> jax.Array:
    """``count`` as an array that vmap batches exactly when it batches ``reference``.

    A constant cotangent would not be summed over a vmapped axis, so the count must depend on the data;
    the comparison is false for NaN, hence the same value on both branches.
    """
    total = reference.sum()
    value = jnp.asarray(count, reference.dtype)
    return jnp.where(total == total, value, value)


class _Weights(threading.local):
    value: jax.Array | None = None


_weights = _Weights()


@contextlib.contextmanager
def weights(value: jax.Array) -> Iterator[None]:
    """Within this context, inside ``loss_fn``, rows count in the layers' means by these weights.

    Padding then does not count: give the mask of the tokens or examples that the loss counts.

    Args:
      value: weights, 0 for padding and 1 otherwise, or any number from 0; its axes are the leading axes
        of the layers' rows, for example (batch, length). A layer with more axes repeats them over the
        rest. In a layer with fewer axes, as after pooling, a row counts if any weight in it is positive.

    Raises:
      ValueError: while tracing, if the axes of a layer's rows do not start with those of the weights.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Dense(2), jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])
      >>> mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> def loss_fn(params, x):
      ...     with kfqn.weights(mask):
      ...         outputs = model.apply({"params": params}, x)
      ...     return (mask[..., None] * outputs**2).sum() / mask.sum()
      >>> layers = kfqn.find_layers(model, variables, x)
      >>> _, _, curvature = kfqn.value_and_grad(loss_fn, layers)(variables["params"], x)
      >>> float(curvature.statistics["."].rows)
      5.0
    """
    if not hasattr(value, "dtype") and not isinstance(value, (int, float, list, tuple)):
        raise TypeError(
            f"kfqn.weights: got {shown(value)}. Give an array of numbers, such as the loss's mask."
        )
    before = _weights.value
    _weights.value = jnp.asarray(value)
    try:
        yield
    finally:
        _weights.value = before


def _row_weights(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array | None:
    """The weights of rows that have these axes, or None where all rows count alike."""
    if _weights.value is None:
        return None
    w = jax.lax.stop_gradient(_weights.value).astype(dtype)
    common = min(len(shape), w.ndim)
    if shape[:common] != w.shape[:common]:
        raise ValueError(
            f"kfqn.weights: weights of shape {w.shape} do not fit a layer whose rows have shape {shape}."
            " Give weights whose axes are the leading axes of every layer's rows, such as (batch, length)."
        )
    if w.ndim > len(shape):
        return (w > 0).any(tuple(range(common, w.ndim))).astype(dtype)
    return jnp.broadcast_to(w.reshape(w.shape + (1,) * (len(shape) - w.ndim)), shape)


def over_rows(
    sums_of: Callable[[jax.Array, Slot], dict[str, jax.Array]], inputs: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    """``sums_of(inputs, slot)``, sums over rows that may be divided over the devices of any mesh."""

    def weighted(inputs, slot, w):
        with contextlib.nullcontext() if w is None else weights(w):
            return sums_of(inputs, slot)

    return in_any_mesh(weighted, inputs, slot, _weights.value)


class OutputAxes(NamedTuple):
    """Where a layer's output keeps what the kernel produced.

    Attributes:
      rows: axes that are examples or positions.
      order: for the remaining axes, the order that puts groups first and then output features.
    """

    rows: tuple[int, ...]
    order: tuple[int, ...]


def last_axis(outputs: jax.Array) -> OutputAxes:
    return OutputAxes(tuple(range(outputs.ndim - 1)), (0,))


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


class Reached:
    """Whether a derivative of the loss came back to the slots that went through :meth:`watch`.

    JAX does not transpose what no derivative reaches, which shows while tracing. Where the taps are run
    would not: a jitted function inside the loss is not traced a second time.
    """

    def __init__(self):
        self.any = False

    def watch(self, slots: Any) -> Any:
        """``slots``, an identity."""
        return _watched(self, slots)

    def backward(self, cotangent):
        self.any = True
        return (cotangent,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(reached, slots):
    del reached
    return slots


_watched.defvjp(
    lambda reached, slots: (slots, None), lambda reached, residuals, cotangent: reached.backward(cotangent)
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
    sums = {"grads": total.reshape(ours["grads"].shape)}
    if "part_grads" in ours:
        split = _split(g, axes.rows[0], ours["part_grads"].shape[0] // ours["grads"].shape[0])
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
