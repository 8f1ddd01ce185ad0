"""Some of a batch's examples: which arguments of a loss have one entry an example, and some of them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._meshes import in_any_mesh, spec_with

Argnums = int | Sequence[int] | None


def check_argnums(argnums: Argnums) -> tuple[int, ...]:
    """``batch_argnums`` as a tuple, empty for None; raises for what is no position after the parameters."""
    if argnums is None:
        return ()
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise ValueError(
            f"kfqn.value_and_grad: batch_argnums={argnums!r}. Give the positions of loss_fn's arguments"
            " whose leading axis counts examples, as in jax.grad's argnums: from 1 on, 0 is the parameters."
        )
    return numbers


def count_examples(argnums: tuple[int, ...], args: tuple[Any, ...]) -> int | None:
    """How many examples there are; None if no argument counts them, and an error if they disagree."""
    lengths: dict[int, list[tuple[int, ...]]] = {}
    for number in argnums:
        if number > len(args):
            raise ValueError(
                f"kfqn.value_and_grad: batch_argnums names argument {number}, but loss_fn was called with"
                f" {len(args)} positional arguments after the parameters. Pass the batch by position."
            )
        lengths[number] = [jnp.shape(leaf) for leaf in jax.tree.leaves(args[number - 1])]
    shapes = [shape for of_one in lengths.values() for shape in of_one]
    if not argnums:
        return None
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) != 1 or shapes[0][0] == 0:
        listed = "; ".join(f"argument {number}: {of_one}" for number, of_one in lengths.items())
        raise ValueError(
            "kfqn.value_and_grad: the arguments in batch_argnums must hold arrays whose leading axes all"
            f" have one length, the number of examples, but the shapes are {listed}. Leave out what is not"
            " per example (a key, a scalar), and put the examples' axis first."
        )
    return shapes[0][0]


def check_rows(rows: int | None, call: str) -> None:
    """Raise unless ``rows`` is a number of examples or None."""
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise ValueError(f"{call}: rows={rows!r} is no number of examples. Give an int from 1, or None.")


def take(
    argnums: tuple[int, ...], args: tuple[Any, ...], chosen: jax.Array, blocks: int
) -> tuple[Any, ...]:
    """``args`` with the ``chosen`` examples only, of which each of so many equal blocks has as many."""
    taken = list(args)
    for number in argnums:
        pick = lambda leaf: _pick(jnp.asarray(leaf), chosen, blocks)
        taken[number - 1] = jax.tree.map(pick, args[number - 1])
    return tuple(taken)


def _pick(leaf: jax.Array, chosen: jax.Array, blocks: int) -> jax.Array:
    """``leaf[chosen]``, taken in each block apart, which devices that hold blocks do without the others."""
    length, rows = leaf.shape[0] // blocks, len(chosen)

    def pick(leaf, chosen):
        divided = leaf.reshape(blocks, length, *leaf.shape[1:])
        within = chosen.reshape(blocks, -1) - length * jnp.arange(blocks, dtype=chosen.dtype)[:, None]
        of_each = jax.vmap(lambda block, rows: block[rows])(divided, within)
        return of_each.reshape(rows, *leaf.shape[1:])

    return in_any_mesh(pick, leaf, chosen, specs=spec_with(leaf, rows))


def twice(argnums: tuple[int, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """``args`` with all examples, and all of them again."""

    def doubled(leaf):
        leaf = jnp.asarray(leaf)
        return in_any_mesh(lambda leaf: jnp.concatenate([leaf, leaf]), leaf, like=leaf)

    taken = list(args)
    for number in argnums:
        taken[number - 1] = jax.tree.map(doubled, args[number - 1])
    return tuple(taken)
