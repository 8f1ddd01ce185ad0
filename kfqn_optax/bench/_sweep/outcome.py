"""One run of the sweep and what became of it."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from kfqn_optax.bench._suite.curve import Curve, Trial
from kfqn_optax.bench._suite.lane import Evaluator, Lane, Program


class Outcome(NamedTuple):
    """Training losses over a fixed part of the training set, in units of the unscaled loss.

    Attributes:
      first, final: the losses before the first and after the last step.
      bad_steps: how many steps had a loss that was not finite; a run goes on after one.
    """

    problem: str
    name: str
    seed: int
    first: float
    final: float
    bad_steps: int

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite, or the training made it larger."""
        return self.bad_steps > 0 or not self.final <= self.first


def run(problem: str, name: str, seed: int, steps: int, program: Program, evaluate: Evaluator) -> Outcome:
    curve = Curve(Trial("", 1.0, program.batch_size), seed)
    lane = Lane(program, evaluate, curve)
    bad = sum(not math.isfinite(lane.step()) for _ in range(steps))
    lane.record()
    return Outcome(problem, name, seed, curve.points[0].train_loss, curve.points[-1].train_loss, bad)


def ratios(outcomes: Sequence[Outcome]) -> list[float]:
    """Of each final loss to the median of its problem's."""
    finals: dict[str, list[float]] = {}
    for outcome in outcomes:
        finals.setdefault(outcome.problem, []).append(
            outcome.final if math.isfinite(outcome.final) else math.inf
        )
    return [outcome.final / statistics.median(finals[outcome.problem]) for outcome in outcomes]
