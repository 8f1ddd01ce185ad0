import json
import math

import pytest

from kfqn_optax.bench._output.table import print_table
from kfqn_optax.bench._plot import save_plot
from kfqn_optax.bench._report import results_table, save_json
from kfqn_optax.bench._train import Point, Run


def record(method="adam", seed=0, losses=(500.0, 60.0), seconds=2.0, **choices) -> Run:
    """A run of 10 steps an epoch, half a second of which were the warm start."""
    epochs = len(losses) - 1
    history = [Point(i, seconds * i / max(epochs, 1), loss, loss + 1) for i, loss in enumerate(losses)]
    run = Run(method, seed, 1e-3, steps_per_epoch=10, compile_seconds=4.0, steps=10 * epochs)
    run.start_seconds, run.seconds, run.history, run.finished = 0.5, seconds, history, True
    for name, value in choices.items():
        setattr(run, name, value)
    return run


def table(capsys, runs, target=None) -> dict[str, str]:
    """The table as text, keyed by the first word of each line."""
    print_table(results_table(runs, "title", target))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    return {line.split()[0]: line for line in reversed(lines)} | {"all": "\n".join(lines)}


def test_one_run_of_each_method(capsys):
    lines = table(capsys, [record(), record("sgd", losses=(500, 300, 70), seconds=6.5)])
    assert lines["adam"].split() == [
        "adam",
        "0.001",
        "1",
        "60.00",
        "61.00",
        "0.1500",
        "1.00",
        "2.0",
        "4.0",
    ]
    assert lines["sgd"].split() == [
        "sgd",
        "0.001",
        "2",
        "70.00",
        "71.00",
        "0.3000",
        "2.00",
        "6.5",
        "4.0",
    ]
    assert "remarks" not in lines["all"]


def test_several_seeds_show_median_and_spread(capsys):
    runs = [record(seed=s, losses=(500.0, loss)) for s, loss in enumerate((63.0, 60.0, 61.5))]
    lines = table(capsys, runs)
    assert "61.50" in lines["adam"]
    assert "[60.00, 63.00]" in lines["all"]


def test_diverged_run_counts_as_an_infinite_loss_and_is_named(capsys):
    runs = [record(seed=s) for s in (0, 1)] + [record(seed=7, losses=(500.0,), diverged_epoch=3)]
    lines = table(capsys, runs)
    assert "60.00" in lines["adam"]
    assert "[60.00, diverged]" in lines["all"]
    assert "seed 7 diverged at epoch 3" in lines["all"]
    lines = table(capsys, [record(seed=s, diverged_epoch=s) for s in (1, 2, 3)])
    assert lines["adam"].split()[3:5] == ["diverged", "diverged"]
    for epoch in (1, 2, 3):
        assert f"seed {epoch} diverged at epoch {epoch}" in lines["all"]


def test_interrupted_run_is_named(capsys):
    lines = table(capsys, [record(finished=False)])
    assert "60.00" in lines["adam"]
    assert "seed 0 interrupted" in lines["all"]
    lines = table(capsys, [record(losses=(), steps=0, finished=False)])
    assert lines["adam"].split()[3:7] == ["-", "-", "-", "-"]


def test_without_adam_there_is_no_ratio(capsys):
    assert table(capsys, [record("sgd")])["sgd"].split()[6] == "-"


def test_epochs_and_seconds_to_the_target(capsys):
    runs = [record(reached_target=True), record("sgd", losses=(500.0, 80.0))]
    lines = table(capsys, runs, target=60.0)
    assert lines["adam"].split()[-2:] == ["1", "2.0"]
    assert lines["sgd"].split()[-4:] == ["not", "reached", "not", "reached"]


@pytest.mark.parametrize(
    "runs",
    [
        [record(), record("sgd", losses=(500.0, 90.0, 70.0))],
        [record(losses=(500.0,), diverged_epoch=1)],
        [record(losses=(), steps=0, start_seconds=0.0)],
    ],
)
def test_plot_and_json_of_any_runs(tmp_path, runs):
    save_plot(runs, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    save_json(runs, {"problem": "curves", "out": tmp_path}, tmp_path / "runs.json")
    text = (tmp_path / "runs.json").read_text()
    content = json.loads(text, parse_constant=pytest.fail)  # no NaN: other readers refuse it
    assert content["settings"] == {"problem": "curves", "out": str(tmp_path)}
    for run, saved in zip(runs, content["runs"], strict=True):
        assert [Point(**point) for point in saved["history"]] == run.history
        expected = None if math.isnan(run.seconds_per_step) else run.seconds_per_step
        assert saved["seconds_per_step"] == expected
        assert saved["diverged_epoch"] == run.diverged_epoch
