"""``python -m kfqn_optax.bench.coverage``: every kind of layer and model, trained by every method.

Prints a markdown table. A cell is the loss before and after a few jitted steps on one small synthetic
batch, with the same settings everywhere.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench._coverage_rows import ROWS, Problem
from kfqn_optax.bench._quick import quick_jit

LEARNING_RATE, DAMPING = 1.0, 0.1
METHODS: dict[str, Callable[[kfqn.Layers], optax.GradientTransformationExtraArgs]] = {
    "kbfgs": lambda layers: kfqn.kbfgs(LEARNING_RATE, layers, damping=DAMPING),
    "kbfgs_l": lambda layers: kfqn.kbfgs_l(LEARNING_RATE, layers, memory=10, damping=DAMPING),
    "kfqn": lambda layers: kfqn.kfqn(LEARNING_RATE, layers, damping=DAMPING),
    "kfac": lambda layers: kfqn.kfac(LEARNING_RATE, layers, damping=DAMPING),
}


def train(
    problem: Problem, tx: optax.GradientTransformationExtraArgs, steps: int
) -> tuple[float, float, int]:
    """The loss before and after ``steps`` steps, and how many of the steps were left out."""
    value_and_grad = kfqn.value_and_grad(
        problem.loss_fn,
        problem.layers,
        has_aux=True,
        forward=problem.forward,
    )
    if problem.model is not None:
        losses, opt_state = train_model(problem.model, value_and_grad, tx, steps)
    else:
        losses, opt_state = train_params(problem, value_and_grad, tx, steps)
    return float(losses[0]), float(losses[-1]), int(kfqn.diagnostics(opt_state)["rejected"])


def train_params(problem: Problem, value_and_grad: Any, tx: Any, steps: int) -> tuple[jax.Array, Any]:
    """The losses, the last one after the last step, and the optimizer's state."""

    def step(carry, _):
        params, state, opt_state = carry
        (loss, state), grads, curvature = value_and_grad(params, state)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state, opt_state), loss

    def run(params, state):
        start = (params, state, tx.init(params))
        (params, state, opt_state), losses = jax.lax.scan(step, start, None, length=steps)
        last, _ = problem.loss_fn(params, state)
        return jnp.append(losses, last), opt_state

    return quick_jit(run)(problem.params, problem.state)


def train_model(model: nnx.Module, value_and_grad: Any, tx: Any, steps: int) -> tuple[list[jax.Array], Any]:
    """The same in the NNX style in which the model and an ``nnx.Optimizer`` change in place."""
    model = nnx.clone(model)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        (loss, _), grads, curvature = value_and_grad(model)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    losses = [step(model, optimizer) for _ in range(steps + 1)]
    return losses, optimizer.opt_state


def cell(problem: Problem, method: str, steps: int) -> str:
    """``first -> last`` loss, and what went wrong, if anything did."""
    try:
        first, last, rejected = train(problem, METHODS[method](problem.layers), steps)
    except Exception as error:  # any failure belongs in the table
        return f"**{type(error).__name__}**"
    return outcome(first, last, rejected)


def outcome(first: float, last: float, rejected: int) -> str:
    text = f"{first:.3g} → {last:.2g}"
    if not math.isfinite(last) or last > first:
        text = f"**diverged** {text}"
    return f"{text}, {rejected} left out" if rejected else text


def preconditioned(problem: Problem) -> str:
    """How many of the parameters belong to a preconditioned layer."""
    total = sum(leaf.size for leaf in jax.tree.leaves(problem.params))
    rest = sum(math.prod(shape) for _, shape, _ in problem.layers.others)
    return f"{total - rest:,} of {total:,}"


def table(rows: Mapping[str, Callable[[], Problem]], methods: Sequence[str], steps: int) -> Iterator[str]:
    """The lines of a markdown table, each as soon as its row is trained."""
    yield f"| model | parameters preconditioned | {' | '.join(methods)} |"
    yield "|---" * (2 + len(methods)) + "|"
    for name, build in rows.items():
        problem = build()
        cells = [cell(problem, method, steps) for method in methods]
        yield f"| {name} | {preconditioned(problem)} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a method failed or diverged anywhere, and 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m kfqn_optax.bench.coverage", description=__doc__)
    parser.add_argument(
        "--rows", nargs="+", metavar="WORD", default=[""], help="rows with these words only"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=50, help="steps in each cell (default: 50)")
    options = parser.parse_args(arguments)
    words = [word.lower() for word in options.rows]
    rows = {name: row for name, row in ROWS.items() if any(word in name.lower() for word in words)}
    if not rows or options.steps < 1:
        parser.error(f"--steps must be positive, and --rows match one of: {', '.join(ROWS)}")
    failed = False
    for line in table(rows, options.methods, options.steps):
        print(line, flush=True)
        failed |= "**" in line
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
