"""The problems by name. To add one: write its loader and enter it here."""

import functools
from collections.abc import Callable
from pathlib import Path

from kfqn_optax.bench._tasks import autoencoders, digits
from kfqn_optax.bench._tasks.image import load_image
from kfqn_optax.bench._tasks.poisson import load_poisson
from kfqn_optax.bench._tasks.regression import load_regression
from kfqn_optax.bench._tasks.task import Task
from kfqn_optax.bench._tasks.text import load_text

TASKS: dict[str, Callable[[Path | None], Task]] = {
    "curves": functools.partial(autoencoders.load, "curves"),
    "mnist": functools.partial(autoencoders.load, "mnist"),
    "faces": functools.partial(autoencoders.load, "faces"),
    "image": lambda data_dir: load_image(),
    "tanh_regression": lambda data_dir: load_regression(),
    "digits_cnn": digits.load_cnn,
    "pinn": lambda data_dir: load_poisson(),
    "mnist_mlp": digits.load_mlp,
    "transformer": lambda data_dir: load_text(),
}
