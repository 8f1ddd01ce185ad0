"""The command: one table, and exit status 1 if a run did not come back."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import rich.box
import rich.table

from kfqn_optax.bench._faults.faults import FAULTS
from kfqn_optax.bench._faults.run import METHODS, PAIRS, STEPS, WHEN, Outcome, Trainer, swapped
from kfqn_optax.bench._folder import prepare_folder
from kfqn_optax.bench._options import Parser, known
from kfqn_optax.bench._output.environment import environment
from kfqn_optax.bench._output.record import write_json
from kfqn_optax.bench._output.table import print_table

TOLERANCE, SWAPS = 0.025, 8


class Row(NamedTuple):
    """One fault in one method's run.

    Attributes:
      change: of the final loss, over that of the undisturbed run, less 1.
      allowed: 2.5 %, or the most that another batch in the place of the disturbed one changed it by.
    """

    method: str
    rule: str
    fault: str
    change: float
    allowed: float
    outcome: Outcome
    undisturbed: Outcome

    @property
    def held(self) -> bool:
        return self.outcome.finite and self.outcome.positive > 0 and self.change <= self.allowed

    @property
    def counted(self) -> str:
        names = ("rejected", "outliers", "damped", "skipped")
        more = {name: getattr(self.outcome, name) - getattr(self.undisturbed, name) for name in names}
        return ", ".join(f"{name} {count:+d}" for name, count in more.items() if count) or "-"


def faults(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit status."""
    options = _parser().parse_args(arguments)
    if options.out is not None:
        prepare_folder(options.out)
    pairs = [pair for pair in PAIRS if pair[0] in options.methods]
    rows = [row for method, rule in pairs for row in rows_of(method, rule, list(FAULTS))]
    print_table(_table(rows))
    if options.out is not None:
        records = [row._asdict() | {"outcome": row.outcome._asdict(), "held": row.held} for row in rows]
        write_json({"environment": environment(), "rows": records}, options.out / "faults.json")
    failed = sum(not row.held for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} runs came back")
    return int(failed > 0)


def rows_of(
    method: str, rule: str, names: Sequence[str], jit: Callable[..., Any] = jax.jit, swaps: int = SWAPS
) -> Iterator[Row]:
    """The rows of one method with one rule."""
    trainer = Trainer(method, rule, jit)
    usual = trainer.run(None)
    change = lambda outcome: outcome.loss / usual.loss - 1
    allowed = max(TOLERANCE, *(change(trainer.run(swapped(k))) for k in range(swaps)))
    print(f"{method}, {rule}: {usual.loss:.4g}, allowed {allowed:.3f}", file=sys.stderr)
    for name in names:
        outcome = trainer.run(FAULTS[name])
        yield Row(method, rule, name, change(outcome), allowed, outcome, usual)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m kfqn_optax.bench faults",
        description="A small network is trained with each method and step rule, and one step of it goes"
        " wrong. Exits with 1 if parameters or state are then not finite, a factor not positive definite,"
        f" or the loss after {STEPS - WHEN - 1} more steps is higher than without the fault by more than"
        " 2.5 %, or than the most that swapping the batch for another one does.",
    )
    among = f"of {', '.join(METHODS)} (default all)"
    parser.add_argument("--methods", type=known(METHODS), nargs="+", default=list(METHODS), help=among)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write faults.json there too")
    return parser


def _table(rows: Sequence[Row]) -> rich.table.Table:
    title = f"One of {STEPS} steps goes wrong"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    for heading in ("method", "step rule", "fault"):
        table.add_column(heading)
    for heading in ("loss", "allowed", "smallest/largest eigenvalue"):
        table.add_column(heading, justify="right")
    table.add_column("counted")
    table.add_column("")
    for row in rows:
        eigenvalue = f"{row.outcome.positive:.1e}" if math.isfinite(row.outcome.positive) else "not finite"
        numbers = f"{100 * row.change:+.1f} %", f"{100 * row.allowed:.1f} %", eigenvalue
        verdict = "" if row.held else "did not come back"
        table.add_row(row.method, row.rule, row.fault, *numbers, row.counted, verdict)
    return table
