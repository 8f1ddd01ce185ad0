"""What the figures show, and what the bars say."""

import numpy as np
import pytest
import rich.progress
from matplotlib.figure import Figure

from kfqn_optax.bench._compare import compare
from kfqn_optax.bench._output import figure
from kfqn_optax.bench._output.figure import Panel, Series, Track, save_figure, together, trial_label
from kfqn_optax.bench._output.progress import progress_bars
from kfqn_optax.bench._train import Budget

PANEL = Panel("seconds", "loss")


def track(*losses: float, seconds=None, diverged=False) -> Track:
    seconds = list(range(len(losses))) if seconds is None else seconds
    return Track({"seconds": seconds, "loss": losses}, diverged)


def axes_of(monkeypatch, tmp_path, *series: Series):
    """The panel as drawn."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    save_figure(series, [PANEL], "title", tmp_path / "figure.png")
    return drawn[0].axes[0]


def test_seeds_evaluated_at_other_times_meet_where_the_first_was():
    tracks = [track(8.0, 4.0, 2.0), track(8.0, 6.0, 1.0, seconds=[0.0, 0.5, 1.5])]
    x, values = together(tracks, PANEL)
    np.testing.assert_allclose(x, [0.0, 1.0, 1.5])  # as far as both reach
    np.testing.assert_allclose(np.median(values, axis=0), [8.0, (4.0 + 3.5) / 2, (3.0 + 1.0) / 2])
    np.testing.assert_allclose(values.min(0), [8.0, 3.5, 1.0])
    np.testing.assert_allclose(values.max(0), [8.0, 4.0, 3.0])


def test_first_drop_does_not_decide_the_range(monkeypatch, tmp_path):
    losses = [500.0, *np.linspace(80.0, 60.0, 20)]
    low, high = axes_of(monkeypatch, tmp_path, Series("one", [track(*losses)])).get_ylim()
    assert 55 < low < 60
    assert 78 < high < 85


def test_a_run_that_stands_still_stays_in_the_picture(monkeypatch, tmp_path):
    fast, still = track(*np.linspace(500.0, 60.0, 20)), track(*[500.0] * 20)
    _, high = axes_of(monkeypatch, tmp_path, Series("one", [fast]), Series("two", [still])).get_ylim()
    assert 500 < high < 600


def test_diverged_seed_is_no_part_of_the_median_and_marked(monkeypatch, tmp_path):
    tracks = [track(8.0, 4.0, 2.0), track(8.0, 1e30, diverged=True)]
    axes = axes_of(monkeypatch, tmp_path, Series("one", tracks, start_seconds=0.5))
    lines = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata())]
    assert [8.0, 4.0, 2.0] in lines
    assert [8.0, 1e30] in lines
    assert axes.get_ylim()[1] < 10
    told = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert told == ["one", "diverged after this", "below the curves: warm start"]


@pytest.mark.parametrize("losses", [(), (3.0,), (0.0, 0.0), (float("nan"), 1.0)])
def test_odd_curves_are_drawn(monkeypatch, tmp_path, losses):
    axes = axes_of(monkeypatch, tmp_path, Series("one", [track(*losses)]))
    low, high = axes.get_ylim()
    assert np.isfinite([low, high]).all()
    assert low < high
    drawn = [line.get_ydata() for line in axes.lines]
    assert any(np.array_equal(line, losses, equal_nan=True) for line in drawn)


def test_labels_have_proper_names():
    assert trial_label("kbfgs_l", 1.0, 2.34) == "K-BFGS(L), learning rate 1 (compiled in 2.3 s)"
    assert trial_label("new", 0.1, 2.0, 64) == "new, learning rate 0.1, batch 64 (compiled in 2.0 s)"


def test_every_method_has_a_proper_name():
    from kfqn_optax.bench._methods import METHODS
    from kfqn_optax.bench._suite import methods

    plain = {name.partition("-")[0] for name in (*METHODS, *methods.METHODS)}
    assert plain <= set(figure.NAMES)


def test_bars_show_the_whole_with_an_estimate_and_end_with_the_losses_of_the_table(small, monkeypatch):
    seen = []
    bars = progress_bars()
    update = bars.update
    monkeypatch.setattr("kfqn_optax.bench._compare.progress_bars", lambda: bars)
    monkeypatch.setattr(
        bars, "update", lambda task, **k: (update(task, **k), seen.append(bars.tasks[0].completed))
    )
    runs = []
    options = {"setting": "default", "seeds": [0, 1], "batch_size": 25, "budget": Budget(2, None, None)}
    compare(small, small.load(None), {"adam": [1e-3]}, runs=runs, **options)
    assert bars.tasks[0].total == 2
    assert sorted(seen) == seen
    assert {0.125, 0.25, 1.0, 1.125, 2.0} <= set(seen)  # of 8 steps a run
    told = [task.description for task in bars.tasks]
    assert told[1].startswith("adam: compiled in ")
    for run, text in zip(runs, told[2:], strict=True):
        assert text.endswith(f"train loss {run.history[-1].train_loss:.2f}")
    assert any(isinstance(column, rich.progress.TimeRemainingColumn) for column in bars.columns)
