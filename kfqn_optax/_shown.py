"""How an error shows the value that it was given."""

from typing import Any

import jax
import numpy as np


def shown(value: Any) -> str:
    """``repr`` with arrays as dtype[shape], on one line, cut where it is long."""
    text = " ".join(repr(jax.tree.map(_of_leaf, value)).split())
    return text if len(text) <= 120 else f"{text[:116]} ..."


class _Bare(str):
    """A text without quotes around it."""

    __slots__ = ()
    __repr__ = str.__str__


def _of_leaf(leaf: Any) -> Any:
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
    return _Bare(f"{leaf.dtype}{list(leaf.shape)}") if is_array else leaf
