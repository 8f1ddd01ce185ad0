"""The rows of the coverage table: small models of every kind, each with a synthetic batch and a loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench import _coverage_models as models
from kfqn_optax.bench import _coverage_nnx as nnx_models
from kfqn_optax.bench._quick import quick_jit


class Problem(NamedTuple):
    """What one row trains.

    Attributes:
      loss_fn: ``(params, state) -> (loss, state)``; the batch is part of it.
      params, state: where training starts; the state is that of batch norm, or empty.
      layers: the layers found.
      forward: as in :func:`kfqn_optax.value_and_grad`.
      model: an NNX model to change in place, which ``loss_fn(model)`` takes instead of params and state.
    """

    loss_fn: Callable[..., tuple[jax.Array, Any]]
    params: Any
    state: Any
    layers: kfqn.Layers
    forward: Callable[[Any, Any], Any] | None = None
    model: nnx.Module | None = None


def supervised(model: Any, x: jax.Array, error: Callable[[Any], jax.Array]) -> Problem:
    """A model on one batch; ``error`` takes its outputs."""
    return of_nnx(model, x, error) if isinstance(model, nnx.Module) else of_linen(model, x, error)


def of_linen(model: nn.Module, x: jax.Array, error: Callable[[Any], jax.Array]) -> Problem:
    variables = quick_jit(model.init)(jax.random.key(0), x)
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss_fn(params, state):
        outputs, state = model.apply({"params": params, **state}, x, mutable=list(state))
        return error(outputs), state

    return Problem(loss_fn, params, state, kfqn.find_layers(model, variables, x, mutable=list(state)))


def of_nnx(model: nnx.Module, x: jax.Array, error: Callable[[Any], jax.Array]) -> Problem:
    """The functional style of NNX; the state is what is no parameter."""
    graphdef, params, state = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, state):
        model = kfqn.merge(graphdef, params, state)
        return error(model(x)), nnx.state(model, nnx.Not(nnx.Param))

    return Problem(loss_fn, params, state, kfqn.find_layers(model, x))


def labelled(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def classifier(model: Any, *shape: int) -> Problem:
    """One of four classes for each example, by how large its first numbers are."""
    x = jax.random.normal(jax.random.key(1), (32, *shape))
    score = x.reshape(32, -1)[:, :2]
    labels = (score[:, 0] > 0) + 2 * (score[:, 1] > 0)
    return supervised(model, x, lambda outputs: labelled(outputs.astype(jnp.float32), labels))


def language(model: Any) -> Problem:
    """The next of 12 tokens in sequences that count upwards in steps of 1, 2 or 3."""
    start = jnp.arange(16)[:, None]
    ids = (start + (1 + start % 3) * jnp.arange(9)[None]) % 12
    return supervised(model, ids[:, :-1], lambda outputs: labelled(outputs, ids[:, 1:]))


def images(model: Any) -> Problem:
    """Images of 8x8 waves from their two amplitudes."""
    codes, grid = jax.random.normal(jax.random.key(1), (32, 2)), jnp.arange(8)
    basis = jnp.stack([jnp.sin(grid[:, None] + grid[None]), jnp.cos(grid[:, None] - grid[None])])
    waves = jnp.tensordot(codes, basis, 1)
    return supervised(model, codes, lambda outputs: jnp.mean((outputs[..., 0] - waves) ** 2))


def autoencoder() -> Problem:
    x = (jax.random.uniform(jax.random.key(1), (32, 4)) > 0.5).astype(jnp.float32).repeat(6, axis=1)
    widths = [12, 4, 12]
    parts = [part for width in widths for part in (nn.Dense(width), nn.relu)]
    error = lambda outputs: optax.sigmoid_binary_cross_entropy(outputs, x).sum(-1).mean()
    return supervised(nn.Sequential([*parts, nn.Dense(24)]), x, error)


def poisson(forward_mode: bool) -> Problem:
    """u'' + pi^2 sin(pi x) = 0 with u(0) = u(1) = 0."""
    parts = [nn.Dense(12), nn.tanh, nn.Dense(12), nn.tanh, nn.Dense(1)]
    model, points = nn.Sequential(parts), jnp.linspace(0, 1, 20)
    variables = quick_jit(model.init)(jax.random.key(0), points[:1])

    def u(params, x):
        return x * (1 - x) * model.apply({"params": params}, x[None])[0]

    second = jax.hessian(u, 1) if forward_mode else jax.grad(jax.grad(u, 1), 1)

    def loss_fn(params, state):
        residual = jax.vmap(second, (None, 0))(params, points) + jnp.pi**2 * jnp.sin(jnp.pi * points)
        return jnp.mean(kfqn.outputs(residual, "normal") ** 2), state

    def forward(params, state):
        del state
        return jax.vmap(u, (None, 0))(params, points)

    layers = kfqn.find_layers(model, variables, points[:1])
    problem = Problem(loss_fn, variables["params"], {}, layers)
    return problem._replace(forward=forward) if forward_mode else problem


def in_place(rngs: nnx.Rngs) -> Problem:
    """A regression by a model that changes in place."""
    model, x = nnx_models.normed_mlp(rngs), jax.random.normal(jax.random.key(1), (32, 8))
    loss_fn = lambda model: (jnp.mean((model(x) - jnp.sin(2 * x[:, :4])) ** 2), None)
    return Problem(loss_fn, nnx.state(model, nnx.Param), {}, kfqn.find_layers(model, x), model=model)


NNX_ROWS: dict[str, Callable[[nnx.Rngs], Problem]] = {
    "MLP": lambda rngs: classifier(nnx_models.mlp(rngs), 8),
    "CNN, batch norm": lambda rngs: classifier(nnx_models.normed(rngs), 6, 6, 2),
    "ConvTranspose decoder": lambda rngs: images(nnx_models.decoder(rngs)),
    "LinearGeneral and Einsum heads": lambda rngs: classifier(nnx_models.heads(rngs), 6),
    "GRU": lambda rngs: language(nnx_models.Recurrent(rngs)),
    "transformer block": lambda rngs: language(
        nnx_models.Transformer(rngs, nnx_models.Block(rngs), nnx_models.called)
    ),
    "transformer, nnx.scan over 3": lambda rngs: language(
        nnx_models.Transformer(rngs, nnx_models.stacked(nnx_models.Block, 3), nnx_models.scanned)
    ),
    "transformer, nnx.scan of nnx.remat": lambda rngs: language(
        nnx_models.Transformer(rngs, nnx_models.stacked(nnx_models.Block, 3), nnx_models.scanned_remat)
    ),
    "ensemble, nnx.vmap over 3": lambda rngs: classifier(nnx_models.Ensemble(), 8),
    "MLP, batch norm, nnx.Optimizer in nnx.jit": in_place,
}
ROWS: dict[str, Callable[[], Problem]] = {
    "MLP": lambda: classifier(models.mlp(), 8),
    "autoencoder": autoencoder,
    "MLP in bfloat16": lambda: classifier(models.mlp(dtype=jnp.bfloat16), 8),
    "CNN, batch norm": lambda: classifier(models.normed(), 6, 6, 2),
    "CNN, depthwise, group norm": lambda: classifier(models.depthwise(), 6, 6, 2),
    "CNN 1D, causal and dilated": lambda: classifier(
        models.cnn(models.causal(1), nn.relu, models.causal(2)), 12, 2
    ),
    "CNN 3D, circular, groups": lambda: classifier(models.cube(), 3, 3, 3, 2),
    "ConvTranspose decoder": lambda: images(models.decoder()),
    "DenseGeneral and Einsum heads": lambda: classifier(models.Heads(), 6),
    "transformer block": lambda: language(models.Transformer()),
    "transformer, tied head": lambda: language(models.Transformer(tied=True)),
    "transformer, nn.scan over 3": lambda: language(models.Transformer(models.scanned(models.Block))),
    "transformer, nn.scan of nn.remat": lambda: language(
        models.Transformer(models.scanned(nn.remat(models.Block)))
    ),
    "LSTM": lambda: language(models.Recurrent(nn.LSTMCell)),
    "GRU": lambda: language(models.Recurrent(nn.GRUCell)),
    "ensemble, nn.vmap over 3": lambda: classifier(models.Ensemble(), 8),
    "layer shared three times": lambda: classifier(models.Shared(), 8),
    "WeightNorm, ConvLocal, Dense": lambda: classifier(models.Partly(), 8),
    "PINN, grad of grad": lambda: poisson(forward_mode=False),
    "PINN, hessian": lambda: poisson(forward_mode=True),
    **{f"NNX: {name}": lambda row=row: row(nnx.Rngs(0)) for name, row in NNX_ROWS.items()},
}
