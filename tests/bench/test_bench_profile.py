"""The profile of the smallest problem, and how its times are taken."""

import jax.numpy as jnp
import pytest

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._profile import command
from kfqn_optax.bench._profile.step import Timed, take_turns
from kfqn_optax.bench._quick import quick_jit
from kfqn_optax.bench._suite.methods import METHODS
from kfqn_optax.bench._tasks.autoencoders import autoencoder_task
from kfqn_optax.bench._tasks.table import TASKS


@pytest.fixture
def small_task(small, monkeypatch):
    task = autoencoder_task(small, small.load(None), batch_size=25)
    monkeypatch.setitem(TASKS, "curves", lambda data_dir: task)
    monkeypatch.setattr(command, "COMPILED", {"tiny": lambda: task})
    monkeypatch.setattr(Timed, "jit", staticmethod(quick_jit))


def row(output: str, name: str) -> list[float]:
    line = next(line for line in output.splitlines() if line.strip().startswith(name + "  "))
    return [float(cell) for cell in line.split(name)[1].split()]


def test_profile_counts_and_times_a_step_and_its_parts(small_task, capsys):
    assert main(["profile", "--methods", "kfqn", "--steps", "2", "--tables", "steps", "parts"]) == 0
    output = capsys.readouterr().out
    milliseconds, times, gigaflop, flops, compiling = row(output, "adam")
    assert milliseconds > 0
    assert gigaflop > 0
    assert compiling > 0
    assert (times, flops) == (1, 1)
    assert row(output, "kfqn")[3] > 1.5
    alone, with_statistics = (
        row(output, "value and gradient"),
        row(output, "value, gradient, all statistics"),
    )
    assert alone[3] <= 1 < with_statistics[3]
    assert row(output, "second pass, all statistics")[3] > 0
    rest = row(output, "kfqn: all but value and gradient")
    assert rest[3] == pytest.approx(row(output, "kfqn")[3] - alone[3], abs=0.011)


def test_profile_times_compiling_beside_that_of_adam(small_task, capsys, monkeypatch):
    monkeypatch.setitem(command.PROFILED, "sgd", METHODS["sgd"])
    assert main(["profile", "--methods", "sgd", "--tables", "compile"]) == 0
    assert all(seconds > 0 for seconds in row(capsys.readouterr().out, "tiny"))


def test_a_matrix_product_has_its_operations_and_functions_take_turns():
    calls = []

    def note(name):
        return lambda arguments, result: calls.append(name) or arguments

    square = jnp.ones((32, 32))
    functions = [Timed(jnp.matmul, (square, square), note(name)) for name in "ab"]
    assert functions[0].flops == pytest.approx(2 * 32**3)
    take_turns(functions, 3)
    assert calls == ["a", "b"] * 4
    assert [len(function.seconds) for function in functions] == [3, 3]


def test_carried_arguments_reach_the_next_call():
    count = Timed(lambda n: n + 1, (0,), lambda arguments, result: (result,))
    take_turns([count], 4)
    assert count.arguments == (5,)


def test_wrong_options_get_one_line(capsys):
    assert main(["profile", "--methods", "kfacc"]) == 2
    assert "unknown 'kfacc'; known are kfac" in capsys.readouterr().err
    assert main(["profile", "--tables", "all"]) == 2
    assert "invalid choice" in capsys.readouterr().err
