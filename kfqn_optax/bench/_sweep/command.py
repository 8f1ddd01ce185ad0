"""The command: run every row, print the table, and exit with 1 if any run diverged."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import rich.box
import rich.table

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._folder import prepare_folder
from kfqn_optax.bench._options import Parser, known, positive
from kfqn_optax.bench._output.environment import environment
from kfqn_optax.bench._output.record import settings_of, write_json
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._problems import PROBLEMS, Problem
from kfqn_optax.bench._quick import quick_jit
from kfqn_optax.bench._suite.lane import Evaluator, compile_program
from kfqn_optax.bench._suite.methods import GRIDS, METHODS
from kfqn_optax.bench._sweep.outcome import Outcome, ratios, run
from kfqn_optax.bench._sweep.rows import CHANGED, SEEDS, rows
from kfqn_optax.bench._sweep.small import SMALL
from kfqn_optax.bench._tasks.folders import folder_of

SWEPT = {name: method for name, method in METHODS.items() if name not in GRIDS and name != "lbfgs"}
STEPS, QUICK_STEPS, QUICK_SEEDS = 100, 5, 2


def sweep(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit status."""
    options = _parser().parse_args(arguments)
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.seeds = options.seeds or (QUICK_SEEDS if options.quick else len(SEEDS))
    problems: Mapping[str, Problem] = (
        {"small": SMALL} if options.quick else {name: PROBLEMS[name] for name in options.problems}
    )
    if options.out is not None:
        prepare_folder(options.out)
    outcomes: list[Outcome] = []
    status = 0
    try:
        for outcome in _outcomes(problems, options):
            outcomes.append(outcome)
            print(f"{outcome.problem}, {outcome.name}: {outcome.final:.4g}", file=sys.stderr)
    except KeyboardInterrupt:
        if not outcomes:
            raise
        status = 130
    print_table(_table(outcomes, f"{options.method} after {options.steps} steps"))
    if options.out is not None:
        _save(outcomes, options)
    return status or int(any(outcome.diverged for outcome in outcomes))


def _outcomes(problems: Mapping[str, Problem], options: argparse.Namespace) -> Iterator[Outcome]:
    words = [word.lower() for word in options.rows]
    wanted = [row for row in rows(options.seeds, CHANGED) if any(w in row[0].name.lower() for w in words)]
    if not wanted:
        names = ", ".join(row.name for row, _ in rows(1, CHANGED))
        raise UserError(f"--rows {' '.join(options.rows)}: none of {names}")
    jit = quick_jit if options.quick else jax.jit
    for name, problem in problems.items():
        dataset = problem.load(None if name in ("curves", "small") else folder_of(options.data_dir, name))
        for circumstances, seeds in wanted:
            task = circumstances.task(problem, dataset)
            program = compile_program(task, METHODS[options.method], 1.0, task.batch_size, jit)
            evaluate = Evaluator(task)
            for seed in seeds:
                yield run(name, circumstances.name, seed, options.steps, program, evaluate)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m kfqn_optax.bench sweep",
        description="One method with its defaults: many seeds, and one thing changed at a time. "
        "Exits with 1 if any run diverged.",
    )
    add = parser.add_argument
    problems = f"of {', '.join(PROBLEMS)} (default curves mnist)"
    add("--problems", type=known(PROBLEMS), nargs="+", default=["curves", "mnist"], help=problems)
    add("--method", type=known(SWEPT), default="kfac", help=f"{', '.join(SWEPT)} (default kfac)")
    add("--steps", type=positive(int), metavar="N", help=f"of each run (default {STEPS})")
    add("--seeds", type=positive(int), metavar="N", help=f"how many (default and most: {len(SEEDS)})")
    add("--rows", nargs="+", default=[""], metavar="WORD", help="rows with one of these words only")
    add("--quick", action="store_true", help="a few steps on a small problem, in place of --problems")
    add("--data-dir", type=Path, metavar="DIR", help="as for the suite")
    add("--out", type=Path, metavar="DIR", help="write sweep.json there too")
    return parser


def _table(outcomes: Sequence[Outcome], title: str) -> rich.table.Table:
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for heading in ("problem", "row", "seed", "first loss", "final loss", "x median", "not finite", ""):
        table.add_column(heading, justify="left" if heading in ("problem", "row", "") else "right")
    for outcome, ratio in zip(outcomes, ratios(outcomes), strict=True):
        losses = f"{outcome.first:.4g}", f"{outcome.final:.4g}", f"{ratio:.2f}"
        bad = f"{outcome.bad_steps} steps" if outcome.bad_steps else "-"
        remark = "diverged" if outcome.diverged else ""
        table.add_row(outcome.problem, outcome.name, str(outcome.seed), *losses, bad, remark)
    return table


def _save(outcomes: Sequence[Outcome], options: argparse.Namespace) -> None:
    records = [
        outcome._asdict() | {"ratio_to_median": ratio, "diverged": outcome.diverged}
        for outcome, ratio in zip(outcomes, ratios(outcomes), strict=True)
    ]
    content = {"settings": settings_of(options), "environment": environment(), "rows": records}
    write_json(content, options.out / "sweep.json")
    print(f"saved sweep.json in {options.out}")
