"""The rows of the ecosystem table about Flax, JAX, checkpoints and logs."""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.training.train_state
import jax
import optax
import orbax.checkpoint
from flax import nnx
from jax.sharding import PartitionSpec

import kfqn_optax as kfqn
from kfqn_optax.bench._ecosystem_optax import Row
from kfqn_optax.bench._ecosystem_problem import STEPS, Losses, Problem, error_of, looped, loss_fn, train
from kfqn_optax.bench._quick import quick_jit


def train_state(problem: Problem, kind: Any, **given: Any) -> Losses:
    @quick_jit
    def step(state):
        loss, grads, curvature = problem.value_and_grad(state.params, problem.x)
        more = {"curvature": curvature} if kind is kfqn.TrainState else {}
        return state.apply_gradients(grads=grads, **more), loss

    return looped(step, (kind.create(apply_fn=None, params=problem.params, tx=problem.tx),))


def step_of(problem: Problem, value_and_grad: Any = None) -> Any:
    """``step(params, state, x) -> (params, state, loss)``."""
    value_and_grad = value_and_grad or problem.value_and_grad

    def step(params, state, x):
        loss, grads, curvature = value_and_grad(params, x)
        updates, state = problem.tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    return step


def start_of(problem: Problem) -> tuple[Any, Any]:
    return problem.params, problem.tx.init(problem.params)


def jitted(problem: Problem, **settings: Any) -> Losses:
    step = quick_jit(step_of(problem), **settings)
    params, state = jax.tree.map(lambda leaf: leaf.copy(), start_of(problem))
    return looped(lambda params, state: step(params, state, problem.x), (params, state))


def mapped(problem: Problem) -> Losses:
    """Each device has its part of the batch."""
    value_and_grad = kfqn.value_and_grad(loss_fn, problem.layers, batch_argnums=1, axis_name="devices")
    step = jax.pmap(step_of(problem, value_and_grad), axis_name="devices")
    count = jax.local_device_count()
    parts = problem.x.reshape(count, -1, problem.x.shape[1])
    start = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * count), start_of(problem))
    return looped(lambda params, state: step(params, state, parts), start)


def sharded(problem: Problem, check: bool) -> Losses:
    whole, parts = PartitionSpec(), PartitionSpec("devices")
    if check:
        mean = lambda params, x: jax.lax.pmean(loss_fn(params, x), "devices")
        value_and_grad = kfqn.value_and_grad(mean, problem.layers, batch_argnums=1)
    else:
        value_and_grad = kfqn.value_and_grad(loss_fn, problem.layers, batch_argnums=1, axis_name="devices")
    step = jax.shard_map(
        step_of(problem, value_and_grad),
        mesh=jax.make_mesh((jax.device_count(),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(whole, whole, parts),
        out_specs=whole,
        check_vma=check,
    )
    step = quick_jit(step)
    return looped(lambda params, state: step(params, state, problem.x), start_of(problem))


def several_at_once(problem: Problem) -> Losses:
    """Two trainings side by side."""
    step = quick_jit(jax.vmap(step_of(problem), in_axes=(0, 0, None)))
    start = jax.tree.map(lambda leaf: jax.numpy.stack([leaf, leaf]), start_of(problem))
    return looped(lambda params, state: step(params, state, problem.x), start)


def in_two_halves(problem: Problem, through: Any) -> Losses:
    """The state is written and read between two trainings."""
    step = quick_jit(step_of(problem))
    abstract = jax.eval_shape(lambda: start_of(problem))
    counts = iter(range(STEPS))

    def interrupted(params, state):
        if next(counts) == STEPS // 2:
            params, state = through((params, state), abstract)
        return step(params, state, problem.x)

    return looped(interrupted, start_of(problem))


def by_orbax(tree: Any, abstract: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder) / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(Path(folder) / "state", abstract)


def by_bytes(tree: Any, abstract: Any) -> Any:
    return flax.serialization.from_bytes(abstract, flax.serialization.to_bytes(tree))


def logged(problem: Problem) -> Losses:
    """Every number of the diagnostics, as ``writer.add_scalar(name, value, step)`` takes them."""
    written: dict[str, float] = {}

    def step(params, state):
        params, state, loss = jit_step(params, state, problem.x)
        for path, value in jax.tree.leaves_with_path(kfqn.diagnostics(state)):
            written[jax.tree_util.keystr(path, simple=True, separator="/")] = float(value)
        return params, state, loss

    jit_step = quick_jit(step_of(problem))
    losses = looped(step, start_of(problem))
    if written["count"] != STEPS or "layers/./input/taken" not in written:
        raise AssertionError(f"the log has {written}")
    return losses


def model_loss(model: Any, x: jax.Array) -> jax.Array:
    return error_of(model(x), x)


def nnx_parts(problem: Problem) -> tuple[Any, Any, Any]:
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layers = kfqn.find_layers(model, problem.x)
    optimizer = nnx.Optimizer(model, problem.make(1.0, layers), wrt=nnx.Param)
    return model, optimizer, kfqn.value_and_grad(model_loss, layers, batch_argnums=1)


def nnx_step(value_and_grad: Any, x: jax.Array, model: Any, optimizer: Any) -> jax.Array:
    loss, grads, curvature = value_and_grad(model, x)
    optimizer.update(model, grads, curvature=curvature)
    return loss


def nnx_optimizer(problem: Problem) -> Losses:
    model, optimizer, value_and_grad = nnx_parts(problem)
    step = nnx.jit(functools.partial(nnx_step, value_and_grad, problem.x))
    losses = [step(model, optimizer) for _ in range(STEPS)]
    return Losses(float(losses[0]), float(losses[-1]))


def nnx_scan(problem: Problem) -> Losses:
    model, optimizer, value_and_grad = nnx_parts(problem)

    @nnx.scan(in_axes=nnx.Carry, out_axes=(nnx.Carry, 0), length=STEPS)
    def steps(carry):
        return carry, nnx_step(value_and_grad, problem.x, *carry)

    _, losses = nnx.jit(lambda model, optimizer: steps((model, optimizer)))(model, optimizer)
    return Losses(float(losses[0]), float(losses[-1]))


def nnx_without_curvature(problem: Problem) -> Losses:
    model, optimizer, value_and_grad = nnx_parts(problem)

    @nnx.jit
    def step(model, optimizer):
        loss, grads, _ = value_and_grad(model, problem.x)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(STEPS)]
    return Losses(float(losses[0]), float(losses[-1]))


FLAX: Mapping[str, Row] = {
    "`flax.training.train_state.TrainState`": Row(
        lambda problem: train_state(problem, flax.training.train_state.TrainState),
        "`kfqn.TrainState`",
        lambda problem: train_state(problem, kfqn.TrainState),
    ),
    "`nnx.Optimizer` in `nnx.jit`": Row(nnx_optimizer),
    "`nnx.Optimizer.update(model, grads)`": Row(
        nnx_without_curvature, "as above: `optimizer.update(model, grads, curvature=curvature)`"
    ),
    "`nnx.scan` over steps": Row(nnx_scan),
    "`flax.serialization`": Row(lambda problem: in_two_halves(problem, by_bytes)),
    "`orbax.checkpoint`": Row(lambda problem: in_two_halves(problem, by_orbax)),
    "TensorBoard, clu and the like": Row(
        logged, "each leaf of `kfqn.diagnostics(opt_state)` under the name that `keystr` gives its path"
    ),
}
JAX: Mapping[str, Row] = {
    "`jit`": Row(jitted),
    "`jit`, parameters and state donated": Row(lambda problem: jitted(problem, donate_argnums=(0, 1))),
    "`lax.scan` over steps": Row(lambda problem: train(problem, problem.tx)),
    "`vmap` over trainings": Row(several_at_once),
    "`pmap`": Row(mapped, "`value_and_grad(..., axis_name=...)`"),
    "`shard_map`": Row(
        lambda problem: sharded(problem, check=True), "the loss returns `jax.lax.pmean(loss, axis)`"
    ),
    "`shard_map(check_vma=False)`": Row(
        lambda problem: sharded(problem, check=False), "`value_and_grad(..., axis_name=...)`"
    ),
}
