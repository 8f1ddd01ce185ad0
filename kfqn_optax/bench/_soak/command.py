"""The command: one row a method, and exit status 1 if a factor did not hold."""

import sys
from collections.abc import Sequence

import rich.box
import rich.table

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._faults.run import METHODS
from kfqn_optax.bench._options import Parser, known, positive
from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._soak.run import Soak, soak

CHUNK, ASYMMETRY, LARGEST = 250, 1e-4, 1e8


def run_soak(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit status."""
    parser = Parser(
        prog="python -m kfqn_optax.bench soak",
        description="A small network is trained for very many steps with each method's defaults; its"
        f" factors are looked at after every {CHUNK}. Exits with 1 if one is not finite, not symmetric to"
        f" {ASYMMETRY:g} of its largest element, not positive definite, or an element of the state above"
        f" {LARGEST:g}.",
    )
    among = f"of {', '.join(METHODS)} (default all)"
    parser.add_argument("--methods", type=known(METHODS), nargs="+", default=list(METHODS), help=among)
    parser.add_argument("--steps", type=positive(int), default=50_000, metavar="N", help="default 50000")
    options = parser.parse_args(arguments)
    if options.steps < CHUNK:
        raise UserError(f"--steps {options.steps}: give {CHUNK} at least")
    rows = []
    for method in options.methods:
        rows.append(soak(method, options.steps, CHUNK))
        print(f"{method}: {rows[-1].steps} steps", file=sys.stderr)
    print_table(_table(rows))
    return int(not all(map(held, rows)))


def held(row: Soak) -> bool:
    return row.finite and row.positive > 0 and row.asymmetry <= ASYMMETRY and row.largest <= LARGEST


def _table(rows: Sequence[Soak]) -> rich.table.Table:
    table = rich.table.Table(title="The worst of all checks", box=rich.box.SIMPLE_HEAD)
    table.add_column("method")
    headings = ("steps", "first loss", "last loss", "asymmetry", "smallest/largest eigenvalue")
    for heading in (*headings, "largest element", "rejected"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        losses = f"{row.first:.4g}", f"{row.last:.4g}"
        extremes = f"{row.asymmetry:.1e}", f"{row.positive:.1e}", f"{row.largest:.3g}"
        verdict = "" if held(row) else "did not hold"
        table.add_row(row.method, f"{row.steps:,}", *losses, *extremes, str(row.rejected), verdict)
    return table
