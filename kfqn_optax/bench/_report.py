"""The results as a table and as JSON. Several seeds are shown as the median over [least, most]."""

import importlib.metadata
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from kfqn_optax.bench._train import Run

_WIDTH = 160  # of the table where stdout is no terminal


def print_table(runs: Sequence[Run], title: str, target: float | None) -> None:
    """Print one row for each method and learning rate. A diverged run counts as an infinite loss."""
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD)
    columns = _columns(runs, target)
    for heading in columns:
        justify = "left" if heading in ("method", "remarks") else "right"
        table.add_column(heading, justify=justify, no_wrap=heading == "remarks")
    for trial in dict.fromkeys((run.method, run.learning_rate) for run in runs):
        group = [run for run in runs if (run.method, run.learning_rate) == trial]
        table.add_row(*(cell(group) for cell in columns.values()))
    console = rich.console.Console(markup=False)  # a cell may hold [brackets]
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)


def _columns(runs: Sequence[Run], target: float | None) -> dict[str, Callable[[list[Run]], str]]:
    """For each heading, the function from the runs of one method to the text of its cell."""
    adam = _median_seconds_per_step(runs, "adam")
    columns: dict[str, Callable[[list[Run]], str]] = {
        "method": lambda group: group[0].method,
        "learning rate": lambda group: f"{group[0].learning_rate:g}",
        "epochs": lambda group: _spread((run.epochs for run in group), ".4g"),
        "train loss": lambda group: _spread(map(_final_train, group), ".2f", "diverged"),
        "test loss": lambda group: _spread(map(_final_test, group), ".2f", "diverged"),
        "s/step": lambda group: _spread((run.seconds_per_step for run in group), ".4f"),
        "x Adam": lambda group: _spread((run.seconds_per_step / adam for run in group), ".2f"),
        "train s": lambda group: _spread((run.seconds for run in group), ".1f"),
        "compile s": lambda group: f"{group[0].compile_seconds:.1f}",
    }
    if target is not None:
        columns[f"epochs to {target:g}"] = lambda group: _to_target(group, lambda r: r.epochs, "g")
        columns["s to it"] = lambda group: _to_target(group, lambda r: r.seconds, ".1f")
    if any(map(_remark, runs)):
        columns["remarks"] = lambda group: "\n".join(filter(None, map(_remark, group)))
    return columns


def _median_seconds_per_step(runs: Iterable[Run], method: str) -> float:
    times = [run.seconds_per_step for run in runs if run.method == method and run.steps]
    return statistics.median(times) if times else math.nan


def _final_train(run: Run) -> float:
    return _final(run, lambda: run.history[-1].train_loss)


def _final_test(run: Run) -> float:
    return _final(run, lambda: run.history[-1].test_loss)


def _final(run: Run, loss: Callable[[], float]) -> float:
    if run.diverged_epoch is not None:
        return math.inf
    return loss() if run.history else math.nan


def _to_target(group: list[Run], value: Callable[[Run], float], spec: str) -> str:
    return _spread((value(run) if run.reached_target else math.inf for run in group), spec, "not reached")


def _spread(values: Iterable[float], spec: str, infinite: str = "inf") -> str:
    """Median, and below it [least, most] where values differ; nan (unknown) is left out."""

    def show(value: float) -> str:
        return infinite if math.isinf(value) else format(value, spec)

    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    if len(set(known)) == 1:
        return show(known[0])
    return f"{show(statistics.median(known))}\n[{show(min(known))}, {show(max(known))}]"


def _remark(run: Run) -> str:
    if run.diverged_epoch is not None:
        return f"seed {run.seed} diverged at epoch {run.diverged_epoch}"
    return "" if run.finished else f"seed {run.seed} interrupted"


def save_json(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> None:
    """Write the settings, the versions and every run with its history."""
    content = {
        "settings": settings,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "device": str(jax.devices()[0].device_kind),
        "runs": [_as_dict(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")


def _as_dict(run: Run) -> dict[str, Any]:
    return vars(run) | {
        "epochs": run.epochs,
        "seconds_per_step": run.seconds_per_step if run.steps else None,
        "history": [point._asdict() for point in run.history],
    }
