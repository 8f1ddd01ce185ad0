"""The figure of one problem: the best trial of each method."""

from collections.abc import Sequence
from pathlib import Path

from kfqn_optax.bench._output.figure import Panel, Series, Track, save_figure, trial_label
from kfqn_optax.bench._suite.curve import Curve, best_trials

TRAIN = "training loss"


def save_plot(curves: Sequence[Curve], title: str, metric: str, path: Path) -> None:
    """Training loss and test metric against seconds."""
    several = len({curve.trial.batch_size for curve in curves}) > 1
    series = [_series(group, metric, several) for group in best_trials(curves).values()]
    save_figure(series, [Panel("seconds", TRAIN), Panel("seconds", metric)], title, path)


def _series(curves: Sequence[Curve], metric: str, several_batch_sizes: bool) -> Series:
    method, rate, batch_size = curves[0].trial
    shown = batch_size if several_batch_sizes else None
    label = trial_label(method, rate, curves[0].compile_seconds, shown)
    return Series(label, [_track(curve, metric) for curve in curves])


def _track(curve: Curve, metric: str) -> Track:
    values = {
        "seconds": [point.seconds for point in curve.points],
        TRAIN: [point.train_loss for point in curve.points],
        metric: [point.test_metric for point in curve.points],
    }
    return Track(values, curve.diverged_step is not None)
