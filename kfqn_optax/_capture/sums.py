"""Sums over rows of a layer's inputs, shaped like its slot."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax._capture.slot import Slot
from kfqn_optax._capture.weights import row_weights, weights, weights_now
from kfqn_optax._numerics import safe_divide


def dense_sums(inputs: jax.Array, slot: Slot) -> dict[str, jax.Array]:
    """Sums over all leading axes of inputs (..., groups, d_in), shaped like ``slot``."""
    groups, in_dim = inputs.shape[-2:]
    a = jax.lax.stop_gradient(inputs).astype(slot["inputs"].dtype)
    w = row_weights(a[..., 0, 0], a.dtype)
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
    patches formed, of some rows.

    Args:
      layer: ``layer(inputs, kernel) -> (*rows, groups)``, the layer with one output a group, and as many
        groups and channels as kernel and inputs have.
      inputs: the layer's inputs.
      kernel: zeros of the shape of that one-output kernel, (..., groups); in C order without its last
        axis it is a row of d_in numbers.
      slot: the slot.
    """
    groups = kernel.shape[-1]
    a = jax.lax.stop_gradient(inputs).astype(slot["inputs"].dtype)
    outputs, transpose = jax.vjp(functools.partial(layer, a), kernel)
    w = row_weights(outputs[..., 0], a.dtype)
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


PATCHES, BLOCK = 4096, 512


def _patches_moment(
    layer: Callable[[jax.Array, jax.Array], jax.Array],
    inputs: jax.Array,
    kernel: jax.Array,
    rows: tuple[int, ...],
    w: jax.Array | None,
    total: jax.Array,
) -> jax.Array:
    """Sum over rows of a a^T, (groups, d_in, d_in), a the patches of a convolution, ``total`` their sum.

    The covariance of the patches of some rows, about ``PATCHES``, stands for that of all; the mean is that
    of all, which leaves A positive semidefinite. They are all rows of the first examples; where one example
    has more, some positions of each, drawn once. About ``BLOCK`` of them are formed at a time.
    """
    groups, in_dim = kernel.shape[-1], kernel.size // kernel.shape[-1]
    lengths = inputs.shape[1 - kernel.ndim : -1]
    places = _places(layer, lengths, kernel)
    positions, offsets, _ = places.shape
    count = math.prod(rows) // positions  # of examples
    w = jnp.ones(rows, inputs.dtype) if w is None else w
    seen = w.reshape(count, positions)
    examples = min(count, max(1, PATCHES // positions))
    if positions > PATCHES:
        examples = min(count, PATCHES)
        some = np.sort(np.random.default_rng(0).permutation(positions)[: PATCHES // examples])
        places, seen = places[some], seen[:, some]
    seen = seen[:examples]
    pixels = inputs.reshape(count, *lengths, inputs.shape[-1])[:examples]

    def add(sums, block):
        places, w = block
        at = (slice(None), *jnp.moveaxis(places, -1, 0))
        patches = pixels.at[at].get(mode="fill", fill_value=0)
        patches = patches.reshape(-1, offsets, groups, in_dim // offsets)
        patches = patches.swapaxes(1, 2).reshape(-1, groups, in_dim)
        weighted = patches * w.reshape(-1, 1, 1)
        moment = jnp.einsum("ngi,ngj->gij", weighted, patches, precision="highest")
        return jax.tree.map(jnp.add, sums, (moment, weighted.sum(0))), None

    blocks = min(len(places), -(-seen.size // BLOCK))
    missing = -len(places) % blocks
    grown = lambda array: jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    split = lambda array: grown(array).reshape(blocks, -1, *array.shape[1:])
    zero = _count(total, 0)
    start = (
        zero + jnp.zeros((groups, in_dim, in_dim), zero.dtype),
        zero + jnp.zeros((groups, in_dim), zero.dtype),
    )
    parts = split(places), split(seen.T).swapaxes(1, 2)  # what fills the last block weighs nothing
    (moment, sum_of_seen), _ = jax.lax.scan(add, start, parts)
    if seen.size == w.size:
        return moment
    mean = safe_divide(sum_of_seen, seen.sum())
    mean_of_all = safe_divide(total, w.sum())
    outer = lambda m: m[:, :, None] * m[:, None, :]
    return w.sum() * (safe_divide(moment, seen.sum()) - outer(mean) + outer(mean_of_all))


def _places(
    layer: Callable[[jax.Array, jax.Array], jax.Array], lengths: tuple[int, ...], kernel: jax.Array
) -> jax.Array:
    """Which position of the input each element of the kernel sees at each position of the output.

    Found by applying the layer, with the kernels that pick one element, to images of the coordinates, which
    count from 1: 0 is padding. So strides, dilations, and padding of any kind are the layer's own.

    Returns:
      Coordinates in the input, beyond its end for padding. (positions, elements, axes).
    """
    axes = range(len(lengths))
    images = jnp.stack([jax.lax.broadcasted_iota(kernel.dtype, lengths, axis) + 1 for axis in axes])
    window = kernel.shape[:-2]
    elements = math.prod(window)
    picks = jnp.eye(elements, dtype=kernel.dtype).reshape(elements, *window, 1, 1)
    seen = jax.vmap(functools.partial(layer, images[..., None]))(picks)
    seen = jnp.round(seen).astype(jnp.int32).reshape(elements, len(lengths), -1)
    return jnp.where(seen == 0, max(lengths), seen - 1).transpose(2, 0, 1)


def embedding_sums(ids: jax.Array, slot: Slot) -> dict[str, jax.Array]:
    """Sums for an embedding, a dense layer whose inputs are one-hot rows: counts of the ids."""
    zeros = jnp.zeros_like(slot["inputs"]).reshape(-1)
    w = row_weights(ids, zeros.dtype)
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
    parts, w = len(slot["part_rows"]), weights_now()
    w = None if w is None or w.ndim == 0 else w

    def of_one(inputs, w):
        with contextlib.nullcontext() if w is None else weights(w):
            sums = sums_of(inputs, slot)
        return sums["rows"], sums["inputs"]

    split = None if w is None else w.reshape((parts, -1, *w.shape[1:]))
    rows, totals = jax.vmap(of_one)(split_rows(inputs, axis, parts), split)
    return {
        "part_rows": rows.reshape(slot["part_rows"].shape),
        "part_inputs": totals.reshape(slot["part_inputs"].shape),
    }


def split_rows(array: jax.Array, axis: int, parts: int) -> jax.Array:
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
