"""The results as a table and as JSON. Several seeds are shown as the median over [least, most]."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table

from kfqn_optax.bench._output.environment import environment
from kfqn_optax.bench._output.record import write_json
from kfqn_optax.bench._output.table import spread, table_of
from kfqn_optax.bench._train import Run


def results_table(runs: Sequence[Run], title: str, target: float | None) -> rich.table.Table:
    """One row for each method and learning rate. A diverged run counts as an infinite loss."""
    trials = dict.fromkeys((run.method, run.learning_rate) for run in runs)
    groups = ([run for run in runs if (run.method, run.learning_rate) == trial] for trial in trials)
    return table_of(groups, _columns(runs, target), title)


def _columns(runs: Sequence[Run], target: float | None) -> dict[str, Callable[[list[Run]], str]]:
    """For each heading, the function from the runs of one method to the text of its cell."""
    adam = _median_seconds_per_step(runs, "adam")
    columns: dict[str, Callable[[list[Run]], str]] = {
        "method": lambda group: group[0].method,
        "learning rate": lambda group: f"{group[0].learning_rate:g}",
        "epochs": lambda group: spread((run.epochs for run in group), ".4g"),
        "train loss": lambda group: spread(map(_final_train, group), ".2f", "diverged"),
        "test loss": lambda group: spread(map(_final_test, group), ".2f", "diverged"),
        "s/step": lambda group: spread((run.seconds_per_step for run in group), ".4f"),
        "x Adam": lambda group: spread((run.seconds_per_step / adam for run in group), ".2f"),
        "train s": lambda group: spread((run.seconds for run in group), ".1f"),
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
    return spread((value(run) if run.reached_target else math.inf for run in group), spec, "not reached")


def _remark(run: Run) -> str:
    if run.diverged_epoch is not None:
        return f"seed {run.seed} diverged at epoch {run.diverged_epoch}"
    return "" if run.finished else f"seed {run.seed} interrupted"


def save_json(runs: Sequence[Run], settings: Mapping[str, Any], path: Path) -> None:
    """Write the settings, what the runs were made with, and every run with its history."""
    records = [_as_dict(run) for run in runs]
    write_json({"settings": settings, "environment": environment(), "runs": records}, path)


def _as_dict(run: Run) -> dict[str, Any]:
    return vars(run) | {
        "epochs": run.epochs,
        "seconds_per_step": run.seconds_per_step if run.steps else None,
        "history": [point._asdict() for point in run.history],
    }
