"""All runs from one seed side by side: whatever else the machine does hits all of them alike."""

from collections.abc import Callable, Iterable, Sequence

from kfqn_optax.bench._suite.curve import Curve, Trial
from kfqn_optax.bench._suite.lane import Evaluator, Lane, Program

LONGEST_TURN = 0.5  # seconds that one run has before it is the next one's turn


def turns(seconds: float, points: int) -> list[tuple[float, bool]]:
    """What every clock is to show after each turn, and whether the runs are evaluated then."""
    each = -(-seconds // (points * LONGEST_TURN))  # turns from one evaluation to the next
    count = int(max(each, 1)) * points
    return [(seconds * turn / count, turn * points % count == 0) for turn in range(1, count + 1)]


def run_interleaved(
    programs: dict[Trial, Program],
    evaluate: Evaluator,
    seeds: Iterable[int],
    *,
    seconds: float,
    points: int,
    curves: list[Curve],
    on_turn: Callable[[float], None] = lambda advanced: None,
) -> None:
    """Give every program ``seconds`` of its own from each seed, in turns, evaluated ``points`` times.

    The curves are appended to ``curves`` as they start, so that the caller has them after an interrupt.
    """
    for seed in seeds:
        lanes = [Lane(program, evaluate, Curve(trial, seed)) for trial, program in programs.items()]
        curves.extend(lane.curve for lane in lanes)
        _take_turns(lanes, turns(seconds, points), on_turn)


def _take_turns(
    lanes: Sequence[Lane], schedule: Iterable[tuple[float, bool]], on_turn: Callable[[float], None]
) -> None:
    reached = 0.0
    for until, evaluated in schedule:
        for lane in lanes:
            lane.advance(until)
            if evaluated:
                lane.record()
            on_turn((until - reached) / len(lanes))
        reached = until
