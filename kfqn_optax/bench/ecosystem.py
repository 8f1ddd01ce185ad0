"""``python -m kfqn_optax.bench.ecosystem``: the methods together with Optax, Flax and JAX.

Prints the tables of docs/ecosystem.md. Each verdict is found out by training one small layer.
"""

import argparse
import importlib.metadata
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from kfqn_optax.bench._ecosystem_flax import FLAX, JAX
from kfqn_optax.bench._ecosystem_optax import CONTRIB, OPTAX, Row
from kfqn_optax.bench._ecosystem_problem import METHODS, Losses, Problem, problem

TABLES: Mapping[str, Mapping[str, Row]] = {
    "Optax": OPTAX,
    "optax.contrib": CONTRIB,
    "Flax, checkpoints, logs": FLAX,
    "JAX": JAX,
}
SHOWN = ("jax", "flax", "optax", "orbax-checkpoint")  # whose verdicts the tables are
WORKS = "works"
FALLEN = 0.9  # the loss after training over that before


def verdict(use: Callable[[Problem], Losses], methods: Sequence[str]) -> str:
    """What all of the methods do; each if they differ."""
    told = {method: _verdict(use, problem(method)) for method in methods}
    if len(set(told.values())) == 1:
        return told[methods[0]]
    return "; ".join(f"{method}: {text}" for method, text in told.items())


def _verdict(use: Callable[[Problem], Losses], problem: Problem) -> str:
    try:
        first, last = use(problem)
    except Exception as error:  # any failure belongs in the table
        text = str(error)
        whose = "our" if text.startswith("kfqn") else "their"
        return f"{whose} `{type(error).__name__}`"
    if not math.isfinite(last):
        return "diverges"
    return WORKS if last < FALLEN * first else "runs, the loss does not fall"


def cells(row: Row, methods: Sequence[str]) -> tuple[str, str]:
    """The verdict, and what to know or to do instead, which is tried too."""
    how = row.how
    if row.instead is not None:
        how = f"{how}: {verdict(row.instead, methods)}"
    return verdict(row.use, methods), how


def table(rows: Mapping[str, Row], methods: Sequence[str]) -> Iterator[str]:
    """The lines of a markdown table, each as soon as it is found out."""
    yield "| what | verdict | how, or how instead |"
    yield "|---|---|---|"
    for name, row in rows.items():
        yield f"| {' | '.join((name, *cells(row, methods)))} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kfqn_optax.bench.ecosystem", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(arguments)
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN), flush=True)
    for heading, rows in TABLES.items():
        print(f"\n## {heading}\n")
        for line in table(rows, options.methods):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
