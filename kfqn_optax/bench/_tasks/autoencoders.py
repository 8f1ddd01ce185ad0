"""The paper's deep autoencoders, and what the sweep varies about them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kfqn_optax as kfqn
from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._models import Autoencoder, cross_entropy, l2_term
from kfqn_optax.bench._problems import PROBLEMS, Problem
from kfqn_optax.bench._tasks.folders import folder_of
from kfqn_optax.bench._tasks.task import Task, linen_start

BATCH_SIZE = 1_000
_TESTED = 2_000  # images of the test set, at random: evaluation is off the clock but takes time


def load(name: str, data_dir: Path | None) -> Task:
    """One of the three problems by its name."""
    problem = PROBLEMS[name]
    folder = None if name == "curves" else folder_of(data_dir, name)
    return autoencoder_task(problem, problem.load(folder))


def autoencoder_task(
    problem: Problem,
    dataset: Dataset,
    *,
    batch_size: int = BATCH_SIZE,
    model: Autoencoder | None = None,
    input_scale: float = 1.0,
    loss_scale: float = 1.0,
) -> Task:
    """The problem with another model, its inputs (not what they are compared with) or its loss scaled."""
    network = problem.model if model is None else model
    distribution = "bernoulli" if problem.image_loss is cross_entropy else "normal"
    init, layers = linen_start(network, jnp.zeros((1, problem.widths[0])))

    def reconstruction_loss(params: Any, images: jax.Array) -> jax.Array:
        outputs: Any = network.apply({"params": params}, input_scale * images)
        outputs = kfqn.outputs(outputs.astype(jnp.float32), distribution)
        return problem.image_loss(outputs, images).mean()

    def loss(params, images, state):
        return loss_scale * (reconstruction_loss(params, images) + l2_term(params)), state

    tested = np.random.default_rng(0).permutation(len(dataset.test))[:_TESTED]
    return Task(
        init=init,
        loss=loss,
        layers=layers,
        train=dataset.train,
        test=dataset.test[tested],
        batch_size=min(batch_size, len(dataset.train)),
        metric="test loss",
        test_metric=lambda params, images, state: reconstruction_loss(params, images),
        loss_unit=loss_scale,
    )
