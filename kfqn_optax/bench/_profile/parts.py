"""The parts of a step, each compiled alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax.bench._library import value_and_grad
from kfqn_optax.bench._profile.step import Timed, first_batch
from kfqn_optax.bench._tasks.task import Task

GRADIENT = "value and gradient"
STATISTICS = "value, gradient, all statistics"
SECOND_PASS = "second pass, all statistics"


def parts_of(task: Task) -> dict[str, Timed]:
    """The passes over the model, the same for every method of the library.

    A method asks for some of the statistics only, and what nobody asks for XLA leaves out: what is
    measured here with statistics is the most that a method can spend on them.
    """
    params, state = task.init(0)
    batch = first_batch(task)
    passes = {
        GRADIENT: jax.value_and_grad(task.loss, has_aux=True),
        STATISTICS: functools.partial(_statistics, task),
        SECOND_PASS: functools.partial(_second_pass, task),
    }
    return {name: Timed(function, (params, batch, state)) for name, function in passes.items()}


def _statistics(task: Task, params: Any, batch: Any, state: Any) -> Any:
    (loss, _), grads, curvature = value_and_grad(task.loss, task.layers, task.forward)(params, batch, state)
    return loss, grads, curvature.statistics


def _second_pass(task: Task, params: Any, batch: Any, state: Any) -> Any:
    """Statistics at other parameters; of the first pass nothing is asked for, so that XLA drops it."""
    _, _, curvature = value_and_grad(task.loss, task.layers, task.forward)(params, batch, state)
    return curvature.after(jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), params)).statistics
