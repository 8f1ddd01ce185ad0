"""The figure of the plain comparison: training losses against epochs and seconds, test losses apart."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from kfqn_optax.bench._output.figure import Panel, Series, Track, save_figure, trial_label
from kfqn_optax.bench._train import Run

TRAIN, TEST = "training loss (with the L2 term)", "test loss"


def save_plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """A line for each method and learning rate."""
    trials = dict.fromkeys((run.method, run.learning_rate) for run in runs)
    series = [_series([run for run in runs if (run.method, run.learning_rate) == each]) for each in trials]
    panels = [Panel("epochs", TRAIN), Panel("seconds", TRAIN), Panel("seconds", TEST)]
    save_figure(series, panels, title, path)


def _series(runs: Sequence[Run]) -> Series:
    label = trial_label(runs[0].method, runs[0].learning_rate, runs[0].compile_seconds)
    start = statistics.median(run.start_seconds for run in runs)
    return Series(label, [_track(run) for run in runs], start)


def _track(run: Run) -> Track:
    values = {
        "epochs": [point.epochs for point in run.history],
        "seconds": [point.seconds for point in run.history],
        TRAIN: [point.train_loss for point in run.history],
        TEST: [point.test_loss for point in run.history],
    }
    return Track(values, run.diverged_epoch is not None)
