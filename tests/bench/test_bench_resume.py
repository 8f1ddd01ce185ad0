"""A training process that is killed once; the command does it twenty times for each method."""

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._resume import command


def test_a_killed_run_ends_as_one_that_was_not(capsys, monkeypatch):
    monkeypatch.setattr(command, "MOST_STEPS", 8)
    assert main(["resume", "--methods", "kfac", "--kills", "1"]) == 0
    output = capsys.readouterr().out
    assert "bit-equal" in output
    assert "did not hold" not in output


def test_what_did_not_hold():
    row = command.Row("kfac", steps=80, kills=1, again=3, equal=True, difference=1e-12)
    assert row.held
    assert not row._replace(equal=False).held
    assert not row._replace(difference=1e-6).held
