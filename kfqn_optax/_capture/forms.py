"""Layers as linear maps: which axes are rows, groups, inputs and outputs. Flax linen and NNX share it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kfqn_optax._capture.slot import Slot
from kfqn_optax._capture.sums import convolution_sums, dense_sums, embedding_sums, part_sums
from kfqn_optax._capture.tap import OutputAxes
from kfqn_optax._capture.weights import over_rows


class Unsupported(Exception):  # noqa: N818 (caught and turned into a reason in the table)
    """The layer computes something that is not one matrix a group; the text says what."""


class Form(NamedTuple):
    """A layer as h = W^T a for each row and group; hashable, no arrays.

    Attributes:
      kind: the Flax layer it is.
      groups, in_dim, out_dim, positions: as in :class:`Layer`.
      kernel_name, kernel_split, kernel_order: as in :class:`Layer`.
      output_axes: rows, groups and outputs among the axes of the layer's output.
      input_order: for a dense form, the order of the input's axes that puts rows first, then groups,
        then inputs; None for other forms.
      dense: whether rows of inputs are at hand, so that A can be formed.
    """

    kind: str
    groups: int
    in_dim: int
    out_dim: int
    positions: int
    kernel_name: str
    kernel_split: tuple[int, ...]
    kernel_order: tuple[int, ...]
    output_axes: OutputAxes
    input_order: tuple[int, ...] | None

    @property
    def dense(self) -> bool:
        return self.input_order is not None

    @property
    def patches(self) -> bool:
        """Whether rows of inputs are the patches of a convolution."""
        return not self.dense and self.kernel_name != "embedding"


def check_real(*arrays: jax.Array) -> None:
    """Raise ``Unsupported`` for complex numbers, of which the statistics would be others."""
    if any(jnp.iscomplexobj(array) for array in arrays):
        raise Unsupported("of complex numbers")


def linear_form(kind: str, kernel: tuple[int, ...], ndim: int) -> Form:
    """A layer on the last of its inputs' ``ndim`` axes, with a kernel of shape (d_in, d_out)."""
    return _dense(kind, kernel, (0, 1), (0, 1), tuple(range(ndim)), _trailing(ndim, 1))


def dense_general_form(
    kind: str, kernel: tuple[int, ...], axes: Sequence[int], batch_axes: Sequence[int], ndim: int
) -> Form:
    """A layer that contracts ``axes`` of its inputs, with a kernel of its own along ``batch_axes``."""
    # Ascending, as Flax sorts them, whatever the order they are given in.
    contracted, batch = sorted(i % ndim for i in axes), sorted(i % ndim for i in batch_axes)
    rows = [i for i in range(ndim) if i not in contracted and i not in batch]
    groups, ends = len(batch), len(batch) + len(contracted)
    features = len(kernel) - ends
    order = (*range(groups), *range(groups, groups + features))
    output_axes = OutputAxes(tuple(range(groups, groups + len(rows))), order)
    identity = tuple(range(len(kernel)))
    return _dense(kind, kernel, (groups, ends), identity, (*rows, *batch, *contracted), output_axes)


def einsum_form(kind: str, equation: str, kernel: tuple[int, ...], ndim: int) -> Form:
    """``einsum(equation, inputs, kernel)`` for inputs with ``ndim`` axes."""
    sides, out = equation.replace(" ", "").split("->")
    lhs, rhs = sides.split(",")
    if "..." in rhs or ("..." in lhs) != ("..." in out):
        raise Unsupported(f"with the equation {equation!r}")
    hidden = ndim - len(lhs.replace("...", ""))
    left, right = _labels(lhs, hidden), _labels(out, hidden)
    groups = [c for c in rhs if c in left and c in right]
    contracted = [c for c in rhs if c in left and c not in right]
    features = [c for c in rhs if c not in left and c in right]
    rows = [c for c in left if c not in rhs]
    distinct = all(len(set(labels)) == len(labels) for labels in (left, right, rhs))
    if not distinct or len(groups + contracted + features) != len(rhs) or set(rows) - set(right):
        raise Unsupported(f"with the equation {equation!r}")
    remaining = [c for c in right if c in rhs]
    output_axes = OutputAxes(
        tuple(right.index(c) for c in rows),
        tuple(remaining.index(c) for c in groups + features),
    )
    return _dense(
        kind,
        kernel,
        (len(groups), len(groups) + len(contracted)),
        tuple(rhs.index(c) for c in groups + contracted + features),
        tuple(left.index(c) for c in rows + groups + contracted),
        output_axes,
    )


def embedding_form(kind: str, table: tuple[int, ...], ndim: int) -> Form:
    """A table of shape (vocabulary, features), whose outputs have ``ndim`` axes."""
    vocabulary, features = table
    axes = _trailing(ndim, 1)
    return Form(kind, 1, vocabulary, features, 1, "embedding", table, (0, 1), axes, None)


def convolution_form(
    kind: str, kernel: tuple[int, ...], groups: int, transposed: bool, outputs: tuple[int, ...]
) -> Form:
    """A convolution with outputs of this shape; ``transposed`` if its kernel has outputs before inputs."""
    rank = len(kernel) - 2
    positions = math.prod(outputs[-1 - rank : -1])
    split, inputs = kernel, (*range(rank), rank)
    order = (*inputs, rank + 1)
    if groups > 1:
        split = (*kernel[:-1], groups, kernel[-1] // groups)
        order = (rank + 1, *inputs, rank + 2)
    elif transposed:
        inputs = (*range(rank), rank + 1)
        order = (*inputs, rank)
    in_dim = math.prod(split[i] for i in inputs)
    axes = _trailing(len(outputs), 1)
    return Form(kind, groups, in_dim, split[order[-1]], positions, "kernel", split, order, axes, None)


def form_sums(
    form: Form,
    inputs: jax.Array,
    slot: Slot,
    one_output: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    """The sums over rows of a layer's inputs, for ``tap``.

    For a convolution ``one_output(inputs, kernel)`` is the layer with one output channel a group and no
    bias. Its kernel has the axes of the layer's, and tells how many groups; its inputs, how many channels.
    """
    plain = functools.partial(_sums, form, one_output=one_output)

    def sums(inputs, slot):
        whole = plain(inputs, slot)
        if "part_rows" in slot:
            whole |= part_sums(plain, inputs, _first_row_axis(form, inputs), slot)
        return whole

    return over_rows(sums, inputs, slot)


def _first_row_axis(form: Form, inputs: jax.Array) -> int:
    """Where the inputs have the first axis of the layer's rows, which must be one of examples."""
    spatial = len(form.kernel_order) - 2 - (form.groups > 1) if form.kind.startswith("Conv") else 0
    if len(form.output_axes.rows) <= spatial:
        raise ValueError(
            f"kfqn.value_and_grad: with groups=, every layer must see an axis of examples, but a"
            f" {form.kind} sees inputs of shape {inputs.shape}. Call the model on batches, without"
            " jax.vmap over the examples."
        )
    return 0 if form.input_order is None else form.input_order[0]


def _sums(
    form: Form,
    inputs: jax.Array,
    slot: Slot,
    one_output: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
    if one_output is not None:
        return _convolution_sums(form, one_output, inputs, slot)
    if form.input_order is None:
        return embedding_sums(inputs, slot)
    rows = inputs.transpose(form.input_order)
    kept = rows.shape[: len(form.output_axes.rows)]
    return dense_sums(rows.reshape((*kept, form.groups, form.in_dim)), slot)


def _convolution_sums(
    form: Form, one_output: Callable[[jax.Array, jax.Array], jax.Array], inputs: jax.Array, slot: Slot
) -> dict[str, jax.Array]:
    transposed = form.kernel_order[-1] != max(form.kernel_order)

    def layer(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return one_output(inputs, kernel.swapaxes(-1, -2) if transposed else kernel)

    shape = [form.kernel_split[i] for i in form.kernel_order[:-1]]
    shape = shape[1:] if form.groups > 1 else shape
    return convolution_sums(layer, inputs, jnp.zeros((*shape, form.groups), slot["inputs"].dtype), slot)


def _dense(
    kind: str,
    kernel: tuple[int, ...],
    bounds: tuple[int, int],
    kernel_order: tuple[int, ...],
    input_order: tuple[int, ...],
    axes: OutputAxes,
) -> Form:
    """A form whose kernel, in ``kernel_order``, has groups before and inputs between ``bounds``."""
    ordered = [kernel[i] for i in kernel_order]
    groups, inputs = math.prod(ordered[: bounds[0]]), math.prod(ordered[bounds[0] : bounds[1]])
    outputs = math.prod(ordered[bounds[1] :])
    return Form(kind, groups, inputs, outputs, 1, "kernel", kernel, kernel_order, axes, input_order)


def _trailing(ndim: int, count: int) -> OutputAxes:
    return OutputAxes(tuple(range(ndim - count)), tuple(range(count)))


def _labels(term: str, hidden: int) -> list[str]:
    """One label an axis; the ``hidden`` axes of an ellipsis get numbers."""
    before, ellipsis, after = term.partition("...")
    return [*before, *(str(i) for i in range(hidden if ellipsis else 0)), *after]
