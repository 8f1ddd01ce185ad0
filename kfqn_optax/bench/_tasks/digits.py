"""Digits: MNIST's by a multilayer perceptron, and small ones by a convolutional network with batch norm."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._mnist import SIDE, load_labelled_mnist
from kfqn_optax.bench._models import Tree
from kfqn_optax.bench._tasks.drawn_digits import draw_digits
from kfqn_optax.bench._tasks.folders import folder_of
from kfqn_optax.bench._tasks.task import Task, linen_start

MLP_TRAIN, CNN_TRAIN, CNN_TEST, BATCH_SIZE = 20_000, 10_000, 2_000, 256
Labelled = tuple[np.ndarray, np.ndarray]


class ConvNet(nn.Module):
    """Two convolutions, each with batch norm, ReLU and pooling, before a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images[..., None]
        for channels in (16, 32):
            x = nn.Conv(channels, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def load_mlp(data_dir: Path | None) -> Task:
    """784-256-128-10 on 20,000 of MNIST's images."""
    (images, labels), test = load_labelled_mnist(folder_of(data_dir, "mnist"))
    model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
    init, layers = linen_start(model, jnp.zeros((1, SIDE * SIDE)))

    def logits(params: Tree, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    return Task(
        init=init,
        loss=lambda params, batch, state: (_cross_entropy(logits(params, batch[0]), batch[1]), state),
        layers=layers,
        train=(images[:MLP_TRAIN], labels[:MLP_TRAIN]),
        test=test,
        batch_size=BATCH_SIZE,
        metric="test error rate",
        test_metric=lambda params, batch, state: _error_rate(logits(params, batch[0]), batch[1]),
    )


def load_cnn(data_dir: Path | None) -> Task:
    """14x14 digits: MNIST's at half their size where there is a folder of them, drawn ones otherwise.

    The training loss is that of the batches' own statistics, the test error that of the running ones.
    """
    train, test = _small_digits(data_dir)
    model = ConvNet()
    init, layers = linen_start(model, jnp.zeros((2, SIDE // 2, SIDE // 2)), train=True)

    def loss(params, batch, state):
        images, labels = batch
        variables, mutable = {"params": params, **state}, list(state)
        logits, state = model.apply(variables, images, train=True, mutable=mutable)
        return _cross_entropy(logits, labels), state

    def error_rate(params, batch, state):
        images, labels = batch
        return _error_rate(model.apply({"params": params, **state}, images, train=False), labels)

    return Task(
        init=init,
        loss=loss,
        layers=layers,
        train=train,
        test=test,
        batch_size=BATCH_SIZE,
        metric="test error rate",
        test_metric=error_rate,
    )


def _small_digits(data_dir: Path | None) -> tuple[Labelled, Labelled]:
    if data_dir is None:
        images, labels = draw_digits(CNN_TRAIN + CNN_TEST, SIDE // 2, seed=0)
        return (images[:CNN_TRAIN], labels[:CNN_TRAIN]), (images[CNN_TRAIN:], labels[CNN_TRAIN:])
    train, test = load_labelled_mnist(folder_of(data_dir, "mnist"))
    return _halved(train, CNN_TRAIN), _halved(test, CNN_TEST)


def _halved(labelled: Labelled, count: int) -> Labelled:
    """The first images, means of 2x2 pixels."""
    images, labels = labelled[0][:count], labelled[1][:count]
    return images.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4)), labels


def _cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        kfqn.outputs(logits, "categorical"), labels
    ).mean()


def _error_rate(logits: Any, labels: jax.Array) -> jax.Array:
    return jnp.mean(logits.argmax(-1) != labels)
