"""Many steps: what is measured of the factors, and when the command says that they did not hold."""

import pytest

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._quick import quick_jit
from kfqn_optax.bench._soak import command
from kfqn_optax.bench._soak.run import soak


def test_the_factors_of_each_check_are_measured():
    row = soak("kbfgs", steps=60, chunk=20, jit=quick_jit)
    assert row.steps == 60
    assert row.last < row.first
    assert 0 < row.asymmetry < 1e-5  # float32
    assert 0 < row.positive < 1
    assert command.held(row)
    for bad in ({"finite": False}, {"positive": -1e-7}, {"asymmetry": 2e-4}, {"largest": 1e9}):
        assert not command.held(row._replace(**bad))


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 10)
    assert main(["soak", "--methods", "kfac", "--steps", "20"]) == 0
    output = capsys.readouterr().out
    assert "asymmetry" in output
    assert "kfac" in output
    assert main(["soak", "--steps", "9"]) == 2
    assert "--steps 9" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--methods", "adam"], ["--steps", "0"]])
def test_wrong_options(words, capsys):
    assert main(["soak", *words]) == 2
    assert "error: " in capsys.readouterr().err
