"""The suite on a problem that trains in a moment."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._quick import quick_jit
from kfqn_optax.bench._suite import interleave, lane
from kfqn_optax.bench._suite.curve import Curve, Trial
from kfqn_optax.bench._suite.lane import Evaluator, Lane, compile_rates
from kfqn_optax.bench._suite.methods import COMPARED, GRIDS, METHODS, learning_rates
from kfqn_optax.bench._tasks.autoencoders import autoencoder_task
from kfqn_optax.bench._tasks.table import TASKS


@pytest.fixture(scope="module")
def task(small):
    return autoencoder_task(small, small.load(None), batch_size=25)


@pytest.fixture
def small_task(task, monkeypatch):
    monkeypatch.setitem(TASKS, "curves", lambda data_dir: task)


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setattr(lane, "compile_program", functools.partial(lane.compile_program, jit=quick_jit))


def run(tmp_path, *arguments: str) -> int:
    return main(["suite", "--problems", "curves", "--out", str(tmp_path / "out"), *arguments])


def results(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "suite.json").read_text(), parse_constant=pytest.fail)


def test_suite_makes_a_table_a_plot_and_a_json_with_what_is_promised(small_task, tmp_path, capsys):
    options = ["--methods", "adam,sgd,kfqn", "--seconds", "0.1", "--points", "2", "--seed", "0", "1"]
    assert run(tmp_path, *options, "--target", "8") == 0
    output = capsys.readouterr().out
    content = results(tmp_path)
    assert content["settings"]["target"] == {"curves": 8}
    assert str(tmp_path) not in json.dumps(content)
    environment = content["environment"]
    packages = {"kfqn_optax", "jax", "jaxlib", "flax", "optax", "numpy", "python"}
    assert set(environment["versions"]) == packages
    assert set(environment) == {"versions", "commit", "device", "cpu", "cores", "date"}
    problem = content["problems"]["curves"]
    assert problem["test_metric"] == "test loss"
    trials = [(c["method"], c["learning_rate"], c["seed"]) for c in problem["curves"]]
    grid = [("adam", r) for r in learning_rates("adam", "curves")]
    grid += [("sgd", r) for r in learning_rates("sgd", "curves")] + [("kfqn", 1.0)]
    assert trials == [(*trial, seed) for seed in (0, 1) for trial in grid]
    for record in problem["curves"]:
        assert record["points"][0]["seconds"] == 0
        assert len(record["points"]) == 3
        assert record["points"][-1]["steps"] == record["steps"] > 0
        assert record["seconds"] >= 0.1
        assert record["step_in_adams"] > 0
        assert record["batch_size"] == 25
    starts = {c["seed"]: c["points"][0]["train_loss"] for c in problem["curves"]}
    assert {(c["seed"], c["points"][0]["train_loss"]) for c in problem["curves"]} == set(starts.items())
    for method, best in problem["best"].items():
        finals = {}
        for c in problem["curves"]:
            if c["method"] == method:
                finals.setdefault(c["learning_rate"], []).append(c["points"][-1]["train_loss"])
        assert best["learning_rate"] == min(finals, key=lambda rate: np.median(finals[rate]))
        row = next(line.split() for line in output.splitlines() if line.split()[:1] == [method])
        assert row[1] == f"{best['learning_rate']:g}"
    picture = (tmp_path / "out" / "suite-curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_runs_take_turns_and_each_clock_counts_its_own_steps(task, monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(lane.time, "perf_counter", lambda: next(now) * 0.125)
    programs = {
        Trial("sgd", rate, 25): program
        for rate, program in compile_rates(task, METHODS["sgd"], [1e-3, 1e-2], 25).items()
    }
    order, step = [], Lane.step

    def noted(self):
        order.append(self.curve.trial.learning_rate)
        return step(self)

    monkeypatch.setattr(Lane, "step", noted)
    monkeypatch.setattr(interleave, "LONGEST_TURN", 0.25)
    curves: list[Curve] = []
    advanced = []
    interleave.run_interleaved(
        programs, Evaluator(task), [5], seconds=1.0, points=2, curves=curves, on_turn=advanced.append
    )
    assert [(rate, len(list(turn))) for rate, turn in itertools.groupby(order)] == [
        (1e-3, 2),
        (1e-2, 2),
    ] * 4
    assert sum(advanced) == pytest.approx(1.0)
    for curve in curves:
        assert (curve.seconds, curve.steps) == (1.0, 8)
        assert [(point.seconds, point.steps) for point in curve.points] == [(0, 0), (0.5, 4), (1.0, 8)]


def test_one_compiled_step_serves_all_learning_rates_and_follows_them(task):
    programs = compile_rates(task, METHODS["sgd"], [1e-3, 2e-3], 25)
    assert programs[1e-3].step is programs[2e-3].step
    params, state = task.init(0)
    order = programs[1e-3].epoch(np.random.default_rng(0))
    batch = jnp.asarray(task.train)[order[1]]
    grads = quick_jit(jax.grad(lambda p: task.loss(p, batch, state)[0]))(params)
    for rate, program in programs.items():
        moved, *_ = program.step(params, program.init(params), state, program.train, order, 1)
        expected = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, expected)


def test_divergence_ends_a_run_and_is_told(small_task, tmp_path, capsys):
    options = ["--methods", "sgd", "--learning-rate", "sgd=1e30,1e-3", "--seconds", "0.05", "--points", "1"]
    assert run(tmp_path, *options) == 0
    diverged, fine = results(tmp_path)["problems"]["curves"]["curves"]
    assert diverged["diverged_step"] <= 4
    assert fine["diverged_step"] is None
    assert results(tmp_path)["problems"]["curves"]["best"]["sgd"]["learning_rate"] == 1e-3
    assert run(tmp_path, *options[:3], "sgd=1e30", *options[4:]) == 0
    assert "1 of 1 diverged" in capsys.readouterr().out


def test_batch_sizes_are_all_tried_and_a_line_search_has_full_batches_only(small_task, tmp_path, capsys):
    options = ["--methods", "adam,lbfgs", "--learning-rate", "adam=1e-2", "--seconds", "0.05"]
    assert run(tmp_path, *options, "--points", "1", "--batch-size", "25", "110") == 0
    assert "lbfgs left out" in capsys.readouterr().err
    curves = results(tmp_path)["problems"]["curves"]["curves"]
    assert [(c["method"], c["batch_size"]) for c in curves] == [("adam", 25), ("adam", 110), ("lbfgs", 110)]
    assert all(c["points"][-1]["train_loss"] < c["points"][0]["train_loss"] for c in curves)


def test_interrupt_shows_what_was_done(small_task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Lane, "advance", lambda self, until: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(tmp_path, "--methods", "sgd", "--learning-rate", "sgd=1e-3") == 130
    assert results(tmp_path)["problems"]["curves"]["curves"][0]["steps"] == 0


def test_grids_have_four_rates_a_factor_of_about_three_apart():
    for method, grids in GRIDS.items():
        assert method in METHODS
        for problem, rates in grids.items():
            assert problem in ("", *TASKS)
            assert len(rates) == 4
            assert all(2.9 < b / a < 3.4 for a, b in itertools.pairwise(rates))
    assert learning_rates("kfac", "curves") == (1.0,)
    assert set(COMPARED) <= set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems", "curve"], "unknown 'curve'; known are curves, mnist"),
        (["--methods", "adam,newton"], "unknown 'newton'; known are adam"),
        (["--methods", "adam", "--learning-rate", "sgd=1"], "sgd is not among --methods"),
        (["--learning-rate", "adam=-1"], "a number above 0, got '-1'"),
        (["--target", "mnist=1"], "'mnist' is not among --problems"),
        (["--target", "low"], "a number above 0, got 'low'"),
        (["--problems", "curves,image", "--target", "1"], "say of which problem, for example curves=1"),
        (["--batch-size", "111"], "curves has 110 training examples"),
        (["--methods", "lbfgs"], "none of --methods suits it"),
        (["--seconds", "0"], "a number above 0"),
        (["--seed", "x"], "from 0"),
        (["--out", __file__], "cannot be written to"),
        (["--speed"], "unrecognized"),
    ],
)
def test_wrong_options_get_one_line(small_task, tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert message in captured.err
