"""The methods that can be compared. To add one: write its recipe and enter it in ``METHODS``."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._models import Tree
from kfqn_optax.bench._problems import Problem


class Recipe(NamedTuple):
    """What a method brings to the training loop.

    Attributes:
      init: ``(params, batches) -> opt_state``; may take one pass over the batches (a warm start).
      step: ``(params, opt_state, images) -> (params, opt_state, loss)``; the caller compiles it.
    """

    init: Callable[[Tree, Iterable[jax.Array]], Tree]
    step: Callable[
        [Tree, Tree, jax.Array],
        tuple[Tree, Tree, jax.Array],
    ]


Settings = Mapping[str, Any]
SETTINGS: dict[str, Settings] = {
    "default": {},
    "capped": {"damping": 0.3, "step_rule": 3.0},
    "paper": {"damping": 0.3, "step_rule": None},
}


class Method(NamedTuple):
    """A recipe and its learning rates.

    Attributes:
      build: ``(problem, learning_rate, settings) -> Recipe``; ``settings``: one of ``SETTINGS``.
      learning_rates: for each problem the best of those tried, see README.md.
      paper_learning_rate: the published one, where there is a published setting.
    """

    build: Callable[[Problem, float, Settings], Recipe]
    learning_rates: Mapping[str, float]
    paper_learning_rate: float | None = None


def learning_rate(name: str, problem: str, setting: str) -> float:
    """The learning rate a method uses unless the user gives one."""
    method = METHODS[name]
    if setting != "default" and method.paper_learning_rate is not None:
        return method.paper_learning_rate
    return method.learning_rates[problem]


def _first_order(problem: Problem, tx: optax.GradientTransformation) -> Recipe:
    def step(params, opt_state, images):
        loss, grads = jax.value_and_grad(problem.train_loss)(params, images)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return Recipe(lambda params, batches: tx.init(params), step)


def _sgd(problem: Problem, learning_rate: float, settings: Settings) -> Recipe:
    return _first_order(problem, optax.sgd(learning_rate, momentum=0.9))


def _adam(problem: Problem, learning_rate: float, settings: Settings) -> Recipe:
    return _first_order(problem, optax.adam(learning_rate))


def _kfqn(name: str) -> Callable[[Problem, float, Settings], Recipe]:
    """The optimizer of this name."""

    def build(problem: Problem, learning_rate: float, settings: Settings) -> Recipe:
        make = functools.partial(getattr(kfqn, name), learning_rate, **settings)
        return _second_order(problem, make, warm=name.startswith("kbfgs"))

    return build


def _second_order(
    problem: Problem,
    make: Callable[[kfqn.Layers], optax.GradientTransformationExtraArgs],
    warm: bool,
) -> Recipe:
    """A recipe with the transformation that ``make`` returns for the layers found, warm-started or not."""
    params = jax.eval_shape(problem.init, 0)
    example = jax.ShapeDtypeStruct((1, problem.widths[0]), jnp.float32)
    layers = kfqn.find_layers(problem.model, {"params": params}, example)
    value_and_grad = kfqn.value_and_grad(problem.train_loss, layers, batch_argnums=1)
    tx = make(layers)

    def init(params, batches):
        opt_state: Tree = tx.init(params)
        if not warm:
            return opt_state
        return kfqn.warm_start(opt_state, value_and_grad, params, ((images,) for images in batches))

    def step(params, opt_state, images):
        loss, grads, curvature = value_and_grad(params, images)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, loss

    return Recipe(init, step)


METHODS = {
    "kbfgs": Method(_kfqn("kbfgs"), {"curves": 3.0, "mnist": 3.0, "faces": 1.0}, 0.3),
    "sgd": Method(_sgd, {"curves": 0.003, "mnist": 0.003, "faces": 0.003}),
    "adam": Method(_adam, {"curves": 3e-3, "mnist": 3e-3, "faces": 3e-4}),
    "kbfgs_l": Method(_kfqn("kbfgs_l"), {"curves": 3.0, "mnist": 3.0, "faces": 1.0}, 0.3),
    "kfqn": Method(_kfqn("kfqn"), {"curves": 3.0, "mnist": 3.0, "faces": 1.0}, 0.3),
    "kfac": Method(_kfqn("kfac"), {"curves": 1.0, "mnist": 1.0, "faces": 1.0}),
}
COMPARED = ["kfac", "kbfgs", "sgd", "adam"]  # unless the user names methods
