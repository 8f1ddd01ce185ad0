"""Guards against bad numbers, shared by all formulas."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._meshes import in_any_mesh

OUTLIER = 10.0  # how many times what is usual a batch may be, or count


def wide_dtype(leaf: Any) -> Any:
    """The dtype of an array, float32 at least."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def safe_divide(numerator: jax.Array | float, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, and 0 where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def all_finite(tree: ArrayTree) -> jax.Array:
    """Whether no element of any leaf is inf or NaN, as one boolean array.

    Both survive a sum, which is one pass over each leaf. (So does an overflow of the sum itself, in float32
    or wider, at numbers no use could be made of.)
    """

    def total(tree):
        (leaves,) = pooled(tree)
        return sum((leaf.sum(dtype=wide_dtype(leaf)) for leaf in leaves), start=jnp.zeros([]))

    return jnp.isfinite(in_any_mesh(total, tree))


def inner(a: ArrayTree, b: ArrayTree) -> jax.Array:
    """<a, b> over all leaves of two trees of the same shapes, in float32 or wider."""

    def total(a, b):
        pairs = zip(*pooled(a, b), strict=True)
        return sum((_dot(x, y).real for x, y in pairs), start=jnp.zeros([]))

    return in_any_mesh(total, a, b)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.vdot(x, y, preferred_element_type=jnp.promote_types(wide_dtype(x), wide_dtype(y)))


def pooled(*trees: ArrayTree) -> list[list[jax.Array]]:
    """For each of these trees of the same shapes its leaves, the small ones joined to one vector.

    Sums over a whole tree then compile, and run, as few kernels.
    """
    leaves = [jax.tree.leaves(tree) for tree in trees]
    pools: dict[Any, list[int]] = {}
    for i, same in enumerate(zip(*leaves, strict=True)):
        pool = i if same[0].size > POOLED else tuple(leaf.dtype for leaf in same)
        pools.setdefault(pool, []).append(i)

    def join(own):
        parts = ([own[i].ravel() for i in members] for members in pools.values())
        return [part[0] if len(part) == 1 else jnp.concatenate(part) for part in parts]

    return [join(own) for own in leaves]


POOLED = 2**14  # numbers; on a CPU XLA joins arrays number by number, which takes long for more


def ema(average: jax.Array, value: jax.Array, decay: float | jax.Array) -> jax.Array:
    """One step of an exponential moving average without bias correction."""
    return decay * average + (1 - decay) * value


def add_diagonal(matrix: jax.Array, damping: jax.Array) -> jax.Array:
    """``matrix + damping I``."""
    return matrix + damping * jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def one_by_one(
    function: Callable[..., jax.Array], on_cpu: Callable[..., jax.Array] | None = None
) -> Callable[..., jax.Array]:
    """``function``, which on the CPU does one thing after another where ``jax.vmap`` would batch it.

    Batched Cholesky factorisations and triangular solves of jaxlib 0.10.2 wait for ever on a CPU of two
    threads: each of them keeps a thread and waits for work that needs one. Batched products are slower
    there than one after the other.

    Args:
      function: the function.
      on_cpu: another one for the CPU.
    """
    in_sequence = jax.custom_batching.sequential_vmap(on_cpu or function)

    @functools.wraps(function)
    def dispatched(*args: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(*args, cpu=in_sequence, default=function)

    return dispatched


def settled(tree: Any, count: jax.Array) -> Any:
    """The same tree, its scalars computed once.

    XLA copies the whole computation of a scalar into each fusion that reads it, and the scalars of a step
    are read by every parameter and factor: half the instructions of a compiled step were such copies. Its
    barrier is gone before fusion on a CPU, where a condition that is never true stands instead
    (findings/barrier_before_fusion_on_cpu.sh). Arrays pass by it, since a condition would copy them.

    Args:
      tree: of arrays.
      count: a number that is never negative, which XLA does not know. ().
    """

    def on_cpu(scalars):
        return jax.lax.cond(count < 0, lambda x: jax.tree.map(jnp.zeros_like, x), lambda x: x, scalars)

    leaves, structure = jax.tree.flatten(tree)
    scalars = {i: leaf for i, leaf in enumerate(leaves) if not jnp.ndim(leaf)}
    once = jax.lax.platform_dependent(scalars, cpu=on_cpu, default=jax.lax.optimization_barrier)
    return jax.tree.unflatten(structure, [once.get(i, leaf) for i, leaf in enumerate(leaves)])
