"""Run every method from every seed, behind one progress bar."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import rich.console
import rich.progress as bars

from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._methods import METHODS, SETTINGS
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
    with _progress() as progress:
        trials = [(name, rate) for name, rates in learning_rates.items() for rate in rates]
        total = progress.add_task("all runs", total=len(trials) * len(seeds))
        for name, learning_rate in trials:
            task = progress.add_task(f"{name}: compiling", total=1.0)
            recipe = METHODS[name].build(problem, learning_rate, SETTINGS[setting])
            program = compile_method(problem, recipe, train, test, batch_size)
            for seed in seeds:
                run = Run(name, seed, learning_rate, program.steps_per_epoch, program.compile_seconds)
                runs.append(run)

                def show(run: Run, task: bars.TaskID = task) -> None:
                    share = min(budget.share_used(run), 1.0)
                    progress.update(task, completed=share, description=_describe(run))

                show(run)
                train_method(program, run, budget, on_step=show)
                progress.update(total, advance=1)
            progress.update(task, completed=1.0)


def _progress() -> bars.Progress:
    """On stderr, so that what is piped from stdout is the table alone."""
    return bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    )


def _describe(run: Run) -> str:
    loss = f", train loss {run.history[-1].train_loss:.4g}" if run.history else ""
    if run.diverged_epoch is not None:
        loss = ", diverged"
    return f"{run.method} seed {run.seed}: epoch {run.epochs:.1f}{loss}"
