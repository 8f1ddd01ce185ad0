"""What one run leaves behind, and the arithmetic on it."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """Losses after some training, evaluated off the clock."""

    seconds: float
    steps: int
    train_loss: float
    test_metric: float


class Trial(NamedTuple):
    """What was run, apart from the seed."""

    method: str
    learning_rate: float
    batch_size: int


@dataclasses.dataclass
class Curve:
    """One run. ``diverged_step`` is the step (from 1) whose loss was not finite; the run ends with it."""

    trial: Trial
    seed: int
    compile_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    diverged_step: int | None = None
    points: list[Point] = dataclasses.field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        return self.seconds / self.steps if self.steps else math.nan

    @property
    def final_loss(self) -> float:
        """Infinite for a run that diverged, or that was never evaluated."""
        return self._final(lambda point: point.train_loss)

    @property
    def final_metric(self) -> float:
        return self._final(lambda point: point.test_metric)

    def _final(self, of) -> float:
        value = of(self.points[-1]) if self.points else math.inf
        return value if self.diverged_step is None and math.isfinite(value) else math.inf

    def seconds_to(self, target: float) -> float:
        """When the training loss first came down to ``target``, linear between evaluations; or inf."""
        before = None
        for point in self.points:
            if point.train_loss <= target:
                if before is None:
                    return point.seconds
                share = (before.train_loss - target) / (before.train_loss - point.train_loss)
                return before.seconds + share * (point.seconds - before.seconds)
            before = point if math.isfinite(point.train_loss) else None
        return math.inf


def median_final_loss(curves: Iterable[Curve]) -> float:
    return statistics.median(curve.final_loss for curve in curves)


def by_trial(curves: Iterable[Curve]) -> dict[Trial, list[Curve]]:
    """The curves of all seeds of each trial."""
    groups: dict[Trial, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.trial, []).append(curve)
    return groups


def best_trials(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """For each method the curves of its best trial, by the median of the seeds' final training losses."""
    best: dict[str, list[Curve]] = {}
    for trial, group in by_trial(curves).items():
        method = trial.method
        if method not in best or median_final_loss(group) < median_final_loss(best[method]):
            best[method] = group
    return best


def step_in_adams(curves: Sequence[Curve], adams: Iterable[Curve]) -> float:
    """Seconds of a step over those of Adam's in the same interleaved runs, at the same batch size.

    The median over seeds; Adam's seconds are those of all its learning rates. Not a number without Adam.
    """
    adams = list(adams)
    ratios = [curve.seconds_per_step / adam_step(curve, adams) for curve in curves if curve.steps]
    known = [ratio for ratio in ratios if math.isfinite(ratio)]
    return statistics.median(known) if known else math.nan


def adam_step(curve: Curve, adams: Iterable[Curve]) -> float:
    """Seconds of a step of Adam in the run of ``curve``."""
    same = [a for a in adams if a.seed == curve.seed and a.trial.batch_size == curve.trial.batch_size]
    steps = sum(adam.steps for adam in same)
    return sum(adam.seconds for adam in same) / steps if steps else math.nan
