"""The paper's three problems: the source of the images, the widths of the layers, the loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kfqn_optax as kfqn
from kfqn_optax.bench._curves import load_curves
from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._faces import load_faces
from kfqn_optax.bench._mnist import load_mnist
from kfqn_optax.bench._models import (
    DISTRIBUTIONS,
    Autoencoder,
    ImageLoss,
    Tree,
    cross_entropy,
    half_squared_error,
    l2_term,
)


class Problem(NamedTuple):
    """A data set, an autoencoder (widths from the image to the code) and the loss of one image."""

    load: Callable[[Path | None], Dataset]
    widths: tuple[int, ...]
    image_loss: ImageLoss

    @property
    def model(self) -> Autoencoder:
        return Autoencoder(self.widths)

    def init(self, seed: int) -> Tree:
        """Parameters to start from; the same for every method that is given this seed."""
        example = jnp.zeros((1, self.widths[0]), jnp.float32)
        return self.model.init(jax.random.key(seed), example)["params"]

    def train_loss(self, params: Tree, images: jax.Array) -> jax.Array:
        """Mean loss of a batch, with the L2 term: what the methods minimise."""
        return self.test_loss(params, images) + l2_term(params)

    def test_loss(self, params: Tree, images: jax.Array) -> jax.Array:
        """Mean loss of a batch, without the L2 term."""
        outputs: Any = self.model.apply({"params": params}, images)
        marked = kfqn.outputs(outputs, DISTRIBUTIONS.get(self.image_loss))
        return self.image_loss(marked, images).mean()


PROBLEMS = {
    "curves": Problem(load_curves, (784, 400, 200, 100, 50, 25, 6), cross_entropy),
    "mnist": Problem(load_mnist, (784, 1000, 500, 250, 30), cross_entropy),
    "faces": Problem(load_faces, (625, 2000, 1000, 500, 30), half_squared_error),
}
