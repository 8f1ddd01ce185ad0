"""A loss along a few directions: its value, first and second derivatives there, in forward mode."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.nnx import as_arrays
from kfqn_optax._capture.parameters import is_masked
from kfqn_optax._numerics import wide_dtype


class Forms(NamedTuple):
    """The quadratic model of a loss L along K directions u_1, ..., u_K.

    Attributes:
      value: L. ().
      slopes: <dL, u_i>. (K,).
      matrix: <u_i, C u_j>, symmetric. C is the Gauss-Newton matrix of L where the loss has a mark
        :func:`outputs`, and the matrix of its second derivatives where it has none. (K, K).
    """

    value: jax.Array
    slopes: jax.Array
    matrix: jax.Array


def forms_of(
    loss: Callable[[ArrayTree], jax.Array],
    params: ArrayTree,
    directions: Sequence[Any],
    stacked: bool,
) -> Forms:
    """The forms of ``loss`` at ``params``; parameters masked in all directions stay constants.

    ``stacked`` chooses the program. XLA merges what pairs of directions have in common, but not in loops;
    stacked directions share it there too. Elsewhere they cost more: their copies, and without a mark the
    upper triangle.
    """
    leaves, structure = jax.tree.flatten(params)
    tangents = [_tangents(params, direction) for direction in directions]
    moving = [i for i in range(len(leaves)) if not all(is_masked(own[i]) for own in tangents)]

    def along(values: list[jax.Array]) -> jax.Array:
        placed = list(leaves)
        for i, value in zip(moving, values, strict=True):
            placed[i] = value
        value = loss(jax.tree.unflatten(structure, placed))
        return value.astype(wide_dtype(value))

    start = [jnp.asarray(leaves[i]) for i in moving]
    moves = [[_filled(own[i], leaves[i]) for i in moving] for own in tangents]
    return (_stacked if stacked else _in_pairs)(along, start, moves)


def has_loop(jaxpr: Any) -> bool:
    """Whether a program, a ``Jaxpr`` or a closed one, runs something more than once."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name in ("scan", "while"):
            return True
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
        if any(_is_program(value) and has_loop(value) for value in inner):
            return True
    return False


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns")


def _stacked(
    along: Callable[[Any], jax.Array], start: list[jax.Array], moves: list[list[jax.Array]]
) -> Forms:
    stack = [jnp.stack(leaves) for leaves in zip(*moves, strict=True)]

    def slopes(values):
        one = lambda move: jax.jvp(along, (values,), (move,))
        value, of_each = jax.vmap(one, out_axes=(None, 0))(stack)
        return of_each, value

    def derivatives(move):
        return jax.jvp(slopes, (start,), (move,), has_aux=True)

    of_each, seconds, value = jax.vmap(derivatives, out_axes=(None, 0, None))(stack)
    return Forms(value, of_each, (seconds + seconds.T) / 2)


def _in_pairs(
    along: Callable[[Any], jax.Array], start: list[jax.Array], moves: list[list[jax.Array]]
) -> Forms:
    def slope(move):
        """values -> the slope along ``move``, and the loss, which is not computed apart."""
        return lambda values: jax.jvp(along, (values,), (move,))[::-1]

    lower = [
        [jax.jvp(slope(one), (start,), (other,), has_aux=True) for other in moves[: i + 1]]
        for i, one in enumerate(moves)
    ]
    of_each = jnp.stack([row[0][0] for row in lower])
    entry = lambda i, j: lower[max(i, j)][min(i, j)][1]
    count = range(len(moves))
    matrix = jnp.stack([jnp.stack([entry(i, j) for j in count]) for i in count])
    return Forms(lower[0][0][2], of_each, matrix)


def _tangents(params: ArrayTree, direction: Any) -> list[Any]:
    """For each leaf of ``params`` its tangent, or ``MaskedNode``."""

    def place(u, p):
        if is_masked(u):
            return jax.tree.map(lambda _: u, p)
        return jnp.asarray(u, jnp.result_type(p))

    tree = jax.tree.map(place, as_arrays(direction), as_arrays(params), is_leaf=is_masked)
    return jax.tree.leaves(tree, is_leaf=is_masked)


def _filled(tangent: Any, leaf: jax.Array) -> jax.Array:
    return jnp.zeros_like(leaf) if is_masked(tangent) else tangent
