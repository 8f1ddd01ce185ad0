"""The paper's autoencoder, its two losses, and the starts of PyTorch and Flax."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

L2 = 1e-5

Tree = Any  # of arrays: parameters, or the state of an optimizer
ImageLoss = Callable[[jax.Array, jax.Array], jax.Array]


def torch_dense(fan_in: int, width: int, dtype: Any = None) -> nn.Dense:
    """A layer with kernel and bias uniform in +-1/sqrt(fan_in), as ``torch.nn.Linear`` starts."""

    def uniform(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(width, kernel_init=uniform, bias_init=uniform, dtype=dtype)


def flax_dense(fan_in: int, width: int) -> nn.Dense:
    """A layer that starts as Flax's do: a normal kernel with variance 1/fan_in, no bias."""
    del fan_in
    return nn.Dense(width)


class Autoencoder(nn.Module):
    """Dense layers of the given widths down to the code and mirrored back up to the image.

    The activation is after every layer but the code and the output, which are linear.
    """

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dense: Callable[[int, int], nn.Dense] = torch_dense

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        outputs = self.widths[1:] + self.widths[-2::-1]
        linear = {len(self.widths) - 2, len(outputs) - 1}
        x = images
        for index, width in enumerate(outputs):
            x = self.dense(x.shape[-1], width)(x)
            x = x if index in linear else self.activation(x)
        return x


def cross_entropy(outputs: jax.Array, images: jax.Array) -> jax.Array:
    """Sigmoid cross entropy of each image, summed over its pixels."""
    return optax.sigmoid_binary_cross_entropy(outputs, images).sum(axis=-1)


def half_squared_error(outputs: jax.Array, images: jax.Array) -> jax.Array:
    """Half the squared error of each image, summed over its pixels."""
    return optax.l2_loss(outputs, images).sum(axis=-1)


# Of which each loss is the negative log-likelihood.
DISTRIBUTIONS: dict[Any, str] = {cross_entropy: "bernoulli", half_squared_error: "normal"}


def l2_term(params: Tree) -> jax.Array:
    """What the training loss adds: L2/2 times the squared norm of all kernels and biases."""
    return 0.5 * L2 * jnp.asarray(optax.tree.vdot(params, params))
