"""Run every method from every seed, behind one progress bar."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from rich.progress import TaskID

from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._methods import METHODS, SETTINGS
from kfqn_optax.bench._output.progress import progress_bars
from kfqn_optax.bench._problems import Problem
from kfqn_optax.bench._train import Budget, Run, compile_method, train_method


def compare(
    problem: Problem,
    dataset: Dataset,
    learning_rates: Mapping[str, Sequence[float]],
    *,
    setting: str,
    seeds: Sequence[int],
    batch_size: int,
    budget: Budget,
    runs: list[Run],
) -> None:
    """Train each method at each of its ``learning_rates`` from each seed.

    The records are appended to ``runs`` as they start, so that the caller has them after an
    interrupt too.
    """
    train, test = jnp.asarray(dataset.train), jnp.asarray(dataset.test)
    trials = [(name, rate) for name, rates in learning_rates.items() for rate in rates]
    with progress_bars() as progress:
        total = progress.add_task("all runs", total=len(trials) * len(seeds))
        for name, learning_rate in trials:
            bar = progress.add_task(f"{name}: compiling", total=None)  # a bar that moves, and its time
            recipe = METHODS[name].build(problem, learning_rate, SETTINGS[setting])
            program = compile_method(problem, recipe, train, test, batch_size)
            took = f"{name}: compiled in {program.compile_seconds:.1f} s"
            progress.update(bar, total=1.0, completed=1.0, description=took)
            for seed in seeds:
                run = Run(name, seed, learning_rate, program.steps_per_epoch, program.compile_seconds)
                done = len(runs)
                runs.append(run)
                bar = progress.add_task("", total=1.0)

                def show(run: Run, bar: TaskID = bar, done: int = done) -> None:
                    share = min(budget.share_used(run), 1.0)
                    progress.update(bar, completed=share, description=_describe(run))
                    progress.update(total, completed=done + share)

                show(run)
                train_method(program, run, budget, on_step=show)
                show(run)  # with the last losses, those of the table


def _describe(run: Run) -> str:
    loss = f", train loss {run.history[-1].train_loss:.2f}" if run.history else ""
    if run.diverged_epoch is not None:
        loss = ", diverged"
    return f"{run.method} seed {run.seed}: epoch {run.epochs:.1f}{loss}"
