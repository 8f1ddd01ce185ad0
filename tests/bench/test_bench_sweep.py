"""The sweep, quickly."""

import json
import math

import numpy as np
import pytest

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._sweep import command
from kfqn_optax.bench._sweep.outcome import Outcome, ratios
from kfqn_optax.bench._sweep.rows import BATCH_SIZES, CHANGED, SEEDS, rows
from kfqn_optax.bench._sweep.small import SMALL


def test_quick_sweep_has_a_row_for_each_run(tmp_path, capsys):
    options = ["--quick", "--method", "kfqn", "--rows", "usual", "--out", str(tmp_path)]
    assert main(["sweep", *options]) == 0
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["settings"]["steps"] == command.QUICK_STEPS
    assert "versions" in content["environment"]
    records = content["rows"]
    usual, other_seed = records
    assert [(r["name"], r["seed"]) for r in records] == [("as usual", 0), ("as usual", 1)]
    assert usual["first"] != other_seed["first"]
    for record in records:
        assert record["final"] < record["first"]
        assert (record["bad_steps"], record["diverged"]) == (0, False)
    middle = np.median([record["final"] for record in records])
    assert usual["ratio_to_median"] == pytest.approx(usual["final"] / middle)
    assert "as usual" in capsys.readouterr().out


def test_a_run_that_diverges_is_the_exit_status(capsys, monkeypatch):
    outcomes = [Outcome("small", "as usual", 0, 5.0, 3.0, 0), Outcome("small", "tanh", 0, 5.0, math.nan, 2)]
    monkeypatch.setattr(command, "_outcomes", lambda problems, options: iter(outcomes))
    assert main(["sweep", "--quick"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "tanh" in line)
    assert "2 steps" in line
    assert "diverged" in line


def test_divergence_is_a_loss_that_is_not_finite_or_a_larger_one():
    assert not Outcome("p", "", 0, 5.0, 5.0, 0).diverged
    assert Outcome("p", "", 0, 5.0, 5.1, 0).diverged
    assert Outcome("p", "", 0, 5.0, 3.0, 1).diverged
    assert Outcome("p", "", 0, 5.0, math.nan, 0).diverged


def test_ratios_are_to_the_median_of_the_same_problem():
    finals = {"a": (1.0, 2.0, 4.0), "b": (10.0, math.inf, 30.0)}
    outcomes = [Outcome(p, "", 0, 9.0, final, 0) for p, values in finals.items() for final in values]
    assert ratios(outcomes) == [0.5, 1, 2, 10 / 30, math.inf, 1]


def test_rows_are_twenty_seeds_and_one_change_at_a_time():
    wanted = list(rows(20, CHANGED))
    assert len(wanted[0][1]) == len(SEEDS) == 20
    usual = wanted[0][0]
    for circumstances, seeds in wanted[1:]:
        changed = [f for f in usual._fields if getattr(usual, f) != getattr(circumstances, f)]
        assert len(changed) == 2  # the name and one thing
        assert list(seeds) == [0]
    sizes = {row.batch_size for row, _ in wanted}
    assert (min(sizes), max(sizes)) == (32, 4_000)


def test_every_row_has_a_float32_loss_of_the_usual_size_at_the_start():
    images, losses = SMALL.load(None).train[:20], {}
    for circumstances in CHANGED[len(BATCH_SIZES) - 1 :]:
        task = circumstances.task(SMALL, SMALL.load(None))
        loss, _ = task.loss(SMALL.init(0), images, {})  # Flax's start has the same shapes
        assert loss.dtype == np.float32
        losses[circumstances.name] = float(loss) / task.loss_unit
    usual = losses.pop(f"batch size {BATCH_SIZES[-1]}")
    assert losses.pop("inputs x 100") > usual
    for loss in losses.values():
        assert loss == pytest.approx(usual, rel=0.02)


def test_wrong_options_get_one_line(capsys):
    for options, message in (
        (["--method", "adam"], "unknown 'adam'; known are kfac"),
        (["--rows", "typo", "--quick"], "--rows typo: none of as usual, batch size 32"),
        (["--steps", "0"], "a whole number above 0"),
    ):
        assert main(["sweep", *options]) == 2
        assert message in capsys.readouterr().err
