import json
import subprocess
import sys

import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench.__main__ import main
from kfqn_optax.bench._methods import COMPARED, METHODS, SETTINGS, Method, Recipe, learning_rate
from kfqn_optax.bench._output import figure


def run(tmp_path, *arguments: str) -> int:
    return main(["--batch-size", "25", "--out", str(tmp_path / "out"), *arguments])


def results(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "curves.json").read_text())


def row(output: str, method: str) -> list[str]:
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [method])


def test_table_json_and_plot_of_all_methods(small_curves, tmp_path, capsys):
    assert run(tmp_path, "--epochs", "2") == 0
    output = capsys.readouterr().out
    content = results(tmp_path)
    assert [r["method"] for r in content["runs"]] == COMPARED
    for record in content["runs"]:
        cells = row(output, record["method"])
        assert cells[1] == f"{METHODS[record['method']].learning_rates['curves']:g}"
        assert cells[2] == "2"
        last = record["history"][-1]
        assert cells[3:5] == [f"{last['train_loss']:.2f}", f"{last['test_loss']:.2f}"]
    assert row(output, "adam")[6] == "1.00"
    picture = (tmp_path / "out" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_options_reach_the_runs(small_curves, tmp_path, capsys, monkeypatch):
    asked = []

    def build(problem, learning_rate, settings):
        asked.append((learning_rate, settings))
        return METHODS["adam"].build(problem, 1e-3, settings)

    monkeypatch.setitem(METHODS, "new", Method(build, {"curves": 7.0}, paper_learning_rate=8.0))
    for options in ([], ["--setting", "paper"], ["--setting", "paper", "--learning-rate", "new=9"]):
        options += ["--methods", "new", "--epochs", "1", "--seed", "3", "4", "5"]
        assert run(tmp_path, *options) == 0
    paper = SETTINGS["paper"]
    assert asked == [(7, {}), (8, paper), (9, paper)]
    content = results(tmp_path)
    assert content["settings"]["setting"] == "paper"
    runs = [(r["method"], r["seed"], r["learning_rate"]) for r in content["runs"]]
    assert runs == [("new", 3, 9), ("new", 4, 9), ("new", 5, 9)]
    losses = sorted(r["history"][-1]["train_loss"] for r in content["runs"])
    assert f"[{losses[0]:.2f}, {losses[2]:.2f}]" in capsys.readouterr().out.splitlines()[-3]


def test_paper_setting_is_the_published_one(small, monkeypatch):
    given = {}
    monkeypatch.setattr(kfqn, "kbfgs", lambda *args, **settings: given.update(settings))
    METHODS["kbfgs"].build(small, learning_rate("kbfgs", "curves", "paper"), SETTINGS["paper"])
    assert learning_rate("kbfgs", "curves", "paper") == 0.3
    assert given == {"damping": 0.3, "step_rule": None}


def test_each_learning_rate_given_is_a_row(small_curves, tmp_path, capsys):
    options = ["--methods", "adam,sgd", "--learning-rate", "adam=1e-3,0.1", "--epochs", "1"]
    assert run(tmp_path, *options) == 0
    rates = [(r["method"], r["learning_rate"]) for r in results(tmp_path)["runs"]]
    assert rates == [("adam", 1e-3), ("adam", 0.1), ("sgd", METHODS["sgd"].learning_rates["curves"])]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.split()[:1] == ["adam"]] == ["0.001", "0.1"]


def test_target_is_shown(small_curves, tmp_path, capsys):
    assert run(tmp_path, "--methods", "adam", "--epochs", "3", "--target", "1e6") == 0
    output = capsys.readouterr().out
    assert "epochs to 1e+06" in output
    assert results(tmp_path)["runs"][0]["reached_target"]
    assert run(tmp_path, "--methods", "adam", "--epochs", "1", "--target", "1e-6") == 0
    assert "not reached" in capsys.readouterr().out


def test_diverged_runs_are_shown(small_curves, tmp_path, capsys):
    options = ["--methods", "sgd,adam", "--learning-rate", "sgd=1e30", "--epochs", "2"]
    assert run(tmp_path, *options, "--seed", "0", "1") == 0
    output = capsys.readouterr().out
    assert row(output, "sgd")[3:5] == ["diverged", "diverged"]
    assert "seed 0 diverged at epoch 1" in output
    assert "seed 1 diverged at epoch 1" in output
    assert [r["diverged_epoch"] for r in results(tmp_path)["runs"]] == [1, 1, None, None]


def interrupt(at_step: int) -> Method:
    """Adam, with Ctrl-C pressed when a certain step begins to be compiled or the start is made."""

    def build(problem, learning_rate, settings):
        adam = METHODS["adam"].build(problem, learning_rate, settings)
        starts = []

        def init(params, batches):
            starts.append(params)
            if len(starts) > at_step:
                raise KeyboardInterrupt
            return adam.init(params, batches)

        return Recipe(init, adam.step)

    return Method(build, {"curves": 1e-3})


@pytest.mark.parametrize(("starts", "shown"), [(0, ["adam"]), (2, ["adam", "slow", "interrupted"])])
def test_interrupt_shows_what_was_done(small_curves, tmp_path, capsys, monkeypatch, starts, shown):
    monkeypatch.setitem(METHODS, "slow", interrupt(starts))
    options = ["--methods", "adam,slow", "--epochs", "1", "--seed", "0", "1"]
    assert run(tmp_path, *options) == 130
    output = capsys.readouterr().out
    for text in shown:
        assert text in output
    assert ("slow" in output) == ("slow" in shown)
    assert results(tmp_path)["runs"][0]["finished"]


def test_interrupt_before_any_run_has_nothing_to_show(small_curves, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "slow", interrupt(0))
    assert run(tmp_path, "--methods", "slow") == 130
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "faxes"], "unknown 'faxes'; known are curves, mnist, faces"),
        (["--methods", "adam,lbfgs"], "unknown 'lbfgs'; known are kbfgs, sgd, adam, kbfgs_l, kfqn, kfac"),
        (["--methods", ""], "unknown ''"),
        (["--learning-rate", "adam"], "METHOD=VALUE"),
        (["--learning-rate", "adam=fast"], "a number above 0, got 'fast'"),
        (["--learning-rate", "adam=-1"], "a number above 0, got '-1'"),
        (["--learning-rate", "adam=nan"], "a number above 0, got 'nan'"),
        (["--learning-rate", "lbfgs=1"], "unknown 'lbfgs'"),
        (["--learning-rate", "adam=1", "--methods", "sgd"], "adam is not among --methods"),
        (["--epochs", "1", "--seconds", "1"], "not allowed with"),
        (["--epochs", "0"], "a whole number above 0, got '0'"),
        (["--epochs", "1.5"], "a whole number above 0, got '1.5'"),
        (["--seconds", "-1"], "a number above 0"),
        (["--target", "0"], "a number above 0"),
        (["--batch-size", "0"], "a whole number above 0"),
        (["--batch-size", "111"], "the training set has 110 images"),
        (["--seed", "-1"], "from 0"),
        (["--seed", "x"], "from 0"),
        (["--setting", "best"], "choose from"),
        (["--speed"], "unrecognized"),
        (["--problem", "mnist", "--data-dir", "/nowhere"], "/nowhere: no such folder"),
        (["--problem", "faces"], "--data-dir FOLDER"),
        (["--out", __file__], "cannot be written to"),
        (["--out", __file__ + "/below"], "cannot be written to"),
    ],
)
def test_wrong_options_get_one_line(small_curves, tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_missing_matplotlib_is_found_before_training(small_curves, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figure.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path) == 2
    assert "kfqn_optax[bench]" in capsys.readouterr().err


def test_module_exits_with_status_2_and_no_traceback():
    command = [sys.executable, "-m", "kfqn_optax.bench", "--problem", "faxes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
