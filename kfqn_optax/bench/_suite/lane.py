"""One run as something that can be advanced a little at a time: its own clock, its own batches.

The clock runs only while a step does, and each step is waited for. Compiling comes first, and so does one
step whose results are dropped. Every run from the same seed starts from the same parameters and sees the
same batches in the same order.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfqn_optax.bench._suite.curve import Curve, Point
from kfqn_optax.bench._suite.methods import Method
from kfqn_optax.bench._tasks.task import Task


class Program(NamedTuple):
    """A method compiled for one task, learning rate and batch size; good for every seed."""

    task: Task
    init: Callable[[Any], Any]
    step: Callable[..., Any]
    train: Any
    batch_size: int
    compile_seconds: float

    @property
    def steps_per_epoch(self) -> int:
        return self.task.examples // self.batch_size

    def epoch(self, rng: np.random.Generator) -> jax.Array:
        """Indices (steps, batch_size); what is left over is left out of this epoch."""
        order = rng.permutation(self.task.examples)[: self.steps_per_epoch * self.batch_size]
        return jnp.asarray(order.reshape(-1, self.batch_size), jnp.int32)


def compile_rates(
    task: Task, method: Method, rates: Iterable[float], batch_size: int
) -> dict[float, Program]:
    """A program for each learning rate, compiled once where the rate is in the optimizer's state."""
    programs: dict[float, Program] = {}
    for rate in rates:
        if programs and method.rate_in_state:
            first = next(iter(programs.values()))
            programs[rate] = first._replace(init=jax.jit(method.make(rate, task.layers).init))
        else:
            programs[rate] = compile_program(task, method, rate, batch_size)
    return programs


def compile_program(
    task: Task,
    method: Method,
    learning_rate: float,
    batch_size: int,
    jit: Callable[..., Any] = jax.jit,
) -> Program:
    """Compile the step; the batch is gathered inside it, unless it is all of the training set."""
    tx = method.make(learning_rate, task.layers)
    method_step = method.step(task, tx)

    def step(params, opt_state, state, train, order, index):
        take = lambda array: array if batch_size == task.examples else array[order[index]]
        return method_step(params, opt_state, state, jax.tree.map(take, train))

    train = jax.tree.map(jnp.asarray, task.train)
    program = Program(task, jit(tx.init), step, train, batch_size, 0.0)
    params, state = task.init(0)
    order = program.epoch(np.random.default_rng(0))
    begin = time.perf_counter()
    arguments = (params, program.init(params), state, train, order, 0)
    compiled = jit(step).lower(*arguments).compile()
    seconds = time.perf_counter() - begin
    jax.block_until_ready(compiled(*arguments))
    return program._replace(step=compiled, compile_seconds=seconds)


class Evaluator:
    """The training loss on a fixed part of the training set and the test metric; one for each task.

    The loss is the mean of what the methods minimise, in units of the unscaled loss.
    """

    def __init__(self, task: Task):
        self._batches, self._unit = task.evaluation_batches(), task.loss_unit
        self._test = jax.tree.map(jnp.asarray, task.test)
        self._loss, self._metric = jax.jit(task.loss), jax.jit(task.test_metric)

    def __call__(self, params: Any, state: Any) -> tuple[float, float]:
        losses = [float(self._loss(params, batch, state)[0]) for batch in self._batches]
        return statistics.fmean(losses) / self._unit, float(self._metric(params, self._test, state))


class Lane:
    """A run in progress; ``curve`` is its record so far."""

    def __init__(self, program: Program, evaluate: Evaluator, curve: Curve):
        self.curve = curve
        self._program, self._evaluate = program, evaluate
        self._rng = np.random.default_rng(curve.seed)
        self._params, self._state = program.task.init(curve.seed)
        self._opt_state = jax.block_until_ready(program.init(self._params))
        self._order = program.epoch(self._rng)
        curve.compile_seconds = program.compile_seconds
        self.record()

    def advance(self, until: float) -> None:
        """Train until the lane's clock shows ``until`` seconds, or the loss is not finite."""
        while self.curve.seconds < until and self.curve.diverged_step is None:
            self.step()

    def step(self) -> float:
        """One step on the clock; its loss."""
        index = self.curve.steps % self._program.steps_per_epoch
        if index == 0 and self.curve.steps:
            self._order = self._program.epoch(self._rng)
        begin = time.perf_counter()
        self._params, self._opt_state, self._state, loss = jax.block_until_ready(
            self._program.step(
                self._params, self._opt_state, self._state, self._program.train, self._order, index
            )
        )
        self.curve.seconds += time.perf_counter() - begin
        self.curve.steps += 1
        if not math.isfinite(loss):
            self.curve.diverged_step = self.curve.steps
        return float(loss)

    def record(self) -> None:
        """Evaluate, off the clock, unless nothing happened since the last time."""
        if self.curve.points and self.curve.points[-1].steps == self.curve.steps:
            return
        losses = self._evaluate(self._params, self._state)
        self.curve.points.append(Point(self.curve.seconds, self.curve.steps, *losses))
