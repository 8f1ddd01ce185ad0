"""The options of ``suite``, and what is wrong with those given, each as one line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._options import Parser, assignment, known, positive, seed
from kfqn_optax.bench._suite.methods import COMPARED, METHODS
from kfqn_optax.bench._tasks.table import TASKS

DEFAULT_PROBLEMS = [
    "curves",
    "image",
    "tanh_regression",
    "digits_cnn",
    "pinn",
    "transformer",
]  # no downloads


def parse_suite_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check; ``target`` is then a loss for each problem that has one."""
    options = _parser().parse_args(arguments)
    options.problems = list(dict.fromkeys(options.problems))
    options.methods = list(dict.fromkeys(options.methods))
    options.seed = list(dict.fromkeys(options.seed))
    options.learning_rate = dict(options.learning_rate)
    for name in options.learning_rate:
        if name not in options.methods:
            raise UserError(f"--learning-rate {name}=...: {name} is not among --methods")
    options.target = dict(_targets(options.target, options.problems))
    return options


def _targets(given: Sequence[str], problems: Sequence[str]):
    for text in given:
        name, equals, loss = text.rpartition("=")
        if not equals and len(problems) > 1:
            raise UserError(f"--target {text}: say of which problem, for example {problems[0]}={text}")
        if equals and name not in problems:
            raise UserError(f"--target {text}: {name!r} is not among --problems")
        try:
            yield name or problems[0], positive(float)(loss)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--target {text}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m kfqn_optax.bench suite",
        description="Methods beside each other on many problems, in turns, with equal seconds.",
    )
    add = parser.add_argument
    problems = f"of {', '.join(TASKS)} (default: those without a download)"
    add("--problems", type=_several(TASKS), default=DEFAULT_PROBLEMS, metavar="A,B", help=problems)
    methods = f"of {', '.join(METHODS)} (default {','.join(COMPARED)})"
    add("--methods", type=_several(METHODS), default=list(COMPARED), metavar="A,B", help=methods)
    add("--seed", type=seed, nargs="+", default=[0], metavar="N", help="one run each (default 0)")
    add("--seconds", type=positive(float), default=60.0, metavar="S", help="of each run (default 60)")
    points = "evaluations of each run, off the clock (default 20)"
    add("--points", type=positive(int), default=20, metavar="N", help=points)
    batch = "batch sizes tried for every method (default: the problem's own)"
    add("--batch-size", type=positive(int), nargs="+", metavar="N", help=batch)
    rates = "in the place of the method's grid; may be repeated for other methods"
    kind = {"type": assignment(METHODS), "action": "append", "default": []}
    add("--learning-rate", metavar="METHOD=VALUE[,VALUE...]", help=rates, **kind)
    target = "show the time to this training loss; may be repeated"
    add("--target", action="append", default=[], metavar="[PROBLEM=]LOSS", help=target)
    folder = "folder of the MNIST files or orl_faces.npz, or of folders mnist and faces with them"
    add("--data-dir", type=Path, metavar="DIR", help=folder)
    out = "where the plots and the JSON go (default bench-results)"
    add("--out", type=Path, default=Path("bench-results"), metavar="DIR", help=out)
    return parser


def _several(names):
    return lambda text: [known(names)(name) for name in text.split(",")]
