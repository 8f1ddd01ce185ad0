"""What a function of a part of one's own must return, checked while tracing."""

from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._shown import shown


def check_returned(function: str, value: Any, wanted: Any, what: str) -> None:
    """Raise ``TypeError`` unless ``value`` is a tree with the structure and the shapes of ``wanted``."""
    must = f"but it must return {what}, with the structure and shapes of what it was given:"
    if jax.tree.structure(value) != jax.tree.structure(wanted):
        raise TypeError(f"kfqn: {function} returned {shown(value)}, {must} {shown(wanted)}.")
    leaves = jax.tree.leaves_with_path(value)
    for (path, leaf), expected in zip(leaves, jax.tree.leaves(wanted), strict=True):
        if jnp.shape(leaf) != jnp.shape(expected):
            place = jax.tree_util.keystr(path)
            at = f" at {place}" if place else ""
            raise TypeError(f"kfqn: {function} returned {shown(leaf)}{at}, {must} {shown(expected)}.")
