"""The circumstances: an autoencoder as usual, and one thing about it changed."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._models import Autoencoder, flax_dense, torch_dense
from kfqn_optax.bench._problems import Problem
from kfqn_optax.bench._tasks.autoencoders import BATCH_SIZE, autoencoder_task
from kfqn_optax.bench._tasks.task import Task


class Circumstances(NamedTuple):
    """One row of the table; as it stands, the usual problem.

    Attributes:
      name: what is changed.
      batch_size: examples in a step.
      activation, dense: of the model.
      input_scale: what the model's inputs are multiplied with; not what its outputs are compared with.
      loss_scale: what the loss is multiplied with.
    """

    name: str = "as usual"
    batch_size: int = BATCH_SIZE
    activation: Callable[..., Any] = nn.relu
    dense: Callable[[int, int], nn.Dense] = torch_dense
    input_scale: float = 1.0
    loss_scale: float = 1.0

    def task(self, problem: Problem, dataset: Dataset) -> Task:
        return autoencoder_task(
            problem,
            dataset,
            batch_size=self.batch_size,
            model=Autoencoder(problem.widths, self.activation, self.dense),
            input_scale=self.input_scale,
            loss_scale=self.loss_scale,
        )


SEEDS = range(20)  # as usual from each of them, everything else from the first
BATCH_SIZES = (32, 100, 316, 4_000)
CHANGED = [
    *(Circumstances(f"batch size {size}", batch_size=size) for size in BATCH_SIZES),
    Circumstances("bfloat16", dense=functools.partial(torch_dense, dtype=jnp.bfloat16)),
    Circumstances("inputs x 100", input_scale=100.0),
    Circumstances("inputs x 0.01", input_scale=0.01),
    Circumstances("loss x 1000", loss_scale=1e3),
    Circumstances("loss x 0.001", loss_scale=1e-3),
    Circumstances("tanh", activation=nn.tanh),
    Circumstances("sigmoid", activation=nn.sigmoid),
    Circumstances("Flax's start", dense=flax_dense),  # PyTorch's is the usual one
]


def rows(seeds: int, changed: list[Circumstances]) -> Iterator[tuple[Circumstances, range]]:
    """Each of the circumstances with its seeds."""
    yield Circumstances(), SEEDS[:seeds]
    for circumstances in changed:
        yield circumstances, SEEDS[:1]
