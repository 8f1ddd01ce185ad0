# pyright: strict
# What JAX, Flax and Optax leave open in types of their own:
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
"""What users write, read by pyright and mypy in strict mode; nothing is run.

``assert_type`` says what the package promises; the rest must need no cast.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import kfqn_optax as kfqn

Params = Mapping[str, Any]
X = jnp.ones((8, 3))


class Batch(NamedTuple):
    image: jax.Array
    label: jax.Array


def linen_loop(model: nn.Module, variables: dict[str, Params], batch: Batch) -> float:
    layers = kfqn.find_layers(model, variables, batch.image)
    assert_type(layers, kfqn.Layers)
    widths: list[int] = [layer.out_dim for layer in layers]
    print(layers, len(layers), widths, layers["Dense_0"].rows)

    def loss_fn(params: Params, batch: Batch) -> jax.Array:
        outputs = model.apply({"params": params}, batch.image)
        assert isinstance(outputs, jax.Array)
        logits = kfqn.outputs(outputs, "categorical")
        assert_type(logits, jax.Array)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.label))

    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), kfqn.kfac(optax.cosine_decay_schedule(1.0, 100), layers)
    )

    @jax.jit
    def train_step(
        params: optax.Params, opt_state: optax.OptState, batch: Batch
    ) -> tuple[optax.Params, optax.OptState, jax.Array]:
        loss, grads, curvature = value_and_grad(params, batch)
        assert_type(loss, jax.Array)
        assert_type(curvature, kfqn.Curvature)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, loss

    params: optax.Params = variables["params"]
    opt_state = kfqn.warm_start(tx.init(params), value_and_grad, params, [batch])
    for _ in range(3):
        params, opt_state, loss = train_step(params, opt_state, batch)
        report = kfqn.diagnostics(opt_state)
        assert_type(report["damping"], jax.Array)
        assert_type(report["rule"], dict[str, jax.Array])
        assert_type(report["layers"]["Dense_0"]["output"]["norm"], jax.Array)
        print(float(loss), float(report["damping"]), int(report["rejected"]))
    return float(kfqn.diagnostics(opt_state)["share"])


def with_batch_statistics(model: nn.Module, params: Params, stats: Params) -> Params:
    def loss_fn(params: Params, stats: Params) -> tuple[jax.Array, Params]:
        outputs, changed = model.apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])
        assert isinstance(outputs, jax.Array)
        return jnp.mean(outputs**2), changed["batch_stats"]

    layers = kfqn.find_layers(model, {"params": params, "batch_stats": stats}, X, mutable=["batch_stats"])
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, has_aux=True)
    (loss, stats), grads, curvature = value_and_grad(params, stats)
    assert_type(loss, jax.Array)
    print(loss, curvature.value_at(grads), curvature.forms([grads]).matrix)
    return stats


def train_state(model: nn.Module, params: Params, layers: kfqn.Layers) -> kfqn.TrainState:
    def loss_fn(params: Params) -> jax.Array:
        outputs = model.apply({"params": params}, X)
        assert isinstance(outputs, jax.Array)
        return jnp.mean(outputs**2)

    tx = kfqn.kbfgs(0.3, layers)
    state = kfqn.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    _, grads, curvature = kfqn.value_and_grad(loss_fn, layers)(state.params)
    state = state.apply_gradients(grads=grads, curvature=curvature)
    assert_type(state, kfqn.TrainState)
    return state


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.tanh(self.first(x)))


def nnx_loop(batch: Batch) -> jax.Array:
    model = Net(nnx.Rngs(0))
    layers = kfqn.find_layers(model, batch.image)

    def loss_fn(model: Net, batch: Batch) -> jax.Array:
        return jnp.mean(kfqn.outputs(model(batch.image), "normal") ** 2)

    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=1)
    optimizer = nnx.Optimizer(model, kfqn.kfac(1.0, layers), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Net, optimizer: nnx.Optimizer[Net], batch: Batch) -> jax.Array:
        loss, grads, curvature = value_and_grad(model, batch)
        assert_type(loss, jax.Array)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    loss = train_step(model, optimizer, batch)
    print(kfqn.diagnostics(optimizer.opt_state)["damping"])
    return loss


class Halved(NamedTuple):
    made: jax.Array


def half() -> kfqn.StepRule:
    def init(params: optax.Params) -> Halved:
        del params
        return Halved(jnp.zeros([], jnp.int32))

    def propose(state: Halved, proposal: kfqn.Proposal) -> tuple[optax.Updates, Halved]:
        return proposal.direction, state

    def review(state: Halved, outcome: kfqn.Outcome) -> tuple[float, Halved]:
        assert_type(outcome.value, jax.Array)
        return 0.5, Halved(state.made + 1)

    return kfqn.StepRule(init, propose, review)


def custom_rule(layers: kfqn.Layers) -> optax.GradientTransformationExtraArgs:
    return kfqn.kfac(1.0, layers, step_rule=half())
