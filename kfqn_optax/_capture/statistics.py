"""From the slots' gradients to the batch statistics of each layer, with their normalisation.

With n the number of rows (examples x positions) that went through a layer and L the loss,

* inputs and pre-activations are means over the n rows;
* the pre-activation gradient is the *sum* over rows of dL/dh. For a loss that is a mean over the batch
  this is the batch mean of the per-example gradients; for any loss it is the derivative of L with
  respect to a shift of all rows' pre-activations, which is what a curvature pair needs;
* with a bias, inputs are homogeneous: they end in a 1.

Rows are counted by ``kfqn.weights`` where the loss uses it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.layers import Layer, Layers, to_front
from kfqn_optax._capture.parameters import get_matrices
from kfqn_optax._meshes import in_any_mesh
from kfqn_optax._numerics import safe_divide


class Statistics(NamedTuple):
    """Statistics of one layer on one batch; a layer with stacked copies has their axes in front.

    Attributes:
      rows: n, how many rows the layer saw; 0 if the loss did not depend on it. ().
      inputs: mean homogeneous input. (d_in [+ 1],).
      preactivations: mean output of the layer, before the nonlinearity. (d_out,).
      preactivation_grads: sum over rows of dL/dh. (d_out,).
      squares: diagonal of the second moment. (d_in [+ 1],).
      product: A v, with A the second moment and v a vector asked for. (d_in [+ 1],).
      second_moment: A, mean outer product of the homogeneous inputs; of a convolution on about 4096
        positions of the batch. None for too long a side. (d_in [+ 1], d_in [+ 1]).
      grad_moment: rows / T times the sum over rows of the outer product of dL/dh; T, the positions of a
        convolution, is 1 elsewhere. Where L is a mean over examples, it is the mean over examples of the
        outer products of per-example gradients, summed over positions. None for too long a side, and
        where ``forward`` takes the place of a tapped loss. (d_out, d_out).
      grad_squares: diagonal of ``grad_moment``, for sides of any length; None with ``forward``. (d_out,).
      part_rows: n of each of B equal parts of the batch; this and the next two are None without
        ``value_and_grad(..., groups=B)``. (B,).
      part_preactivations: ``preactivations`` of each part. (B, d_out).
      part_grads: ``preactivation_grads`` of each part, times n over the part's: their average, weighted
        by rows, is ``preactivation_grads``. (B, d_out).
    """

    rows: jax.Array
    inputs: jax.Array
    preactivations: jax.Array
    preactivation_grads: jax.Array
    squares: jax.Array
    product: jax.Array
    second_moment: jax.Array | None
    grad_moment: jax.Array | None
    grad_squares: jax.Array | None
    part_rows: jax.Array | None = None
    part_preactivations: jax.Array | None = None
    part_grads: jax.Array | None = None


def signed(statistics: Statistics, sign: jax.Array) -> Statistics:
    """The statistics of ``sign`` times the loss, with ``sign`` of 1 or -1."""
    flip = lambda grads: None if grads is None else (sign * grads).astype(grads.dtype)
    return statistics._replace(
        preactivation_grads=flip(statistics.preactivation_grads), part_grads=flip(statistics.part_grads)
    )


def normalise(
    layers: Layers,
    params: ArrayTree,
    sums: Mapping[str, Mapping[str, jax.Array]],
    vectors: Mapping[str, jax.Array],
    sampled: bool = False,
) -> dict[str, Statistics]:
    """The statistics of every layer from its slot's gradient at ``params``.

    ``vectors`` holds, for the layers that have one, the v of ``product``, (*copies, d_in [+ 1]). Where
    gradients are sampled ones, ``grad_moment`` and ``grad_squares`` are sums over rows as they are.
    """

    def of_all(params, sums, vectors):
        matrices = get_matrices(layers, params)
        return {
            layer.name: _normalise(
                layer, matrices[layer.name], sums[layer.name], vectors.get(layer.name), sampled
            )
            for layer in layers
        }

    return in_any_mesh(of_all, params, sums, vectors)


def of_copies(layer: Layer, array: jax.Array, *shape: int) -> jax.Array:
    """A leaf of a slot's gradient as (*copies, *shape)."""
    return to_front(array, layer.slot_axes).reshape(layer.copies + shape)


def _normalise(
    layer: Layer, matrix: jax.Array, sums: Mapping[str, jax.Array], vector: jax.Array | None, sampled: bool
) -> Statistics:
    def canonical(key: str, *shape: int) -> jax.Array:
        return of_copies(layer, sums[key], *shape)

    rows = to_front(sums["rows"], layer.slot_axes).reshape(layer.stack)
    rows = jnp.broadcast_to(
        rows.reshape(layer.stack + (1,) * (len(layer.copies) - rows.ndim)), layer.copies
    )

    def mean(key: str, *shape: int) -> jax.Array:
        return safe_divide(canonical(key, *shape), rows.reshape(layer.copies + (1,) * len(shape)))

    dim = layer.in_dim
    inputs, squares, product = mean("inputs", dim), mean("squares", dim), mean("product", dim)
    moment = mean("second_moment", dim, dim) if "second_moment" in sums else None
    if layer.use_bias:
        one = jnp.ones_like(rows)[..., None]
        if moment is not None:
            moment = jnp.concatenate([moment, inputs[..., None, :]], axis=-2)
            edge = jnp.concatenate([inputs, one], axis=-1)
            moment = jnp.concatenate([moment, edge[..., :, None]], axis=-1)
        if vector is not None:
            bias = vector[..., -1:]
            product = jnp.concatenate([product + bias * inputs, mean("bias_product", 1) + bias], axis=-1)
        else:
            product = jnp.concatenate([product, mean("bias_product", 1)], axis=-1)
        inputs = jnp.concatenate([inputs, one], axis=-1)
        squares = jnp.concatenate([squares, one], axis=-1)
    preactivations = jnp.einsum(
        "...i,...io->...o", inputs, matrix.astype(inputs.dtype), precision="highest"
    )
    out = layer.out_dim

    def of_grads(key: str, *shape: int) -> jax.Array | None:
        if key not in sums:
            return None
        total = canonical(key, *shape)
        return (
            total if sampled else rows.reshape(layer.copies + (1,) * len(shape)) / layer.positions * total
        )

    grad_moment, grad_squares = of_grads("grad_moment", out, out), of_grads("grad_squares", out)
    parts = _parts(layer, matrix, sums, rows) if "part_rows" in sums else (None, None, None)
    grads = canonical("grads", out)
    return Statistics(
        rows, inputs, preactivations, grads, squares, product, moment, grad_moment, grad_squares, *parts
    )


def _parts(
    layer: Layer, matrix: jax.Array, sums: Mapping[str, jax.Array], rows: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``part_rows``, ``part_preactivations`` and ``part_grads``."""
    stack, groups = layer.stack, layer.groups
    count = to_front(sums["part_rows"], layer.slot_axes).reshape((*stack, 1, -1))
    parts = count.shape[-1]
    count = jnp.broadcast_to(count, (*stack, groups, parts)).reshape((*layer.copies, parts))

    def canonical(key: str, dim: int) -> jax.Array:
        array = to_front(sums[key], layer.slot_axes).reshape((*stack, parts, groups, dim))
        return jnp.moveaxis(array, -3, -2).reshape((*layer.copies, parts, dim))

    inputs = safe_divide(canonical("part_inputs", layer.in_dim), count[..., None])
    if layer.use_bias:
        inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)
    preactivations = jnp.einsum(
        "...bi,...io->...bo", inputs, matrix.astype(inputs.dtype), precision="highest"
    )
    scale = safe_divide(rows[..., None], count)[..., None]
    return count, preactivations, scale * canonical("part_grads", layer.out_dim)
