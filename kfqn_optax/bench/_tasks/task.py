"""What a problem is: a loss, where to start, and data to train and to test on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._models import Tree

AT_ONCE = 1_000  # examples of one batch in evaluation, at most: bounds the memory


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
      evaluated: training examples over which the training loss is evaluated, at most.
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
    evaluated: int = 5_000

    @property
    def examples(self) -> int:
        return len(jax.tree.leaves(self.train)[0])

    def evaluation_batches(self) -> list[Tree]:
        """A fixed part of the training set in equal batches, whatever the batch size in training."""
        size = min(AT_ONCE, self.evaluated, self.examples)
        count = min(self.evaluated, self.examples) // size
        rows = np.random.default_rng(0).permutation(self.examples)[: count * size].reshape(count, size)
        return [
            jax.tree.map(lambda array, part=part: jnp.asarray(array[part]), self.train) for part in rows
        ]


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
