"""The methods by name: their transformations, their learning rates, and how a step uses them.

To add one, enter it in ``METHODS``.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._library import value_and_grad
from kfqn_optax.bench._models import Tree
from kfqn_optax.bench._tasks.task import Task

Step = Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree, Tree, jax.Array]]


class Method(NamedTuple):
    """A transformation and the step that uses it.

    Attributes:
      make: ``(learning_rate, layers) -> transformation``.
      step: ``(task, transformation) -> step``, the step ``(params, opt_state, state, batch) ->
        (params, opt_state, state, loss)``.
      full_batch_only: whether it is for problems with all examples in every step.
      rate_in_state: whether the learning rate is in the optimizer's state, so that one compiled step
        serves all rates.
    """

    make: Callable[[float, kfqn.Layers], optax.GradientTransformationExtraArgs]
    step: Callable[[Task, Any], Step]
    full_batch_only: bool = False
    rate_in_state: bool = False


def gradient_step(task: Task, tx: Any) -> Step:
    def step(params, opt_state, state, batch):
        (loss, state), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch, state)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, loss

    return step


def curvature_step(task: Task, tx: Any, groups: int = 1) -> Step:
    statistics_too = value_and_grad(task.loss, task.layers, task.forward, groups)

    def step(params, opt_state, state, batch):
        (loss, state), grads, curvature = statistics_too(params, batch, state)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, state, loss

    return step


def line_search_step(task: Task, tx: Any) -> Step:
    """The line search's last evaluation is the next step's value and gradient."""

    def step(params, opt_state, state, batch):
        value_fn: Any = lambda params: task.loss(params, batch, state)[0]
        loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
        loss = jnp.asarray(loss)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state, state, loss

    return step


def _first_order(make: Callable[[float], Any]) -> Method:
    def with_rate(learning_rate: float) -> Any:
        return make(learning_rate)

    inject = optax.inject_hyperparams(with_rate)
    return Method(lambda rate, layers: inject(learning_rate=rate), gradient_step, rate_in_state=True)


def _kbfgs(groups: int = 1, **options: Any) -> Method:
    make = lambda rate, layers: kfqn.kbfgs(rate, layers, groups=groups, **options)
    return Method(make, functools.partial(curvature_step, groups=groups))


METHODS: dict[str, Method] = {
    "adam": _first_order(optax.adam),
    "nadamw": _first_order(optax.nadamw),
    "sgd": _first_order(lambda rate: optax.sgd(rate, momentum=0.9)),
    "rmsprop": _first_order(optax.rmsprop),
    "muon": _first_order(optax.contrib.muon),  # Adam for what is no matrix
    "lbfgs": Method(lambda rate, layers: optax.lbfgs(), line_search_step, full_batch_only=True),
    "kfac": Method(lambda rate, layers: kfqn.kfac(rate, layers), curvature_step),
    "kbfgs": _kbfgs(),
    "kbfgs-groups": _kbfgs(groups=5),
    "kbfgs-gradients": _kbfgs(start="gradients"),
    "kbfgs-groups-gradients": _kbfgs(groups=5, start="gradients"),
    "kbfgs-no-diagonal": _kbfgs(others_decay=None),  # for what belongs to no layer
    "kbfgs_l": Method(lambda rate, layers: kfqn.kbfgs_l(rate, layers), curvature_step),
    "kfqn": Method(lambda rate, layers: kfqn.kfqn(rate, layers), curvature_step),
}
COMPARED = ("adam", "sgd", "muon", "lbfgs", "kfac", "kbfgs", "kfqn")  # unless the user names methods

# The learning rates tried. A loss summed over pixels, or of second derivatives, has large gradients.
_ADAPTIVE = (3e-4, 1e-3, 3e-3, 1e-2)
GRIDS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "adam": {"": _ADAPTIVE},
    "nadamw": {"": _ADAPTIVE},
    "sgd": {
        "": (1e-2, 3e-2, 0.1, 0.3),
        **dict.fromkeys(("curves", "mnist", "faces"), (1e-3, 3e-3, 1e-2, 3e-2)),
        "pinn": (1e-5, 3e-5, 1e-4, 3e-4),
    },
    "rmsprop": {"": (1e-4, 3e-4, 1e-3, 3e-3)},
    "muon": {"": (1e-3, 3e-3, 1e-2, 3e-2)},
}


def learning_rates(method: str, problem: str) -> tuple[float, ...]:
    """Those of ``GRIDS`` for the problem, or for all (""); 1 for a method without a grid."""
    grid = GRIDS.get(method, {"": (1.0,)})
    return grid.get(problem, grid[""])
