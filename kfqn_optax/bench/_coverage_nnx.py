"""The NNX models of the coverage table, small."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def stacked(make: Callable[[nnx.Rngs], Any], copies: int) -> Any:
    """The module ``make(rngs)``, with copies stacked along the first axis of every variable."""
    keys = jax.random.split(jax.random.key(2), copies)
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def mlp(rngs: nnx.Rngs) -> nnx.Module:
    first, second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
    return nnx.Sequential(first, nnx.tanh, second, nnx.tanh, nnx.Linear(16, 4, rngs=rngs))


def normed_mlp(rngs: nnx.Rngs) -> nnx.Module:
    first, norm = nnx.Linear(8, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
    return nnx.Sequential(first, norm, nnx.tanh, nnx.Linear(16, 4, rngs=rngs))


def normed(rngs: nnx.Rngs) -> nnx.Module:
    conv = lambda n_in, strides: nnx.Conv(n_in, 8, (3, 3), strides=strides, rngs=rngs)
    flat = lambda x: x.reshape(x.shape[0], -1)
    parts = [conv(2, 1), nnx.BatchNorm(8, rngs=rngs), nnx.relu, conv(8, 2), nnx.relu, flat]
    return nnx.Sequential(*parts, nnx.Linear(72, 4, rngs=rngs))


def decoder(rngs: nnx.Rngs) -> nnx.Module:
    grid = lambda x: x.reshape(-1, 4, 4, 4)
    up = nnx.ConvTranspose(4, 4, (3, 3), strides=(2, 2), rngs=rngs)
    last = nnx.Conv(4, 1, (3, 3), rngs=rngs)
    return nnx.Sequential(nnx.Linear(2, 64, rngs=rngs), nnx.tanh, grid, up, nnx.tanh, last)


def heads(rngs: nnx.Rngs) -> nnx.Module:
    """A kernel for every head by LinearGeneral and Einsum."""
    split = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
    each = nnx.Einsum("bhi,hij->bhj", (2, 4, 4), (2, 4), rngs=rngs)
    join = nnx.LinearGeneral((2, 4), 4, axis=(-2, -1), rngs=rngs)
    return nnx.Sequential(split, nnx.tanh, each, nnx.tanh, join)


class Block(nnx.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(16, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """``run(body, x)`` between an embedding and a head."""

    def __init__(self, rngs: nnx.Rngs, body: Any, run: Callable[[Any, Any], Any]):
        self.embed = nnx.Embed(12, 16, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (8, 16)))
        self.body, self.run = body, run
        self.norm, self.head = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 12, rngs=rngs)

    def __call__(self, ids):
        x = self.run(self.body, self.embed(ids) + self.position[...][None])
        return self.head(self.norm(x))


def called(body: Any, x: jax.Array) -> jax.Array:
    return body(x)


def scanned(blocks: Any, x: jax.Array, call: Callable[[Any, Any], Any] = called) -> jax.Array:
    return nnx.scan(lambda x, block: call(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


def scanned_remat(blocks: Any, x: jax.Array) -> jax.Array:
    return scanned(blocks, x, nnx.remat(called))


class Recurrent(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.rnn = nnx.Embed(12, 8, rngs=rngs), nnx.RNN(nnx.GRUCell(8, 16, rngs=rngs))
        self.head = nnx.Linear(16, 12, rngs=rngs)

    def __call__(self, ids):
        hidden: Any = self.rnn(self.embed(ids))
        return self.head(hidden)


class Ensemble(nnx.Module):
    """Three networks side by side; the logits are their mean."""

    def __init__(self):
        self.members = stacked(mlp, 3)

    def __call__(self, x):
        return nnx.vmap(called, in_axes=(0, None))(self.members, x).mean(0)
