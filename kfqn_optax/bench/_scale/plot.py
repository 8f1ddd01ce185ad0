"""Seconds of a step, and memory of the optimizer's state, against what is varied."""

from collections.abc import Sequence
from pathlib import Path

from kfqn_optax.bench._scale.cost import Cost


def save_plot(costs: Sequence[Cost], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(cost.axis for cost in costs))
    methods = list(dict.fromkeys(cost.method for cost in costs))
    figure = Figure(figsize=(3.4 * len(axes_names), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(axes_names), squeeze=False, sharex="col")
    for column, name in enumerate(axes_names):
        for index, method in enumerate(methods):
            own = [cost for cost in costs if (cost.axis, cost.method) == (name, method)]
            values = [cost.value for cost in own]
            style = {"color": f"C{index}", "marker": "o", "markersize": 3, "label": method}
            panels[0, column].plot(values, [1e3 * cost.seconds for cost in own], **style)
            panels[1, column].plot(values, [cost.state_mb for cost in own], **style)
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
        panels[1, column].set_xlabel(name)
    panels[0, 0].set_ylabel("ms a step")
    panels[1, 0].set_ylabel("optimizer state, MB a device")
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
