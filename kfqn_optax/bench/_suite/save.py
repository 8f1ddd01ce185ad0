"""Everything that was measured, as one JSON file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kfqn_optax.bench._output.environment import environment
from kfqn_optax.bench._output.record import write_json
from kfqn_optax.bench._suite.curve import Curve, adam_step, best_trials


def save_json(
    results: Mapping[str, Sequence[Curve]],
    metrics: Mapping[str, str],
    settings: Mapping[str, Any],
    path: Path,
) -> None:
    """Settings, environment, and for each problem all curves and which trial of each method was best."""
    write_json(
        {
            "settings": settings,
            "environment": environment(),
            "problems": {
                name: {
                    "test_metric": metrics[name],
                    "best": {m: group[0].trial._asdict() for m, group in best_trials(curves).items()},
                    "curves": [_as_dict(curve, curves) for curve in curves],
                }
                for name, curves in results.items()
            },
        },
        path,
    )


def _as_dict(curve: Curve, curves: Sequence[Curve]) -> dict[str, Any]:
    adams = [other for other in curves if other.trial.method == "adam"]
    return curve.trial._asdict() | {
        **{
            field.name: getattr(curve, field.name)
            for field in dataclasses.fields(curve)
            if field.name != "trial"
        },
        "seconds_per_step": curve.seconds_per_step,
        "step_in_adams": curve.seconds_per_step / adam_step(curve, adams),
        "points": [point._asdict() for point in curve.points],
    }
