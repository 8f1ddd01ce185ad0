"""A compiled function that can be timed beside others: its operations, its compiling, its seconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kfqn_optax._state import ScaleByKfqnState
from kfqn_optax.bench._suite.methods import Method
from kfqn_optax.bench._tasks.task import Task


class Timed:
    """A function compiled for its arguments.

    ``carry(arguments, result)`` makes the next call's arguments, so that counters in a state run on and
    work that is done now and then has its share.
    """

    jit = staticmethod(jax.jit)

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        carry: Callable[[Sequence[Any], Any], Sequence[Any]] = lambda arguments, result: arguments,
    ):
        begin = time.perf_counter()
        self._compiled = self.jit(function).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.flops = float((self._compiled.cost_analysis() or {}).get("flops", float("nan")))
        self.seconds: list[float] = []
        self.arguments, self._carry = arguments, carry

    def call(self, timed: bool = True) -> None:
        begin = time.perf_counter()
        result = jax.block_until_ready(self._compiled(*self.arguments))
        if timed:
            self.seconds.append(time.perf_counter() - begin)
        self.arguments = self._carry(self.arguments, result)

    @property
    def mean_seconds(self) -> float:
        """Of a call: the mean, since some calls do more than others."""
        return statistics.fmean(self.seconds)


def take_turns(functions: Sequence[Timed], calls: int) -> None:
    """One call each that is not timed, then ``calls`` rounds, so that noise hits all alike."""
    for function in functions:
        function.call(timed=False)
    for _ in range(calls):
        for function in functions:
            function.call()


def step_of(task: Task, method: Method) -> Timed:
    """The training step on one batch, over and over."""
    tx = method.make(1.0, task.layers)
    params, state = task.init(0)
    arguments = (params, settled(Timed.jit(tx.init)(params)), state, first_batch(task))
    return Timed(method.step(task, tx), arguments, lambda before, result: (*result[:3], before[3]))


def settled(opt_state: Any) -> Any:
    """A new state that passes for one after 1,000 steps: ``kfac`` does more in the first 30."""
    ours = lambda node: isinstance(node, ScaleByKfqnState)
    older = lambda node: node._replace(count=node.count + 1_000) if ours(node) else node
    return jax.tree.map(older, opt_state, is_leaf=ours)


def first_batch(task: Task) -> Any:
    return jax.tree.map(lambda array: jax.numpy.asarray(array[: task.batch_size]), task.train)
