"""The coverage table, in a reduced form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench import coverage
from kfqn_optax.bench._coverage_rows import ROWS
from kfqn_optax.bench._quick import quick_jit


def test_a_cell_shows_a_falling_loss_and_a_row_what_is_preconditioned(capsys):
    rows = ["--rows", "WeightNorm", "NNX: CNN"]
    assert coverage.main([*rows, "--methods", "kfqn", "--steps", "20"]) == 0
    heading, rule, *body = capsys.readouterr().out.splitlines()
    assert heading == "| model | parameters preconditioned | kfqn |"
    assert re.fullmatch(r"(\|---)+\|", rule)
    assert [line.split(" | ")[:2] for line in body] == [
        ["| WeightNorm, ConvLocal, Dense", "516 of 1,188"],
        ["| NNX: CNN, batch norm", "1,028 of 1,044"],
    ]
    assert {line.count("|") for line in (heading, rule, *body)} == {4}
    for line in body:
        for cell in line.strip("| ").split(" | ")[2:]:
            first, last = cell.split(" → ")
            assert float(last) < float(first)


def test_a_model_that_changes_in_place_is_trained():
    problem = ROWS["NNX: MLP, batch norm, nnx.Optimizer in nnx.jit"]()
    before = jax.tree.map(jnp.copy, nnx.state(problem.model))
    first, last, rejected = coverage.train(problem, coverage.METHODS["kfqn"](problem.layers), 25)
    assert last < 0.7 * first
    assert rejected == 0
    jax.tree.map(np.testing.assert_array_equal, nnx.state(problem.model), before)


def test_the_residual_of_a_forward_mode_loss_is_marked():
    problem = ROWS["PINN, hessian"]()
    value_and_grad = kfqn.value_and_grad(
        problem.loss_fn, problem.layers, has_aux=True, forward=problem.forward
    )
    sampled = quick_jit(lambda params: value_and_grad(params, {})[2].factor_statistics(key=0))
    statistics = sampled(problem.params)
    assert all(np.trace(one.grad_moment) > 0 for one in statistics.values())


def test_a_cell_tells_a_failure_and_a_loss_that_rises(capsys, monkeypatch):
    def broken(layers):
        raise RuntimeError("no such method")

    monkeypatch.setattr(coverage, "METHODS", {"kbfgs": broken})
    assert coverage.main(["--rows", "bfloat16", "--steps", "1"]) == 1
    assert "| **RuntimeError** |" in capsys.readouterr().out
    assert coverage.outcome(1.0, 1.5, 0) == "**diverged** 1 → 1.5"
    assert coverage.outcome(1.0, float("nan"), 2) == "**diverged** 1 → nan, 2 left out"


def test_rows_that_do_not_exist_are_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        coverage.main(["--rows", "no such model"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in ROWS)
