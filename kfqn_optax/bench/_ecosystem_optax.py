"""The rows of the ecosystem table about Optax: what goes around, before and behind a method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from kfqn_optax.bench._ecosystem_problem import (
    LEARNING_RATE,
    STATIC,
    Losses,
    Problem,
    loss_fn,
    scanned,
    train,
)


class Row(NamedTuple):
    """One thing that users do.

    Attributes:
      use: does it.
      how: what to know of it, or what to do instead.
      instead: does what ``how`` says.
    """

    use: Callable[[Problem], Losses]
    how: str = ""
    instead: Callable[[Problem], Losses] | None = None


KERNEL = {"kernel": True, "bias": False}
BIAS = {"kernel": False, "bias": True}
LABELS = {"kernel": "kernel", "bias": "rest"}


def around(make: Callable[[Any], Any], **extra: Any) -> Callable[[Problem], Losses]:
    """Train with what ``make`` makes of the method."""
    return lambda problem: train(problem, make(problem.tx), **extra)


def before(*transformations: Any) -> Callable[[Problem], Losses]:
    return around(lambda tx: optax.chain(*transformations, tx))


def behind(*transformations: Any, **extra: Any) -> Callable[[Problem], Losses]:
    return around(lambda tx: optax.chain(tx, *transformations), **extra)


def rest_by(other: Any) -> Callable[[Problem], Losses]:
    return around(lambda tx: optax.partition({"kernel": tx, "rest": other}, LABELS))


def every_second(step: Any, **extra_args: Any) -> Any:
    del extra_args
    return step % 2 == 0


def every_other(step: Any, **extra_args: Any) -> Any:
    del extra_args
    return step % 2 == 1


def injected(factory: Callable[..., Any], learning_rate: Any) -> Callable[[Problem], Losses]:
    def use(problem):
        make = factory(problem.make, static_args=STATIC[problem.method])
        return train(problem, make(learning_rate=learning_rate, layers=problem.layers))

    return use


def skip_large(updates, count, params):
    return optax.skip_large_updates(updates, count, params, max_squared_norm=1e6)


def steps_of_two(problem: Problem, **settings: Any) -> Losses:
    return train(problem, optax.MultiSteps(problem.tx, 2, **settings).gradient_transformation())


def slow_weights(problem: Problem) -> Losses:
    """Lookahead by hand: every 5 steps halfway back to the slow parameters."""

    def step(carry, count):
        params, state, slow, count = carry
        loss, grads, curvature = problem.value_and_grad(params, problem.x)
        updates, state = problem.tx.update(grads, state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        due = count % 5 == 4
        moved = optax.incremental_update(params, slow, 0.5)
        params, slow = optax.tree.where(due, (moved, moved), (params, slow))
        return (params, state, slow, count + 1), loss

    params = problem.params
    start = (params, problem.tx.init(params), params, jnp.zeros([], jnp.int32))
    return scanned(problem, step, start, lambda params, *_: params)


def averaged(problem: Problem) -> Losses:
    """The loss of the average of the parameters."""
    ema = optax.ema(0.8)

    def step(carry, _):
        params, state, average, ema_state = carry
        loss, grads, curvature = problem.value_and_grad(params, problem.x)
        updates, state = problem.tx.update(grads, state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        average, ema_state = ema.update(params, ema_state)
        return (params, state, average, ema_state), loss

    params = problem.params
    start = (params, problem.tx.init(params), params, ema.init(params))
    return scanned(problem, step, start, lambda params, state, average, ema_state: average)


def sharpness_aware(problem: Problem) -> Losses:
    """Gradient and curvature where the loss is larger, for the parameters."""

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss_fn)(params, problem.x)
        worse = optax.tree.add_scale(params, 0.01 / optax.tree.norm(grads), grads)
        loss, grads, curvature = problem.value_and_grad(worse, problem.x)
        updates, state = problem.tx.update(grads, state, worse, curvature=curvature)
        return (optax.apply_updates(params, updates), state), loss

    start = (problem.params, problem.tx.init(problem.params))
    return scanned(problem, step, start, lambda params, _: params)


def line_search(search: Any, takes_curvature: bool) -> Callable[[Problem], Losses]:
    def use(problem):
        plain = lambda params: loss_fn(params, problem.x)
        taking = lambda params, curvature: loss_fn(params, problem.x)
        given = {
            "value": lambda params, loss, grads: loss,
            "grad": lambda params, loss, grads: grads,
            "value_fn": lambda params, loss, grads: taking if takes_curvature else plain,
        }
        return train(problem, optax.chain(problem.tx, search), **given)

    return use


def without_extra_args(problem: Problem) -> Losses:
    """A wrapper of one's own that is a plain GradientTransformation."""
    plain: Any = problem.tx.update
    update = lambda updates, state, params=None: plain(updates, state, params)
    return train(
        problem, optax.with_extra_args_support(optax.GradientTransformation(problem.tx.init, update))
    )


def with_extra_args(problem: Problem) -> Losses:
    tx = problem.tx
    update = lambda updates, state, params=None, **extra: tx.update(updates, state, params, **extra)
    return train(problem, optax.GradientTransformationExtraArgs(tx.init, update))


def value(params: Any, loss: Any, grads: Any) -> Any:
    del params, grads
    return loss


SEARCHED = "its `value_fn` must take `curvature=` too; or leave it out: `step_rule=` searches already"
NOT_IN_STEPS = (
    "it makes steps of its own, which have another length: `step_rule=` and the learning rate do that"
)
OPTAX: Mapping[str, Row] = {
    "chain: `clip_by_global_norm` before": Row(before(optax.clip_by_global_norm(1.0))),
    "`named_chain`": Row(around(lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)))),
    "`partition` (`multi_transform`), the rest by `adam`": Row(rest_by(optax.adam(0.1))),
    "`masked`": Row(
        around(
            lambda tx: optax.chain(optax.masked(tx, KERNEL), optax.masked(optax.sgd(LEARNING_RATE), BIAS))
        ),
        "the others pass as gradients: give them something of their own, as here, or use `partition`",
    ),
    "`freeze` behind": Row(
        behind(optax.freeze(BIAS)), "better `selective_transform`: the method then knows"
    ),
    "`selective_transform`": Row(around(lambda tx: optax.selective_transform(tx, freeze_mask=BIAS))),
    "`inject_hyperparams`": Row(
        injected(optax.inject_hyperparams, LEARNING_RATE),
        '`static_args=` `"groups"` (kbfgs, kfqn), `"memory"` (kbfgs_l), a given `"statistics_rows"` (kfac)',
    ),
    "`inject_stateful_hyperparams`": Row(
        injected(optax.inject_stateful_hyperparams, optax.exponential_decay(LEARNING_RATE, 30, 0.5)),
        "as above",
    ),
    "schedule as learning rate": Row(
        lambda problem: train(
            problem, problem.make(optax.cosine_decay_schedule(LEARNING_RATE, 60), problem.layers)
        )
    ),
    "`scale_by_schedule` behind": Row(
        behind(optax.scale_by_schedule(lambda count: 0.9)),
        "better the method's `learning_rate`: the step rule then knows",
    ),
    "`apply_if_finite`": Row(
        around(lambda tx: optax.apply_if_finite(tx, 3)), "not needed: such steps are left out, and counted"
    ),
    "`MultiSteps`": Row(steps_of_two, "the curvature is of the last small batch"),
    "`MultiSteps`, `skip_not_finite`": Row(
        lambda problem: steps_of_two(problem, should_skip_update_fn=optax.skip_not_finite)
    ),
    "`MultiSteps`, `skip_large_updates`": Row(
        lambda problem: steps_of_two(problem, should_skip_update_fn=skip_large)
    ),
    "`apply_every` behind": Row(
        behind(optax.apply_every(2)), "better `MultiSteps`, which averages gradients"
    ),
    "`conditionally_mask`": Row(around(lambda tx: optax.conditionally_mask(tx, every_second))),
    "`conditionally_transform`": Row(
        around(
            lambda tx: optax.chain(
                optax.conditionally_transform(tx, every_second),
                optax.conditionally_transform(optax.sgd(0.1), every_other),
            )
        ),
        "steps in between pass as gradients, or what else is in the chain",
    ),
    "`flatten`": Row(
        around(optax.flatten),
        "inside the chain, around the others",
        before(optax.flatten(optax.clip_by_global_norm(1.0))),
    ),
    "`lookahead`": Row(
        around(lambda tx: optax.lookahead(tx, 5, 0.5)),
        "`incremental_update` every few steps, in the train step",
        slow_weights,
    ),
    "`scale_by_backtracking_linesearch`": Row(
        line_search(optax.scale_by_backtracking_linesearch(10), takes_curvature=False),
        SEARCHED,
        line_search(optax.scale_by_backtracking_linesearch(10), takes_curvature=True),
    ),
    "`scale_by_zoom_linesearch`": Row(
        line_search(optax.scale_by_zoom_linesearch(10), takes_curvature=False),
        SEARCHED,
        line_search(optax.scale_by_zoom_linesearch(10), takes_curvature=True),
    ),
    "`scale_by_polyak` behind": Row(behind(optax.scale_by_polyak(), value=value), "give it `value=loss`"),
    "`clip`, `clip_by_block_rms` before": Row(before(optax.clip(1.0), optax.clip_by_block_rms(1.0))),
    "`adaptive_grad_clip` before": Row(before(optax.adaptive_grad_clip(0.1))),
    "`zero_nans` before": Row(before(optax.zero_nans())),
    "`centralize` before": Row(before(optax.centralize())),
    "`add_noise` before": Row(before(optax.add_noise(0.01, 0.55, key=0))),
    "`normalize_by_update_norm` behind": Row(
        behind(optax.normalize_by_update_norm(0.1)), "all steps are as long"
    ),
    "`ema` behind": Row(
        behind(optax.ema(0.5)), "better the method's `momentum=`: the step rule then knows"
    ),
    "`ema` of the parameters": Row(averaged),
    "`keep_params_nonnegative` behind": Row(behind(optax.keep_params_nonnegative())),
    "a wrapper that is a plain `GradientTransformation`": Row(
        without_extra_args, "make it a `GradientTransformationExtraArgs`", with_extra_args
    ),
}
CONTRIB: Mapping[str, Row] = {
    "`schedule_free`": Row(
        lambda problem: train(
            problem,
            optax.contrib.schedule_free(problem.tx, LEARNING_RATE, b1=0.9),
            evaluated=optax.contrib.schedule_free_eval_params,
        ),
    ),
    "`reduce_on_plateau` behind": Row(
        behind(optax.contrib.reduce_on_plateau(patience=5), value=value), "give it `value=loss`"
    ),
    "`muon` for the rest": Row(rest_by(optax.contrib.muon(0.1)), "by `partition`"),
    "`dog` for the rest": Row(rest_by(optax.contrib.dog()), "by `partition`"),
    "`prodigy` for the rest": Row(rest_by(optax.contrib.prodigy()), "by `partition`"),
    "`mechanize`": Row(around(optax.contrib.mechanize), NOT_IN_STEPS),
    "`dog` behind": Row(behind(optax.contrib.dog()), NOT_IN_STEPS),
    "`prodigy` behind": Row(behind(optax.contrib.prodigy()), NOT_IN_STEPS),
    "`sam`": Row(
        around(lambda tx: optax.contrib.sam(tx, optax.sgd(0.01))),
        "take `value_and_grad` at the worse parameters, and update the others",
        sharpness_aware,
    ),
    "`normalize` before": Row(before(optax.contrib.normalize())),
    "`differentially_private_aggregate` before": Row(
        before(optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0)),
        "it takes a gradient of each example, the methods the mean",
    ),
    "`split_real_and_imaginary`": Row(
        around(optax.contrib.split_real_and_imaginary), "there are no complex parameters in a layer"
    ),
}
