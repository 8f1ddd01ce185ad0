"""What a problem is: a loss, where to start, and data to train and to test on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._models import Tree

EVALUATED, AT_ONCE = 5_000, 1_000  # training examples over which the training loss is evaluated, at most


class Task(NamedTuple):
    """One problem, for any method.

    Attributes:
      init: ``seed -> (params, state)``; the state is that of batch norm, or empty.
      loss: ``(params, batch, state) -> (loss, state)``, the mean over the batch's examples.
      layers: the layers found in the model.
      train, test: trees of arrays, in all of which an example is a row.
      batch_size: examples in a step unless the user says otherwise.
      metric: what ``test_metric`` is called. Less is better.
      test_metric: ``(params, test, state) -> number``.
      forward: as in :func:`kfqn_optax.value_and_grad`, for a loss in forward mode.
      loss_unit: what a loss of 1 without any scaling is here.
    """

    init: Callable[[int], tuple[Tree, Tree]]
    loss: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]
    layers: kfqn.Layers
    train: Tree
    test: Tree
    batch_size: int
    metric: str
    test_metric: Callable[[Tree, Tree, Tree], jax.Array]
    forward: Callable[[Tree, Tree, Tree], jax.Array] | None = None
    loss_unit: float = 1.0

    @property
    def examples(self) -> int:
        return len(jax.tree.leaves(self.train)[0])

    def evaluation_batches(self) -> Tree:
        """A fixed part of the training set, (batches, size, ...), whatever the batch size in training."""
        size = min(AT_ONCE, self.examples)
        count = min(EVALUATED, self.examples) // size
        rows = np.random.default_rng(0).permutation(self.examples)[: count * size].reshape(count, size)
        return jax.tree.map(lambda array: jnp.asarray(array[rows]), self.train)

    def training_loss(self, params: Tree, state: Tree, batches: Tree) -> jax.Array:
        """The mean of what the methods minimise over ``batches``, in units of the unscaled loss."""
        losses = jax.lax.map(lambda batch: self.loss(params, batch, state)[0], batches)
        return losses.mean() / self.loss_unit


def linen_start(
    model: nn.Module, example: jax.Array, **call: Any
) -> tuple[Callable[[int], tuple[Tree, Tree]], kfqn.Layers]:
    """``Task.init`` and ``Task.layers`` of a model that is called with ``example`` and ``call``."""

    @jax.jit
    def variables_of(key: jax.Array) -> Tree:
        return model.init(key, example, **call)

    def init(seed: int) -> tuple[Tree, Tree]:
        variables = dict(variables_of(jax.random.key(seed)))
        return variables.pop("params"), variables

    shapes = jax.eval_shape(variables_of, jax.random.key(0))
    mutable = [name for name in shapes if name != "params"]
    return init, kfqn.find_layers(model, shapes, example, mutable=mutable, **call)
