"""The problem of the ecosystem table, one layer on one batch, and the loops that train it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

STEPS = 30
LEARNING_RATE = 1.0
METHODS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "kfac": kfqn.kfac,
    "kbfgs": kfqn.kbfgs,
}
STATIC = {"kfac": (), "kbfgs": "groups"}  # what optax.inject_hyperparams must not trace


class Losses(NamedTuple):
    """Before and after training."""

    first: float
    last: float


class Problem(NamedTuple):
    """A classifier of three classes, and the method that trains it."""

    method: str
    params: Any
    layers: kfqn.Layers
    x: jax.Array

    @property
    def make(self) -> Callable[..., optax.GradientTransformationExtraArgs]:
        return METHODS[self.method]

    @property
    def tx(self) -> optax.GradientTransformationExtraArgs:
        return self.make(LEARNING_RATE, layers=self.layers)

    @property
    def value_and_grad(self) -> Any:
        return kfqn.value_and_grad(loss_fn, self.layers, batch_argnums=1)


def problem(method: str) -> Problem:
    return Problem(method, *_given())


@functools.cache
def _given() -> tuple[Any, kfqn.Layers, jax.Array]:
    x = jax.random.normal(jax.random.key(0), (32, 4))
    variables = quick_jit(MODEL.init)(jax.random.key(1), x)
    return variables["params"], kfqn.find_layers(MODEL, variables, x), x


MODEL = nn.Dense(3)


def error_of(outputs: jax.Array, x: jax.Array) -> jax.Array:
    logits = kfqn.outputs(outputs, "categorical")
    return optax.softmax_cross_entropy_with_integer_labels(logits, x[:, :3].argmax(1)).mean()


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    outputs: Any = MODEL.apply({"params": params}, x)
    return error_of(outputs, x)


def train(
    problem: Problem, tx: Any, evaluated: Callable[[Any, Any], Any] | None = None, **extra: Any
) -> Losses:
    """The plain loop, scanned; ``extra`` are made of (params, loss, grads) for each update."""

    def step(carry, _):
        params, state = carry
        loss, grads, curvature = problem.value_and_grad(params, problem.x)
        more = {name: make(params, loss, grads) for name, make in extra.items()}
        updates, state = tx.update(grads, state, params, curvature=curvature, **more)
        return (optax.apply_updates(params, updates), state), loss

    def last_of(params, state):
        return params if evaluated is None else evaluated(state, params)

    return scanned(problem, step, (problem.params, tx.init(problem.params)), last_of)


def scanned(problem: Problem, step: Callable[..., Any], start: Any, last_of: Callable[..., Any]) -> Losses:
    """``STEPS`` of ``step``; ``last_of(*carry)`` are the parameters at the end."""

    @quick_jit
    def run(start):
        carry, losses = jax.lax.scan(step, start, None, length=STEPS)
        return losses[0], loss_fn(last_of(*carry), problem.x)

    return Losses(*map(float, run(start)))


def looped(step: Callable[..., Any], carry: tuple[Any, ...]) -> Losses:
    """The same loop in Python; ``step(*carry) -> (*carry, loss)``."""
    losses: list[Any] = []
    for _ in range(STEPS):
        *carry_now, loss = step(*carry)
        carry = tuple(carry_now)
        losses.append(loss)
    first, last = (float(jnp.mean(loss)) for loss in (losses[0], losses[-1]))
    return Losses(first, last)
