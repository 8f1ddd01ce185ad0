import time

import jax.numpy as jnp
import numpy as np
import pytest

from kfqn_optax.bench import _train
from kfqn_optax.bench._methods import METHODS, Recipe
from kfqn_optax.bench._models import l2_term
from kfqn_optax.bench._train import Budget, Program, Run, compile_method, train_method

BATCH = 25  # of 110 images: 4 steps an epoch


@pytest.fixture(scope="module")
def programs(small) -> dict[str, Program]:
    return {name: compiled(small, METHODS[name].build(small, 1e-2, {})) for name in METHODS}


def compiled(small, recipe: Recipe) -> Program:
    return compile_method(small, recipe, *map(jnp.asarray, small.load(None)), BATCH)


def trained(program: Program, budget: Budget, seed: int = 0) -> Run:
    run = Run("any", seed, 1e-2, program.steps_per_epoch, program.compile_seconds)
    train_method(program, run, budget, on_step=lambda run: None)
    return run


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(programs, method):
    run = trained(programs[method], Budget(5, None, None))
    assert run.finished
    assert run.diverged_epoch is None
    assert run.steps == 20
    assert [point.epochs for point in run.history] == [0, 1, 2, 3, 4, 5]
    assert run.history[-1].train_loss < run.history[0].train_loss
    assert run.compile_seconds > 0
    assert 0 < run.seconds_per_step < run.seconds


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides_the_run_and_all_methods_start_alike(programs, method):
    runs = [trained(programs[method], Budget(2, None, None), seed) for seed in (4, 4, 5)]
    losses = [[point.train_loss for point in run.history] for run in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    adam = trained(programs["adam"], Budget(1, None, None), seed=4)
    assert losses[0][0] == adam.history[0].train_loss


def test_recorded_losses_are_those_of_all_images(small, programs, monkeypatch):
    monkeypatch.setattr(_train, "_EVALUATED_AT_ONCE", 30)  # 110 and 40 are no multiples
    _train._full_losses.clear_cache()
    run = trained(programs["adam"], Budget(1, None, None), seed=7)
    params, (train, test) = small.init(7), small.load(None)
    expected = small.test_loss(params, jnp.asarray(train)) + l2_term(params)
    np.testing.assert_allclose(run.history[0].train_loss, expected, rtol=1e-6)
    expected = small.test_loss(params, jnp.asarray(test))
    np.testing.assert_allclose(run.history[0].test_loss, expected, rtol=1e-6)


def test_epoch_takes_no_image_twice_and_leaves_others_out_next_time(programs):
    program = programs["adam"]
    rng = np.random.default_rng(0)
    first, second = (np.asarray(program.shuffled_epoch(rng)) for _ in range(2))
    assert first.shape == (4, BATCH)
    assert len(np.unique(first)) == 100
    assert set(first.ravel()) != set(second.ravel())


def test_warm_start_sees_the_images_of_one_epoch_once(small, programs):
    batches = list(programs["adam"].batches())
    assert [len(batch) for batch in batches] == [BATCH] * 4
    np.testing.assert_array_equal(jnp.concatenate(batches), small.load(None).train[:100])


def test_step_trains_on_the_images_that_the_epoch_names(small):
    seen = Recipe(lambda params, batches: 0.0, lambda p, s, images: (p, s + images.sum(), s))
    program = compiled(small, seen)
    order = program.shuffled_epoch(np.random.default_rng(0))
    _, total, _ = program.step(small.init(0), 0.0, program.train, order, 2)
    np.testing.assert_allclose(total, program.train[order[2]].sum(), rtol=1e-6)


def test_seconds_end_a_run_within_an_epoch(programs):
    program = programs["adam"]
    slow = lambda *args: time.sleep(0.05) or program.step(*args)
    run = trained(program._replace(step=slow), Budget(None, 0.28, None))
    assert 4 < run.steps <= 6
    assert run.history[-1].epochs == run.steps / 4
    assert run.history[-1].seconds == run.seconds >= 0.28


def test_evaluation_is_not_timed_and_the_start_is(small, monkeypatch):
    adam = METHODS["adam"].build(small, 1e-2, {})

    def slow_start(params, batches):
        time.sleep(0.2)
        return adam.init(params, batches)

    program = compiled(small, Recipe(slow_start, adam.step))
    losses = _train._full_losses
    monkeypatch.setattr(_train, "_full_losses", lambda *args: time.sleep(0.3) or losses(*args))
    run = trained(program, Budget(1, None, None))
    assert 0.2 <= run.start_seconds <= run.seconds < 0.5
    assert run.history[0].seconds == run.start_seconds
    assert run.seconds_per_step < 0.05


def test_target_ends_a_run(programs):
    reference = trained(programs["adam"], Budget(6, None, None))
    target = reference.history[3].train_loss
    run = trained(programs["adam"], Budget(6, None, target))
    assert run.reached_target
    assert run.epochs == 3
    assert not trained(programs["adam"], Budget(2, None, target)).reached_target


def test_divergence_is_recorded_and_ends_the_run(small):
    program = compiled(small, METHODS["sgd"].build(small, 1e30, {}))
    run = trained(program, Budget(6, None, None))
    assert run.diverged_epoch == 1
    assert run.steps <= 4
    assert len(run.history) == 1
    assert run.finished


def test_divergence_in_the_last_step_of_an_epoch_is_found_by_the_evaluation(small):
    adam = METHODS["adam"].build(small, 1e-2, {})

    def step(params, opt_state, images):
        count, state = opt_state
        params, state, loss = adam.step(params, state, images)
        bad = jnp.where(count == 7, jnp.nan, 1.0)
        params = {k: {n: leaf * bad for n, leaf in v.items()} for k, v in params.items()}
        return params, (count + 1, state), loss

    init = lambda params, batches: (jnp.int32(0), adam.init(params, batches))
    run = trained(compiled(small, Recipe(init, step)), Budget(6, None, None))
    assert run.diverged_epoch == 2
    assert run.steps == 8
    assert len(run.history) == 2


def test_runs_report_every_step(programs):
    program = programs["sgd"]
    run = Run("sgd", 0, 1e-2, program.steps_per_epoch, program.compile_seconds)
    epochs = []
    train_method(program, run, Budget(2, None, None), on_step=lambda r: epochs.append(r.epochs))
    assert epochs == [i / 4 for i in range(1, 9)]
