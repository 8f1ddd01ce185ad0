"""A problem for ``--quick``: 200 of the CURVES images and a small autoencoder."""

from pathlib import Path

from kfqn_optax.bench._curves import make_curves
from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._models import cross_entropy
from kfqn_optax.bench._problems import Problem

TRAIN, TEST = 160, 40


def load_small(data_dir: Path | None) -> Dataset:
    del data_dir
    images = make_curves(TRAIN + TEST, seed=0)[:, 28 * 10 : 28 * 12]
    return Dataset(images[:TRAIN], images[TRAIN:])


SMALL = Problem(load_small, (56, 12, 4), cross_entropy)
