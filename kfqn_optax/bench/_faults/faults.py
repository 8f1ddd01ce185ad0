"""The faults: what is changed about one step."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Inputs(NamedTuple):
    """What a step is given.

    Attributes:
      x, y: the batch, one example a row.
      loss_scale: what the loss is multiplied with.
      grad_shift: what is added to every gradient before ``update``.
      rate: the factor of the learning rate, as of a schedule.
      damping: the factor of the damping, as of a schedule.
    """

    x: np.ndarray
    y: np.ndarray
    loss_scale: float = 1.0
    grad_shift: float = 0.0
    rate: float = 1.0
    damping: float = 1.0


Fault = Callable[[Inputs], Inputs]


def one_input(value: float) -> Fault:
    return lambda inputs: inputs._replace(x=_with_one(inputs.x, value))


def one_label(value: float) -> Fault:
    return lambda inputs: inputs._replace(y=_with_one(inputs.y, value))


def _with_one(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[1, 1] = value
    return array


def _set(**changed: float) -> Fault:
    return lambda inputs: inputs._replace(**changed)


def _same_rows(inputs: Inputs) -> Inputs:
    return inputs._replace(
        x=np.tile(inputs.x[:1], (len(inputs.x), 1)), y=np.tile(inputs.y[:1], (len(inputs.y), 1))
    )


def _dead_units(inputs: Inputs) -> Inputs:
    """All hidden units of the first layer are saturated, or dead, in every example."""
    return inputs._replace(x=1e4 * np.abs(inputs.x))


NAN, INF = float("nan"), float("inf")
FAULTS: Mapping[str, Fault] = {
    "an input is NaN": one_input(NAN),
    "an input is inf": one_input(INF),
    "an input is 1e30": one_input(1e30),
    "an input is 1e6": one_input(1e6),
    "a label is NaN": one_label(NAN),
    "a label is inf": one_label(INF),
    "a label is 1e30": one_label(1e30),
    "labels x 1e4": lambda inputs: inputs._replace(y=1e4 * inputs.y),
    "loss is NaN": _set(loss_scale=NAN),
    "loss x 1e6": _set(loss_scale=1e6),
    "loss x 1e-6": _set(loss_scale=1e-6),
    "gradients are NaN": _set(grad_shift=NAN),
    "gradients + 1e6": _set(grad_shift=1e6),
    "inputs x 1e4": _dead_units,
    "all examples the same": _same_rows,
    "all inputs and labels 0": lambda inputs: inputs._replace(x=0 * inputs.x, y=0 * inputs.y),
    "learning rate NaN": _set(rate=NAN),
    "learning rate inf": _set(rate=INF),
    "learning rate x 1e3": _set(rate=1e3),
    "learning rate x 1e8": _set(rate=1e8),
    "damping 0": _set(damping=0.0),
    "damping -1": _set(damping=-1.0),
    "damping NaN": _set(damping=NAN),
}
