"""Losses against time, as one would show them in a talk: a line for each trial, a band over its seeds."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kfqn_optax.bench._errors import UserError

NAMES = {  # as the field writes them
    "adam": "Adam",
    "nadamw": "NAdamW",
    "sgd": "SGD with momentum",
    "rmsprop": "RMSProp",
    "muon": "Muon",
    "lbfgs": "L-BFGS",
    "kfac": "K-FAC (kfac)",
    "kbfgs": "K-BFGS",
    "kbfgs_l": "K-BFGS(L)",
    "kfqn": "KF-QN",
}
FIRST_DROP = 0.08  # the part of a panel whose losses do not decide how high it reaches


class Track(NamedTuple):
    """One seed: for each name of a quantity, what it was at each evaluation."""

    values: Mapping[str, Sequence[float]]
    diverged: bool


class Series(NamedTuple):
    """One trial: all of its seeds. ``start_seconds`` are those of a warm start, in "seconds"."""

    label: str
    tracks: Sequence[Track]
    start_seconds: float = 0.0


class Panel(NamedTuple):
    """What is drawn against what, by the names in ``Track.values``; they label the axes, too."""

    x: str
    y: str


def trial_label(
    method: str, learning_rate: float, compile_seconds: float, batch_size: int | None = None
) -> str:
    """For a legend: the method by its proper name; the batch size where several were tried."""
    batch = "" if batch_size is None else f", batch {batch_size}"
    name = NAMES.get(method, method)
    return f"{name}, learning rate {learning_rate:g}{batch} (compiled in {compile_seconds:.1f} s)"


def require_matplotlib() -> None:
    """Find out before minutes of training that the plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plot needs matplotlib: pip install 'kfqn_optax[bench]'")


def save_figure(series: Sequence[Series], panels: Sequence[Panel], title: str, path: Path) -> None:
    """Medians as lines, bands from the least to the most; a cross is where a run diverged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels) + 1, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        lines = [_draw(axes, panel, each, index) for index, each in enumerate(series)]
        _scale(axes, panel, series)
    handles = [line for line in lines if line is not None]
    if any(track.diverged for each in series for track in each.tracks):
        handles += axes.plot([], [], color="grey", marker="x", linestyle="", label="diverged after this")
    if any(map(_started_warm, series)):
        handles += axes.plot([], [], color="grey", linewidth=4, label="below the curves: warm start")
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _draw(axes: Any, panel: Panel, series: Series, index: int) -> Any:
    """The line of a series; diverged seeds as thin lines of their own."""
    known = [track for track in series.tracks if len(track.values[panel.x])]
    whole = [track for track in known if not track.diverged]
    colour = f"C{index}"
    style = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 3, "label": series.label}
    x, values = together(whole, panel) if whole else ([], np.empty((1, 0)))
    line = axes.plot(x, np.median(values, axis=0), **style)[0]
    if len(whole) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    for track in known:
        if track.diverged:
            x, y = track.values[panel.x], track.values[panel.y]
            axes.plot(x, y, color=colour, linewidth=0.8, marker="x", markevery=[-1], markersize=9)
    if panel.x == "seconds" and _started_warm(series):
        height = 0.01 * (1 + index)  # of the panel
        across = axes.get_xaxis_transform()
        axes.plot([0, series.start_seconds], [height] * 2, color=colour, linewidth=4, transform=across)
    return line if known else None


def _started_warm(series: Series) -> bool:
    """Whether the start would be seen: every method makes its state in a moment."""
    ends = [track.values["seconds"][-1] for track in series.tracks if track.values["seconds"]]
    return series.start_seconds > 0.02 * max(ends, default=math.inf)


def together(tracks: Sequence[Track], panel: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Where the first seed was evaluated, as far as all reach (places,); all seeds there (tracks, places).

    Linear between a seed's own evaluations.
    """
    own = [np.asarray(track.values[panel.x], float) for track in tracks]
    least, most = max(x[0] for x in own), min(x[-1] for x in own)
    x = np.unique(np.clip(own[0], least, most))
    return x, np.stack(
        [np.interp(x, mine, track.values[panel.y]) for mine, track in zip(own, tracks, strict=True)]
    )


def _scale(axes: Any, panel: Panel, series: Sequence[Series]) -> None:
    """Logarithmic, unless a value has no logarithm; the first drop may leave the panel."""
    known = [track for each in series for track in each.tracks if len(track.values[panel.x])]
    values = [y for track in known for y in track.values[panel.y] if math.isfinite(y)]
    if values and min(values) > 0:
        axes.set_yscale("log")
        axes.set_ylim(*_interesting(known, panel, min(values)))
        if max(axes.get_ylim()) < 30 * min(axes.get_ylim()):
            _plain_ticks(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{panel.x} of training" if panel.x == "seconds" else panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _interesting(tracks: Sequence[Track], panel: Panel, least: float) -> tuple[float, float]:
    """The range of the values after the first drop, with a margin; no higher than where all started."""
    end = max(track.values[panel.x][-1] for track in tracks)
    after = [_first_after(track, panel, FIRST_DROP * end) for track in tracks]
    highest = lambda values: max(filter(math.isfinite, values), default=least)
    started = highest(track.values[panel.y][0] for track in tracks)
    most = max(min(highest(after), started), least)
    margin = max((most / least) ** 0.05, 1.02)
    return least / margin, most * margin


def _first_after(track: Track, panel: Panel, x: float) -> float:
    """Of the first evaluation from ``x`` on, or the last one."""
    points = list(zip(track.values[panel.x], track.values[panel.y], strict=True))
    return next((value for place, value in points if place >= x), points[-1][1])


def _plain_ticks(axes: Any) -> None:
    """Less than a decade or so: plain numbers in between, too."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
