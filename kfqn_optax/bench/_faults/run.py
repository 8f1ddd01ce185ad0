"""Training a small network, one step of which is disturbed."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax._sides import lbfgs
from kfqn_optax.bench._faults.faults import Fault, Inputs

IN, OUT, EXAMPLES, BATCH = 8, 4, 1_024, 64
STEPS, WHEN, LAST = 200, 20, 50  # of the steps the last ones get shorter: less noise in where they end

MODEL = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(16), nn.tanh, nn.Dense(OUT)])


METHODS: Mapping[str, Callable[..., Any]] = {
    "kfac": functools.partial(kfqn.kfac, damping=1.0),
    "kbfgs": functools.partial(kfqn.kbfgs, damping=0.1),
    "kbfgs_l": functools.partial(kfqn.kbfgs_l, damping=0.1, memory=10),
    "kfqn": functools.partial(kfqn.kfqn, damping=0.1),
}
RULES: Mapping[str, tuple[Any, float]] = {  # with a learning rate
    "quadratic": (kfqn.quadratic(), 1.0),
    "quadratic, damping fixed": (kfqn.quadratic(rate=1.0), 1.0),  # as with secant sides
    "measured": (kfqn.measured(), 1.0),
    "capped": (0.1, 0.3),
}
PAIRS = [
    *(("kfac", rule) for rule in ("quadratic", "measured", "capped")),
    *((m, rule) for m in METHODS if m != "kfac" for rule in list(RULES)[1:]),
]


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
      loss: of all examples, after the last step.
      finite: whether parameters and state are.
      positive: the smallest eigenvalue of any factor's symmetric part over its largest.
      rejected, outliers, damped, skipped: what the diagnostics count, pairs over all layers.
    """

    loss: float
    finite: bool
    positive: float
    rejected: int
    outliers: int
    damped: int
    skipped: int


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    """Labels of a teacher, with noise: the loss has a floor."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, IN)).astype(np.float32)
    first, second = rng.normal(size=(IN, 12)) / 2, rng.normal(size=(12, OUT)) / 3
    y = np.tanh(x @ first) @ second + 0.3 * rng.normal(size=(EXAMPLES, OUT))
    return x, y.astype(np.float32)


class Trainer:
    """One method with one rule, compiled once for all faults."""

    def __init__(self, method: str, rule: str, jit: Callable[..., Any] = jax.jit):
        x, _ = data()
        self._params = jax.jit(MODEL.init)(jax.random.key(0), x[:1])["params"]
        layers = kfqn.find_layers(MODEL, {"params": self._params}, x[:1])
        make, settings = METHODS[method], METHODS[method].keywords
        step_rule, usual_rate = RULES[rule]
        value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))

        def optimizer(rate: Any, damping: Any) -> Any:
            changed = settings | {"damping": settings["damping"] * damping}
            return make(usual_rate * rate, layers, **changed, step_rule=step_rule)

        def step(params, state, inputs):
            tx = optimizer(inputs.rate, inputs.damping)
            _, grads, curvature = value_and_grad(params, inputs.x, inputs.y, inputs.loss_scale)
            grads = jax.tree.map(lambda g: g + inputs.grad_shift, grads)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state

        self._state = optimizer(1.0, 1.0).init(self._params)
        self._step = jit(step)
        self._loss = jit(loss_fn)

    def run(self, fault: Fault | None, steps: int = STEPS) -> Outcome:
        params, state = self._params, self._state
        for k in range(steps):
            inputs = batch(k)
            if fault is not None and k == WHEN:
                inputs = fault(inputs)
            inputs = inputs._replace(rate=inputs.rate * min(1.0, (steps - k) / LAST))
            params, state = self._step(params, state, jax.tree.map(jnp.float32, inputs))
        told = kfqn.diagnostics(state)
        sides = [side for layer in told["layers"].values() for side in (layer["input"], layer["output"])]
        return Outcome(
            loss=float(self._loss(params, *data(), 1.0)),
            finite=all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves((params, state))),
            positive=smallest_eigenvalue(state),
            rejected=int(told["rejected"]),
            outliers=int(told["outliers"]),
            damped=sum(int(side["damped"]) for side in sides),
            skipped=sum(int(side["skipped"]) for side in sides),
        )


def batch(k: int) -> Inputs:
    rows = np.random.default_rng(k).permutation(EXAMPLES)[:BATCH]
    x, y = data()
    return Inputs(x[rows], y[rows])


def swapped(k: int) -> Fault:
    """Another batch in the place of the disturbed one."""
    return lambda inputs: batch(10_000 + k)


def loss_fn(params, x, y, scale):
    z = kfqn.outputs(MODEL.apply({"params": params}, x), "normal")
    return scale * jnp.mean(jnp.sum((z - y) ** 2, axis=1))


def factors(state: Any) -> list[np.ndarray]:
    """All factors as matrices; of limited memory, what it does to I."""

    def dense(factor: Any) -> np.ndarray:
        if isinstance(factor, lbfgs.LbfgsState):
            factor = lbfgs.apply(factor, jnp.eye(factor.s.shape[-1]))
        return np.asarray(factor, np.float64)

    return [dense(side.factor) for side in (*state[0].inputs.values(), *state[0].outputs.values())]


def smallest_eigenvalue(state: Any) -> float:
    """Of any factor's symmetric part, over its largest; -inf if one is not finite."""
    least = np.inf
    for matrix in factors(state):
        if not np.isfinite(matrix).all():
            return -np.inf
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        least = min(least, values[0] / values[-1])
    return float(least)
