"""The results of one problem as a table: the best trial of each method."""

from collections.abc import Callable, Sequence

import rich.table

from kfqn_optax.bench._output.table import spread, table_of
from kfqn_optax.bench._suite.curve import (
    Curve,
    adam_step,
    best_trials,
    by_trial,
    median_final_loss,
    step_in_adams,
)


def results_table(
    curves: Sequence[Curve], title: str, metric: str, target: float | None
) -> rich.table.Table:
    """One row a method, medians over seeds and [least, most] below; the best methods first."""
    groups = sorted(best_trials(curves).values(), key=median_final_loss)
    return table_of(groups, _columns(curves, metric, target), title)


def _columns(
    curves: Sequence[Curve], metric: str, target: float | None
) -> dict[str, Callable[[list[Curve]], str]]:
    adams = [curve for curve in curves if curve.trial.method == "adam"]
    columns: dict[str, Callable[[list[Curve]], str]] = {
        "method": lambda group: group[0].trial.method,
        "rate": lambda group: f"{group[0].trial.learning_rate:g}",
        "batch": lambda group: str(group[0].trial.batch_size),
        "steps": lambda group: spread((c.steps for c in group), ".0f"),
        "train loss": lambda group: spread((c.final_loss for c in group), ".4g", "diverged"),
        metric: lambda group: spread((c.final_metric for c in group), ".4g", "diverged"),
        "ms/step": lambda group: spread((1e3 * c.seconds_per_step for c in group), ".3g"),
        "x Adam": lambda group: spread([step_in_adams(group, adams)], ".2f"),
        "compile s": lambda group: f"{group[0].compile_seconds:.1f}",
    }
    if target is not None:
        reach = lambda group: [(c.seconds_to(target), adam_step(c, adams)) for c in group]
        columns[f"s to {target:g}"] = lambda group: spread((s for s, _ in reach(group)), ".3g", "never")
        columns["in Adam's steps"] = lambda group: spread((s / a for s, a in reach(group)), ".0f", "never")
    columns["remarks"] = lambda group: _remarks(group, curves)
    return columns


def _remarks(group: list[Curve], curves: Sequence[Curve]) -> str:
    """How many seeds diverged, and whether a better learning rate may lie outside of those tried."""
    trial = group[0].trial
    remarks = []
    diverged = sum(curve.diverged_step is not None for curve in group)
    if diverged:
        remarks.append(f"{diverged} of {len(group)} diverged")
    rates = {t.learning_rate for t in by_trial(curves) if t.method == trial.method}
    if len(rates) > 1 and trial.learning_rate in (min(rates), max(rates)):
        remarks.append("rate at end of grid")
    return ", ".join(remarks)
