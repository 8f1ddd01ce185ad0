"""A loss along a few directions: its value, first and second derivatives there.

In forward mode, which is exact and cheap, or by differences of gradients where the loss does not allow it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.nnx import as_arrays
from kfqn_optax._capture.outputs import pulled_back
from kfqn_optax._capture.parameters import is_masked
from kfqn_optax._capture.program import LOOPS, equations
from kfqn_optax._numerics import inner, safe_divide, wide_dtype

MOVED = "kfqn_moved"


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
    along, start, moves = _placed(loss, params, directions)
    return (_stacked if stacked else _in_pairs)(along, start, moves)


def forms_by_differences(
    loss: Callable[[ArrayTree], jax.Array],
    params: ArrayTree,
    directions: Sequence[Any],
    length: jax.Array,
    marked: bool,
) -> Forms:
    """The forms of ``loss`` from its gradients at ``params`` and at a short way along each direction.

    The way is sqrt(eps) times ``length``, that of the parameters. For a loss f(z(p), p) with marked z its
    Gauss-Newton matrix times u is what J(p)^T df/dz, with J of the unmoved model, and df/dp change by: both
    models are under one ``jax.vmap``, and cotangents at the marks of the moved one go back through the
    other.
    """
    along, start, moves = _placed(loss, params, directions)
    value, grads = jax.value_and_grad(along)(start)
    size = max(float(jnp.finfo(leaf.dtype).eps) for leaf in start) ** 0.5 * length

    def action(move):
        way = safe_divide(size, jnp.sqrt(inner(move, move)))
        moved = [(x + way * u).astype(x.dtype) for x, u in zip(start, move, strict=True)]
        if not marked:
            change = jax.tree.map(jnp.subtract, jax.grad(along)(moved), grads)
        else:
            both = [jnp.stack(pair) for pair in zip(start, moved, strict=True)]
            signed = lambda values, sign: jax.grad(lambda values: sign * along(values))(values)
            with pulled_back(MOVED):
                of_both = jax.vmap(signed, axis_name=MOVED)(both, jnp.array([-1, 1], value.dtype))
            change = [leaf.sum(0) for leaf in of_both]
        return [safe_divide(leaf.astype(value.dtype), way) for leaf in change]

    def row(move):
        of_move = action(move)
        return jnp.stack([inner(of_move, u) for u in moves])

    # One after the other: gradients of such losses take long to compile, and a callback has no vmap.
    matrix = jax.lax.map(row, [jnp.stack(leaves) for leaves in zip(*moves, strict=True)])
    return Forms(value, jnp.stack([inner(grads, u) for u in moves]), (matrix + matrix.T) / 2)


def _placed(
    loss: Callable[[ArrayTree], jax.Array], params: ArrayTree, directions: Sequence[Any]
) -> tuple[Callable[[list[jax.Array]], jax.Array], list[jax.Array], list[list[jax.Array]]]:
    """The loss as a function of the leaves that move, these leaves, and the directions as lists of them."""
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
    return along, start, [[_filled(own[i], leaves[i]) for i in moving] for own in tangents]


def has_loop(program: Any) -> bool:
    """Whether a program, a ``Jaxpr`` or a closed one, runs something more than once."""
    return any(equation.primitive.name in LOOPS for equation, _ in equations(program))


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
