"""Loss and test metric against seconds: the best trial of each method, a band over its seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kfqn_optax.bench._suite.curve import Curve, Point, best_trials


def save_plot(curves: Sequence[Curve], title: str, metric: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for index, (method, group) in enumerate(best_trials(curves).items()):
        label = f"{method}, {group[0].trial.learning_rate:g}"
        _draw(left, group, lambda point: point.train_loss, f"C{index}", label)
        _draw(right, group, lambda point: point.test_metric, f"C{index}", label)
    for axes, heading in ((left, "training loss"), (right, metric)):
        _finish(axes, heading)
    right.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw(
    axes: Any, group: Sequence[Curve], value: Callable[[Point], float], colour: str, label: str
) -> None:
    """The median over seeds of each evaluation, and from the least to the most."""
    seconds, middle, least, most = [], [], [], []
    for index in range(max(len(curve.points) for curve in group)):
        points = [curve.points[index] for curve in group if index < len(curve.points)]
        values = [value(point) for point in points if math.isfinite(value(point))]
        if values:
            seconds.append(statistics.median(point.seconds for point in points))
            middle.append(statistics.median(values))
            least.append(min(values))
            most.append(max(values))
    axes.plot(seconds, middle, color=colour, linewidth=1.3, label=label)
    if len(group) > 1:
        axes.fill_between(seconds, least, most, color=colour, alpha=0.2, linewidth=0)


def _finish(axes: Any, heading: str) -> None:
    """A logarithmic scale, unless there is a value that has none."""
    values = [value for line in axes.lines for value in line.get_ydata()]
    if values and min(values) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(heading)
    axes.grid(alpha=0.3, which="both")
