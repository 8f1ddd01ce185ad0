"""Some rows of the table of faults; the command has all of them."""

import json

import pytest

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._faults import command
from kfqn_optax.bench._faults.faults import FAULTS
from kfqn_optax.bench._faults.run import PAIRS
from kfqn_optax.bench._quick import quick_jit

DISASTERS = ["an input is NaN", "an input is 1e6", "labels x 1e4", "loss x 1e6", "gradients + 1e6"]


@pytest.mark.parametrize("method", ["kfac", "kbfgs"])
def test_training_comes_back_after_a_disaster(method):
    """With the method's default rule. Eight swaps tell the noise roughly: here twice as much is allowed."""
    rule = "quadratic" if method == "kfac" else "measured"
    rows = list(command.rows_of(method, rule, DISASTERS, quick_jit))
    assert all(row.undisturbed.rejected == 0 for row in rows)
    for row in rows:
        outcome = row.outcome
        assert outcome.finite and outcome.positive > 0 and row.change <= 2 * row.allowed, row
        assert row.counted != "-", row
        assert method == "kfac" or row.outcome.rejected == 1, row


def test_the_command_prints_every_fault(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "PAIRS", [("kfac", "capped")])
    monkeypatch.setattr(command, "SWAPS", 1)
    status = main(["faults", "--methods", "kfac", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert all(fault in output for fault in FAULTS)
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert [row["fault"] for row in rows] == list(FAULTS)
    back = [row["outcome"]["finite"] and row["change"] <= row["allowed"] for row in rows]
    assert f"{sum(back)} of {len(FAULTS)} runs came back" in output
    assert output.count("did not come back") == len(FAULTS) - sum(back)
    assert status == (not all(back))


def test_every_method_has_its_default_rule_in_the_table():
    assert ("kfac", "quadratic") in PAIRS
    assert {(method, "measured") for method in ("kbfgs", "kbfgs_l", "kfqn")} <= set(PAIRS)
