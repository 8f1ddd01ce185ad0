"""Train one method from one seed, on the clock.

The clock runs only while parameters are being trained, warm start included: each step is waited for, so
that what it counts is work done. Compiling is done ahead, once for a method, and timed on its own. The full
losses are evaluated off the clock: after each epoch, and every few seconds in longer ones. The images are
put on the device once and a batch is gathered from them by index inside the compiled step.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax.bench._methods import Recipe
from kfqn_optax.bench._models import Tree, l2_term
from kfqn_optax.bench._problems import Problem

_SECONDS_BETWEEN = 3.0  # evaluations, at most, where an epoch is longer
_EVALUATED_AT_ONCE = 1_000  # images: bounds the memory that evaluation takes


class Point(NamedTuple):
    """Full losses after some training: ``train_loss`` with the L2 term, ``test_loss`` without."""

    epochs: float
    seconds: float
    train_loss: float
    test_loss: float


@dataclasses.dataclass
class Run:
    """The record of one run, filled in while it trains, so that an interrupted one is not lost.

    Attributes:
      compile_seconds: of the method, shared by the runs of all seeds.
      start_seconds: of the warm start, where the method has one.
      seconds: of training, warm start included.
      diverged_epoch: the epoch (from 1) in which a loss was not finite, or at whose end the training
        loss was more than ten times the initial one.
      finished: whether it ended of itself.
    """

    method: str
    seed: int
    learning_rate: float
    steps_per_epoch: int
    compile_seconds: float
    steps: int = 0
    start_seconds: float = 0.0
    seconds: float = 0.0
    diverged_epoch: int | None = None
    reached_target: bool = False
    finished: bool = False
    history: list[Point] = dataclasses.field(default_factory=list)

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    @property
    def seconds_per_step(self) -> float:
        return (self.seconds - self.start_seconds) / self.steps if self.steps else math.nan


class Budget(NamedTuple):
    """How long a run may be, and the training loss at which it has done its work."""

    epochs: int | None
    seconds: float | None
    target: float | None

    def share_used(self, run: Run) -> float:
        """From 0 to 1 and a little over; 1 for a run that diverged or reached the target."""
        if run.diverged_epoch is not None or run.reached_target:
            return 1.0
        by_epochs = run.epochs / self.epochs if self.epochs else 0.0
        by_seconds = run.seconds / self.seconds if self.seconds else 0.0
        return max(by_epochs, by_seconds)


class Program(NamedTuple):
    """A method compiled for one problem, data set and batch size; good for every seed."""

    problem: Problem
    recipe: Recipe
    step: Callable[..., tuple[Tree, Tree, jax.Array]]
    train: jax.Array
    test: jax.Array
    batch_size: int
    compile_seconds: float

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.batch_size

    def shuffled_epoch(self, rng: np.random.Generator) -> jax.Array:
        """Indices of shape (steps, batch_size). The images left over are left out of this epoch."""
        order = rng.permutation(len(self.train))[: self.steps_per_epoch * self.batch_size]
        return jnp.asarray(order.reshape(-1, self.batch_size), jnp.int32)

    def batches(self) -> Iterator[jax.Array]:
        """The training images once, in their order, as a warm start takes them."""
        for start in range(0, self.steps_per_epoch * self.batch_size, self.batch_size):
            yield self.train[start : start + self.batch_size]


def compile_method(
    problem: Problem, recipe: Recipe, train: jax.Array, test: jax.Array, batch_size: int
) -> Program:
    """Compile the step ahead, and the warm start by running it on two batches."""

    def step(params, opt_state, images, order, index):
        return recipe.step(params, opt_state, images[order[index]])

    program = Program(problem, recipe, step, train, test, batch_size, compile_seconds=0.0)
    order = program.shuffled_epoch(np.random.default_rng(0))
    params = problem.init(seed=0)
    begin = time.perf_counter()
    opt_state = recipe.init(params, [train[:batch_size]] * 2)
    compiled = jax.jit(step).lower(params, opt_state, train, order, 0).compile()
    return program._replace(step=compiled, compile_seconds=time.perf_counter() - begin)


def train_method(program: Program, run: Run, budget: Budget, on_step: Callable[[Run], None]) -> None:
    """Train from ``run.seed`` until the budget is spent, recording in ``run`` what happens."""
    rng = np.random.default_rng(run.seed)
    params = program.problem.init(run.seed)
    begin = time.perf_counter()
    opt_state = jax.block_until_ready(program.recipe.init(params, program.batches()))
    run.seconds = run.start_seconds = time.perf_counter() - begin
    _evaluate(program, run, budget, params)
    while budget.share_used(run) < 1:
        order = program.shuffled_epoch(rng)
        for index in range(program.steps_per_epoch):
            if run.history and run.seconds >= run.history[-1].seconds + _SECONDS_BETWEEN:
                _evaluate(program, run, budget, params)
                if budget.share_used(run) >= 1:
                    break
            begin = time.perf_counter()
            params, opt_state, loss = jax.block_until_ready(
                program.step(params, opt_state, program.train, order, index)
            )
            run.seconds += time.perf_counter() - begin
            run.steps += 1
            if not math.isfinite(loss):
                run.diverged_epoch = math.ceil(run.epochs)
            on_step(run)
            if budget.share_used(run) >= 1:
                break
        _evaluate(program, run, budget, params)
    run.finished = True


def _evaluate(program: Program, run: Run, budget: Budget, params: Tree) -> None:
    """Add the full losses to the history, unless they are there or the run diverged."""
    if run.history and run.history[-1].epochs == run.epochs:
        return
    losses = _full_losses(program.problem, params, program.train, program.test)
    point = Point(run.epochs, run.seconds, *map(float, losses))
    exploded = bool(run.history) and point.train_loss > 10 * run.history[0].train_loss
    if run.diverged_epoch is None and (exploded or not all(map(math.isfinite, point))):
        run.diverged_epoch = math.ceil(run.epochs)
    if run.diverged_epoch is None:
        run.history.append(point)
        run.reached_target = budget.target is not None and point.train_loss <= budget.target


@functools.partial(jax.jit, static_argnames="problem")
def _full_losses(
    problem: Problem, params: Tree, train: jax.Array, test: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Training loss (with the L2 term) and test loss (without) over all images, chunk by chunk."""

    def mean_loss(images: jax.Array) -> jax.Array:
        one = lambda image: problem.test_loss(params, image[None])
        return jax.lax.map(one, images, batch_size=_EVALUATED_AT_ONCE).mean()

    return mean_loss(train) + l2_term(params), mean_loss(test)
