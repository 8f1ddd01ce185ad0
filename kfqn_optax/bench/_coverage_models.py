"""The models of the coverage table, small."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def mlp(**options: Any) -> nn.Module:
    return nn.Sequential([nn.Dense(16, **options), nn.tanh, nn.Dense(16, **options), nn.tanh, nn.Dense(4)])


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def cnn(*parts: Any) -> nn.Module:
    return nn.Sequential([*parts, nn.relu, flat, nn.Dense(4)])


def normed() -> nn.Module:
    norm = nn.BatchNorm(use_running_average=False)
    return cnn(nn.Conv(8, (3, 3)), norm, nn.relu, nn.Conv(8, (3, 3), 2))


def causal(dilation: int) -> nn.Module:
    return nn.Conv(8, 3, kernel_dilation=dilation, padding="CAUSAL")


def depthwise() -> nn.Module:
    each = nn.Conv(8, (3, 3), feature_group_count=8)
    return cnn(nn.Conv(8, (3, 3)), nn.relu, each, nn.Conv(8, (1, 1)), nn.GroupNorm(4))


def cube() -> nn.Module:
    grouped = nn.Conv(8, (2, 2, 2), feature_group_count=2)
    return cnn(nn.Conv(4, (2, 2, 2), padding="CIRCULAR"), nn.relu, grouped)


def decoder() -> nn.Module:
    grid = lambda x: x.reshape(-1, 4, 4, 4)
    up = nn.ConvTranspose(4, (3, 3), strides=(2, 2))
    return nn.Sequential([nn.Dense(64), nn.tanh, grid, up, nn.tanh, nn.Conv(1, (3, 3))])


class Heads(nn.Module):
    """A kernel for every head by DenseGeneral and Einsum."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.DenseGeneral((2, 4))(x))
        x = nn.tanh(nn.Einsum((2, 4, 4), "bhi,hij->bhj")(x))
        x = nn.tanh(nn.DenseGeneral(4, batch_dims=(0,))(x.swapaxes(0, 1)).swapaxes(0, 1))
        return nn.DenseGeneral(4, axis=(-2, -1))(x)


class Block(nn.Module):
    """Attention and a feed-forward layer, in the form of a scan's body."""

    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """Blocks between an embedding and a head; the head is the embedding again where it is tied."""

    body: Any = Block
    tied: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(12, 16)
        position = self.param("position", nn.initializers.normal(0.1), (ids.shape[1], 16))
        x, _ = self.body()(embed(ids) + position[None], None)
        x = nn.LayerNorm()(x)
        return embed.attend(x) if self.tied else nn.Dense(12)(x)


def scanned(body: Any) -> Any:
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)


class Recurrent(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, ids):
        return nn.Dense(12)(nn.RNN(self.cell(16))(nn.Embed(12, 8)(ids)))


class Ensemble(nn.Module):
    """Three networks side by side; the logits are their mean."""

    @nn.compact
    def __call__(self, x):
        split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        member = nn.vmap(nn.Dense, in_axes=-2, out_axes=-2, **split)
        x = jnp.stack([x] * 3, axis=-2)
        return member(4)(nn.tanh(member(16)(x))).mean(-2)


class Shared(nn.Module):
    """The same layer three times over."""

    @nn.compact
    def __call__(self, x):
        layer, x = nn.Dense(16), nn.Dense(16)(x)
        for _ in range(3):
            x = nn.tanh(layer(x))
        return nn.Dense(4)(x)


class Partly(nn.Module):
    """Layers without a rule before and between layers with one."""

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(16))(x)
        return nn.Dense(4)(nn.tanh(nn.ConvLocal(8, 3)(nn.tanh(x)[..., None]).reshape(x.shape[0], -1)))
