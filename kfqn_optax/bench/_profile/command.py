"""The command: three tables."""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import rich.box
import rich.table

from kfqn_optax.bench._options import Parser, known, positive
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._profile.methods import ADAM, PROFILED
from kfqn_optax.bench._profile.parts import GRADIENT, parts_of
from kfqn_optax.bench._profile.step import Timed, step_of, take_turns
from kfqn_optax.bench._suite.methods import Method
from kfqn_optax.bench._tasks.table import TASKS
from kfqn_optax.bench._tasks.task import Task
from kfqn_optax.bench._tasks.text import load_text

COMPILED: dict[str, Callable[[], Task]] = {  # problems whose compiling is timed
    "curves": lambda: TASKS["curves"](None),
    "transformer, 2 blocks": load_text,
    "transformer, scan over 24 blocks": functools.partial(load_text, blocks=24, scanned=True),
}


def profile(arguments: Sequence[str]) -> int:
    """Print what ``arguments`` ask for and return the exit status."""
    options = _parser().parse_args(arguments)
    methods = {name: PROFILED[name] for name in dict.fromkeys(options.methods)}
    if set(options.tables) & {"steps", "parts"}:
        task = TASKS[options.problem](options.data_dir)
        title = f"{options.problem}, batch {task.batch_size}, {jax.devices()[0].device_kind}"
        adam = step_of(task, ADAM)
        steps = {name: step_of(task, method) for name, method in methods.items()}
        parts = parts_of(task) if "parts" in options.tables else {}
        take_turns([adam, *steps.values(), *parts.values()], options.steps)
        if "steps" in options.tables:
            print_table(_steps_table({"adam": adam, **steps}, adam, f"A step: {title}"))
        if parts:
            print_table(_parts_table(parts, steps, adam, f"Its parts: {title}"))
    if "compile" in options.tables:
        print_table(_compile_table(methods))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m kfqn_optax.bench profile",
        description="Where a step's time, operations and compiling go, in multiples of Adam's step. Steps"
        " are those of a run under way: the first 30 of kfac are dearer.",
    )
    add = parser.add_argument
    add("--problem", type=known(TASKS), default="curves", help=f"{', '.join(TASKS)} (default curves)")
    among = f"of {', '.join(PROFILED)} (default all)"
    add("--methods", type=known(PROFILED), nargs="+", default=list(PROFILED), metavar="A", help=among)
    tables = ["steps", "parts", "compile"]
    add("--tables", choices=tables, nargs="+", default=tables, help="default all three")
    add("--steps", type=positive(int), default=20, metavar="N", help="timed, of each (default 20)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the MNIST files or orl_faces.npz")
    return parser


def _steps_table(steps: Mapping[str, Timed], adam: Timed, title: str) -> rich.table.Table:
    """XLA counts the dearest branch of a conditional, so operations are those of the dearest step."""
    headings = ["ms/step", "x Adam", "GFLOP, dearest step", "x Adam's", "compile s"]
    table = _table(title, "method", headings)
    for name, step in steps.items():
        table.add_row(name, *_cost(step.mean_seconds, step.flops, adam), f"{step.compile_seconds:.1f}")
    return table


def _parts_table(
    parts: Mapping[str, Timed], steps: Mapping[str, Timed], adam: Timed, title: str
) -> rich.table.Table:
    table = _table(title, "part", ["ms", "x Adam's step", "GFLOP", "x Adam's"])
    for name, part in parts.items():
        table.add_row(name, *_cost(part.mean_seconds, part.flops, adam))
    gradient = parts[GRADIENT]
    for name, step in {"adam": adam, **steps}.items():
        seconds, flops = step.mean_seconds - gradient.mean_seconds, step.flops - gradient.flops
        table.add_row(f"{name}: all but value and gradient", *_cost(seconds, flops, adam))
    return table


def _cost(seconds: float, flops: float, adam: Timed) -> list[str]:
    times = f"{seconds / adam.mean_seconds:.2f}", f"{flops / adam.flops:.2f}"
    return [f"{1e3 * seconds:.2f}", times[0], f"{flops / 1e9:.3g}", times[1]]


def _compile_table(methods: Mapping[str, Method]) -> rich.table.Table:
    table = _table("Seconds to compile a step", "problem", ["adam", *methods])
    for problem, load in COMPILED.items():
        task = load()
        seconds = [step_of(task, method).compile_seconds for method in (ADAM, *methods.values())]
        table.add_row(problem, *(f"{value:.1f}" for value in seconds))
    return table


def _table(title: str, first: str, headings: Sequence[str]) -> rich.table.Table:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column(first)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
