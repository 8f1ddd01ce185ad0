"""The training curves: loss against epochs and against seconds, every run a line."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfqn_optax.bench._errors import UserError
from kfqn_optax.bench._train import Run


def require_matplotlib() -> None:
    """Find out before minutes of training that the plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plot needs matplotlib: pip install 'kfqn_optax[bench]'")


def save_plot(runs: Sequence[Run], title: str, path: Path) -> None:
    """Draw training losses as solid lines, test losses dashed; a cross is where a run diverged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {trial: f"C{i}" for i, trial in enumerate(dict.fromkeys(map(_trial, runs)))}
    for axes, coordinate in ((left, "epochs"), (right, "seconds")):
        for run in runs:
            _draw_run(axes, run, coordinate, colours[_trial(run)])
        axes.set_xlabel(coordinate)
        axes.grid(alpha=0.3, which="both")
    _label_losses(left)
    for trial, colour in colours.items():
        right.plot([], [], color=colour, label=trial)
    right.plot([], [], color="grey", label="training loss (with the L2 term)")
    right.plot([], [], color="grey", linestyle="--", label="test loss")
    if any(run.diverged_epoch is not None for run in runs):
        right.plot([], [], color="grey", marker="x", linestyle="", label="diverged after this")
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _trial(run: Run) -> str:
    return f"{run.method}, learning rate {run.learning_rate:g}"


def _draw_run(axes: Any, run: Run, coordinate: str, colour: str) -> None:
    if not run.history:
        return
    x = [getattr(point, coordinate) for point in run.history]
    train, test = ([p.train_loss for p in run.history], [p.test_loss for p in run.history])
    axes.plot(x, train, color=colour, linewidth=1.2)
    axes.plot(x, test, color=colour, linewidth=1.0, linestyle="--", alpha=0.7)
    if run.diverged_epoch is not None:
        axes.plot(x[-1:], train[-1:], color=colour, marker="x", markersize=9)


def _label_losses(axes: Any) -> None:
    """Logarithmic, labelled with plain numbers: losses often span less than one decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
