"""The ranges of the methods' constants, checked while tracing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "damping": (lambda x: x > 0, "positive; the papers use 0.3, and less for losses with small gradients"),
    "decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "learning_rate": (lambda x: x >= 0, "at least 0"),
    "every": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "floor": (lambda x: x > 0, "positive"),
    "ceiling": (lambda x: x > 0, "positive"),
    "directions": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "groups": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "inverse_every": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "learn_every": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "max_dim": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "memory": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "mu1": (lambda x: 0 < x < 1, "in (0, 1)"),
    "others_decay": (lambda x: 0 <= x < 1, "in [0, 1), or None for the plain gradient"),
    "probe_step": (lambda x: x >= 0, "at least 0"),
    "rate": (lambda x: 0 < x <= 1, "in (0, 1], 1 for a fixed damping"),
    "rows": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1, or None for all"),
    "statistics_rows": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1, or None for all"),
    "trust": (lambda x: x > 0, "positive"),
    "step_rule": (
        lambda x: x > 0,
        "positive, None for the papers' step, or a rule like kfqn.measured()",
    ),
    "update_every": (lambda x: x >= 1 and x == int(x), "a whole number of at least 1"),
}
_MAY_BE_NONE = ("max_dim", "others_decay", "rows", "statistics_rows", "step_rule")
_STATIC = ("directions", "groups", "max_dim", "memory", "rows", "statistics_rows")


def check_constants(*, call: str = "kfqn", **constants: Any) -> None:
    """Raise ``ValueError`` for a constant out of its range.

    Schedules, and values that are only known at run time, pass; but not as a length of an array.
    """
    for name, value in constants.items():
        if not callable(value) and not (value is None and name in _MAY_BE_NONE):
            _check(call, name, value)


def _check(call: str, name: str, value: Any) -> None:
    holds, wanted = _RANGES[name]
    if value is None or isinstance(value, str) or jnp.ndim(value) > 0:
        raise TypeError(f"{call}: {name}={value!r}, but it must be a number.")
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
