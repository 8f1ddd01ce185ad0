"""The arithmetic of the suite on curves made by hand."""

import itertools
import math

import pytest

from kfqn_optax.bench._output.table import spread
from kfqn_optax.bench._suite.curve import (
    Curve,
    Point,
    Trial,
    adam_step,
    best_trials,
    step_in_adams,
)
from kfqn_optax.bench._suite.interleave import LONGEST_TURN, turns
from kfqn_optax.bench._suite.table import results_table


def curve(method="adam", rate=1e-3, seed=0, losses=(8.0, 4.0, 2.0), seconds=2.0, steps=20, **rest) -> Curve:
    last = max(len(losses) - 1, 1)
    points = [Point(seconds * i / last, steps * i // last, loss, loss + 1) for i, loss in enumerate(losses)]
    return Curve(Trial(method, rate, 64), seed, 1.5, seconds, steps, points=points, **rest)


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((8, 4, 2), 4, 1.0),  # at an evaluation
        ((8, 4, 2), 3, 1.5),  # half way between two
        ((8, 4, 2), 7, 0.25),
        ((8, 4, 2), 9, 0.0),  # from the start
        ((8, 4, 2), 1, math.inf),
        ((8, 2, 5), 4, 2 / 3),  # the first time, even if the loss rises again
        ((8, math.nan, 4), 5, 2.0),  # no line to draw: when it was seen
        ((), 5, math.inf),
    ],
)
def test_time_to_the_target(losses, target, expected):
    assert curve(losses=losses).seconds_to(target) == pytest.approx(expected)


def test_steps_are_measured_in_those_of_adam_from_the_same_seed_and_batch_size():
    adams = [curve(seconds=2, steps=20), curve(rate=1e-2, seconds=2, steps=30), curve(seed=1, steps=80)]
    other = curve("kfac", seconds=2, steps=10)
    assert adam_step(other, adams) == pytest.approx(4 / 50)
    assert step_in_adams([other], adams) == pytest.approx(0.2 / 0.08)
    slow = curve("kfac", seed=1, seconds=2, steps=2)
    assert step_in_adams([other, slow], adams) == pytest.approx((2.5 + 1 / 0.025) / 2)
    assert math.isnan(step_in_adams([other], []))
    larger = Curve(Trial("kfac", 1.0, 128), 0, seconds=2.0, steps=10)
    assert math.isnan(adam_step(larger, adams))


def test_best_trial_has_the_least_median_of_final_losses_and_divergence_counts_as_infinite():
    lucky = [curve(rate=0.1, seed=s, losses=(8, loss)) for s, loss in enumerate((0.1, 5, 6))]
    steady = [curve(rate=0.01, seed=s, losses=(8, loss)) for s, loss in enumerate((3, 4, 4.5))]
    broken = [curve(rate=1.0, seed=s, losses=(8, 0.2), diverged_step=7) for s in range(3)]
    best = best_trials([*lucky, *steady, *broken, curve("sgd", diverged_step=2)])
    assert best["adam"] == steady
    assert best["sgd"][0].final_loss == math.inf
    assert curve(losses=(8, math.nan)).final_loss == math.inf


def cells(curves, target=None) -> dict[str, list[str]]:
    table = results_table(curves, "title", "test error", target)
    return {str(column.header): list(map(str, column.cells)) for column in table.columns}


def test_table_shows_the_best_first_with_time_to_the_target():
    adams = [curve(rate=rate, losses=(8, 4, loss)) for rate, loss in ((1e-3, 2), (1e-2, 3), (1e-4, 5))]
    columns = cells([*adams, curve("kfac", 1.0, losses=(8, 1, 0.5), steps=10)], target=2.0)
    assert columns["method"] == ["kfac", "adam"]
    assert columns["rate"] == ["1", "0.001"]
    assert columns["train loss"] == ["0.5", "2"]
    assert columns["test error"] == ["1.5", "3"]
    assert columns["x Adam"] == ["2.00", "1.00"]
    assert columns["s to 2"] == ["0.857", "2"]
    assert columns["in Adam's steps"] == ["9", "20"]
    assert columns["remarks"] == ["", ""]


def test_table_remarks_on_divergence_and_on_a_grid_that_ends():
    adams = [curve(rate=rate, losses=(8, loss)) for rate, loss in ((1e-3, 3), (1e-2, 2))]
    sgd = [curve("sgd", 1.0, seed=0), curve("sgd", 1.0, seed=1, diverged_step=3)]
    columns = cells([*adams, *sgd], target=0.1)
    assert columns["remarks"] == ["rate at end of grid", "1 of 2 diverged"]
    assert columns["s to 0.1"] == ["never", "never"]
    assert "diverged" in columns["train loss"][1]


def test_spread_leaves_out_what_is_unknown():
    assert spread([1.0, 3.0, 2.0], "g") == "2\n[1, 3]"
    assert spread([2.0, math.nan, 2.0], "g") == "2"
    assert spread([math.nan], "g") == "-"
    assert spread([1.0, math.inf, math.inf], "g", "never") == "never\n[1, never]"


@pytest.mark.parametrize(("seconds", "points"), [(10.0, 4), (0.2, 3), (60.0, 20)])
def test_turns_are_short_and_equal_and_evaluations_regular(seconds, points):
    schedule = turns(seconds, points)
    ends = [0.0, *(end for end, _ in schedule)]
    lengths = [after - before for before, after in itertools.pairwise(ends)]
    assert max(lengths) <= LONGEST_TURN + 1e-9
    assert lengths == pytest.approx([lengths[0]] * len(lengths))
    evaluated = [end for end, evaluate in schedule if evaluate]
    assert evaluated == pytest.approx([seconds * (i + 1) / points for i in range(points)])
