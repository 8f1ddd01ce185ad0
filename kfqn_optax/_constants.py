"""The ranges of the methods' constants, checked while tracing."""

import numbers
from collections.abc import Callable
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax._shown import shown


def _whole(x: float) -> bool:
    return 1 <= x < inf and x == int(x)


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "damping": (
        lambda x: 0 < x < inf,
        "positive and finite; the papers use 0.3, and less for losses with small gradients",
    ),
    "decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "learning_rate": (lambda x: 0 <= x < inf, "at least 0 and finite"),
    "enough": (_whole, "a whole number of at least 1"),
    "every": (_whole, "a whole number of at least 1"),
    "floor": (lambda x: 0 < x < inf, "positive and finite"),
    "ceiling": (lambda x: x > 0, "positive"),
    "directions": (_whole, "a whole number of at least 1"),
    "groups": (_whole, "a whole number of at least 1"),
    "inverse_every": (_whole, "a whole number of at least 1"),
    "learn_every": (_whole, "a whole number of at least 1"),
    "max_dim": (_whole, "a whole number of at least 1"),
    "memory": (_whole, "a whole number of at least 1"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "mu1": (lambda x: 0 < x < 1, "in (0, 1)"),
    "others_decay": (lambda x: 0 <= x < 1, "in [0, 1), or None for the plain gradient"),
    "patience": (_whole, "a whole number of at least 1, or None to keep the gain at 1"),
    "probe_step": (lambda x: 0 <= x < inf, "at least 0 and finite"),
    "rate": (lambda x: 0 < x <= 1, "in (0, 1], 1 for a fixed damping"),
    "rows": (_whole, "a whole number of at least 1, or None for all"),
    "seed": (lambda x: 0 <= x < 2**32 and x == int(x), "a whole number from 0 to 2**32 - 1"),
    "statistics_rows": (_whole, "a whole number of at least 1, None for all, or 'auto'"),
    "trust": (lambda x: x > 0, "positive"),
    "step_rule": (
        lambda x: 0 < x < inf,
        "positive and finite, None for the papers' step, or a rule like kfqn.quadratic()",
    ),
    "update_every": (_whole, "a whole number of at least 1"),
    "weight_decay": (lambda x: 0 <= x < inf, "at least 0 and finite"),
}
_MAY_BE_NONE = ("max_dim", "others_decay", "patience", "rows", "statistics_rows", "step_rule")
_SCHEDULED = ("damping", "learning_rate", "probe_step")
_STATIC = ("directions", "enough", "groups", "max_dim", "memory", "rows", "statistics_rows")


def check_constants(*, call: str = "kfqn", **constants: Any) -> None:
    """Raise ``ValueError`` for a constant out of its range.

    Values that are only known at run time pass; but not as a length of an array. So do schedules of what
    may have one.
    """
    for name, value in constants.items():
        if callable(value) and name not in _SCHEDULED:
            shown = getattr(value, "__name__", type(value).__name__)
            raise TypeError(
                f"{call}: {name} is the function {shown}, but it must be {_RANGES[name][1]}. Schedules"
                f" are for {', '.join(_SCHEDULED)}; a step rule is what kfqn.quadratic() returns."
            )
        if not callable(value) and not (value is None and name in _MAY_BE_NONE):
            _check(call, name, value)


def check_factor_dtype(dtype: Any) -> None:
    """Raise ``ValueError`` for a dtype in which no factor can be kept."""
    if dtype is None:
        return
    try:
        wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    except TypeError:  # no dtype at all
        wide = False
    if not wide:
        raise ValueError(
            f"kfqn: factor_dtype={dtype!r}, but the factors need float32 or float64. Leave it out for the"
            " dtype of the parameters, float32 at least."
        )


def check_precision(precision: Any) -> None:
    """Raise ``ValueError`` for what is no precision of JAX's."""
    try:
        with jax.default_matmul_precision(precision):
            return
    except ValueError:
        raise ValueError(
            f"kfqn: precision={precision!r}, but it must be one of jax.default_matmul_precision, such as"
            " 'highest' or 'high'."
        ) from None


def check_number(what: str, value: Any, wanted: str = "") -> None:
    """Raise ``TypeError`` for what is no real number, known or traced."""
    kinds = (numbers.Real, np.ndarray, jax.Array)
    if not isinstance(value, kinds) or getattr(value, "ndim", 0) > 0 or _complex(value):
        raise TypeError(f"{what}{shown(value)}, but it must be a number{wanted and f': {wanted}'}.")


def _complex(value: Any) -> bool:
    """Of the dtype alone: ``jnp.iscomplexobj`` would put a Python number on a device, at import."""
    return jnp.issubdtype(getattr(value, "dtype", float), jnp.complexfloating)


def _check(call: str, name: str, value: Any) -> None:
    holds, wanted = _RANGES[name]
    check_number(f"{call}: {name}=", value, wanted)
    try:
        number = float(value)
    except jax.errors.ConcretizationTypeError:
        if name not in _STATIC:
            return
        raise ValueError(
            f"{call}: {name} decides the shapes of the state, so it cannot be a traced value. With"
            f' optax.inject_hyperparams, give static_args="{name}".'
        ) from None
    if not holds(number):
        raise ValueError(f"{call}: {name}={value!r}, but it must be {wanted}.")
