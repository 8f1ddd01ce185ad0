"""The command: load, compile, run in turns, report, one problem after the other."""

import argparse
import sys
from collections.abc import Iterable, Sequence

import jax

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._folder import prepare_folder
from kfqn_optax.bench._output.figure import require_matplotlib
from kfqn_optax.bench._output.progress import progress_bars
from kfqn_optax.bench._output.record import settings_of
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._suite.curve import Curve, Trial
from kfqn_optax.bench._suite.interleave import run_interleaved
from kfqn_optax.bench._suite.lane import Evaluator, Program, compile_rates
from kfqn_optax.bench._suite.methods import METHODS, learning_rates
from kfqn_optax.bench._suite.options import parse_suite_options
from kfqn_optax.bench._suite.plot import save_plot
from kfqn_optax.bench._suite.save import save_json
from kfqn_optax.bench._suite.table import results_table
from kfqn_optax.bench._tasks.table import TASKS
from kfqn_optax.bench._tasks.task import Task


def suite(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit status."""
    options = parse_suite_options(arguments)
    require_matplotlib()
    prepare_folder(options.out)
    results: dict[str, list[Curve]] = {}
    metrics: dict[str, str] = {}
    status = 0
    for name in options.problems:
        task = TASKS[name](options.data_dir)
        results[name], metrics[name] = [], task.metric
        try:
            _run_problem(name, task, options, results[name])
        except KeyboardInterrupt:
            if not any(results.values()):
                raise
            status = 130
        if results[name]:
            _report(name, task, options, results[name])
        save_json(results, metrics, settings_of(options), options.out / "suite.json")
        if status:
            break
    print(f"saved suite.json and the plots in {options.out}")
    return status


def _run_problem(name: str, task: Task, options: argparse.Namespace, curves: list[Curve]) -> None:
    trials = [
        (method, size)
        for size in options.batch_size or [task.batch_size]
        for method in options.methods
        if _suits(name, method, size, task)
    ]
    if not trials:
        raise UserError(f"{name}: none of --methods suits it")
    with progress_bars() as progress:
        programs: dict[Trial, Program] = {}
        bar = progress.add_task(f"{name}: compiling", total=len(trials))
        for method, size in trials:
            rates = options.learning_rate.get(method) or learning_rates(method, name)
            progress.update(bar, description=f"{name}: compiling {method}")
            for rate, program in compile_rates(task, METHODS[method], rates, size).items():
                programs[Trial(method, rate, size)] = program
            progress.advance(bar)
        total = options.seconds * len(options.seed)
        bar = progress.add_task(f"{name}: {len(programs)} runs in turns", total=total)
        run_interleaved(
            programs,
            Evaluator(task),
            options.seed,
            seconds=options.seconds,
            points=options.points,
            curves=curves,
            on_turn=lambda advanced: progress.advance(bar, advanced),
        )


def _suits(name: str, method: str, batch_size: int, task: Task) -> bool:
    if batch_size > task.examples:
        raise UserError(f"--batch-size {batch_size}: {name} has {task.examples} training examples")
    suits = batch_size == task.examples or not METHODS[method].full_batch_only
    if not suits:
        print(f"{name}: {method} left out, it is for full batches", file=sys.stderr)
    return suits


def _report(name: str, task: Task, options: argparse.Namespace, curves: Iterable[Curve]) -> None:
    curves = list(curves)
    examples = f"{task.examples} training examples, {jax.devices()[0].device_kind}"
    title = f"{name}: {examples}, {options.seconds:g} s a run, seeds {', '.join(map(str, options.seed))}"
    print_table(results_table(curves, title, task.metric, options.target.get(name)))
    save_plot(curves, title, task.metric, options.out / f"suite-{name}.png")
