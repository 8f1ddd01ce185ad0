"""How an error shows the value that it was given."""

from typing import Any

import jax
import jax.numpy as jnp


def shown(value: Any) -> str:
    """``repr`` with arrays as dtype[shape], on one line, cut where it is long."""
    text = " ".join(repr(jax.tree.map(_of_leaf, value)).split())
    return text if len(text) <= 120 else f"{text[:116]} ..."


class _Bare(str):
    """A text without quotes around it."""

    __slots__ = ()
    __repr__ = str.__str__


def _of_leaf(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or isinstance(leaf, type):
        return leaf
    try:
        concrete = jnp.ndim(leaf) == 0 and not isinstance(leaf, jax.core.Tracer)
    except TypeError:
        concrete = False
    return leaf if concrete else _Bare(f"{leaf.dtype}{list(leaf.shape)}")
