"""The tables of docs/ecosystem.md are what the command makes."""

import pathlib

import pytest

from kfqn_optax.bench import ecosystem
from kfqn_optax.bench._ecosystem_optax import Row
from kfqn_optax.bench._ecosystem_problem import Losses

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "ecosystem.md"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Optax replaces, and still has
@pytest.mark.parametrize("heading", ecosystem.TABLES)
def test_the_page_has_what_the_command_makes(heading):
    """By one of the methods: where they differ, the page says it, and this fails."""
    (written,) = [part for part in PAGE.read_text().split("\n## ") if part.startswith(f"{heading}\n")]
    made = ecosystem.table(ecosystem.TABLES[heading], ["kbfgs"])
    assert written.strip().splitlines()[2:] == list(made)


def test_a_verdict_tells_a_loss_that_does_not_fall_and_whose_an_error_is():
    def refuse(problem):
        problem.tx.update(problem.params, problem.tx.init(problem.params))

    def broken(problem):
        raise KeyError("elsewhere")

    told = [
        ecosystem.verdict(use, ["kbfgs"])
        for use in (
            lambda problem: Losses(1.0, 0.95),
            lambda problem: Losses(1.0, float("nan")),
            refuse,
            broken,
        )
    ]
    assert told == ["runs, the loss does not fall", "diverges", "our `ValueError`", "their `KeyError`"]


def test_a_row_tells_whether_what_it_advises_works_and_where_methods_differ():
    falls = lambda problem: Losses(1.0, 0.5)
    row = Row(lambda problem: Losses(1.0, 0.5 if problem.method == "kfac" else 2.0), "do this", falls)
    assert ecosystem.cells(row, ["kfac", "kbfgs"]) == (
        "kfac: works; kbfgs: runs, the loss does not fall",
        "do this: works",
    )
