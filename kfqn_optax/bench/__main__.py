"""The command ``python -m kfqn_optax.bench``. Exit status 2 for a user's error, 130 for Ctrl-C."""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax

from kfqn_optax.bench._compare import compare
from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._faults.command import faults
from kfqn_optax.bench._folder import prepare_folder
from kfqn_optax.bench._options import parse_options
from kfqn_optax.bench._output.figure import require_matplotlib
from kfqn_optax.bench._output.record import settings_of
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._plot import save_plot
from kfqn_optax.bench._problems import PROBLEMS
from kfqn_optax.bench._profile.command import profile
from kfqn_optax.bench._report import results_table, save_json
from kfqn_optax.bench._resume.command import resume
from kfqn_optax.bench._scale.command import scale
from kfqn_optax.bench._soak.command import run_soak
from kfqn_optax.bench._suite.command import suite
from kfqn_optax.bench._sweep.command import sweep
from kfqn_optax.bench._train import Budget, Run

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "suite": suite,
    "profile": profile,
    "sweep": sweep,
    "scale": scale,
    "faults": faults,
    "soak": run_soak,
    "resume": resume,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison that ``arguments`` ask for and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in COMMANDS:
            return COMMANDS[words[0]](words[1:])
        return _run(parse_options(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    require_matplotlib()
    prepare_folder(options.out)
    problem = PROBLEMS[options.problem]
    dataset = problem.load(options.data_dir)
    if options.batch_size > len(dataset.train):
        raise UserError(
            f"--batch-size {options.batch_size}: the training set has {len(dataset.train)} images"
        )
    runs: list[Run] = []
    status = 0
    try:
        compare(
            problem,
            dataset,
            options.learning_rates,
            setting=options.setting,
            seeds=options.seed,
            batch_size=options.batch_size,
            budget=Budget(options.epochs, options.seconds, options.target),
            runs=runs,
        )
    except KeyboardInterrupt:
        if not runs:
            raise
        status = 130
    images = f"{len(dataset.train)} + {len(dataset.test)} images, batch {options.batch_size}"
    _report(runs, options, f"{options.problem}: {images}, {jax.devices()[0].device_kind}")
    return status


def _report(runs: list[Run], options: argparse.Namespace, title: str) -> None:
    print_table(results_table(runs, title, options.target))
    save_json(runs, settings_of(options), options.out / f"{options.problem}.json")
    save_plot(runs, title, options.out / f"{options.problem}.png")
    print(f"saved {options.problem}.json and {options.problem}.png in {options.out}")


if __name__ == "__main__":
    sys.exit(main())
