"""Strict JAX for every test, and a problem small enough to be trained in a moment."""

from pathlib import Path

import jax
import numpy as np
import pytest

from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._models import cross_entropy
from kfqn_optax.bench._problems import PROBLEMS, Problem

jax.config.update("jax_numpy_rank_promotion", "raise")


def load_small(data_dir: Path | None) -> Dataset:
    images = np.random.default_rng(0).beta(0.3, 0.3, (150, 12)).astype(np.float32)
    return Dataset(images[:110], images[110:])


@pytest.fixture(scope="session")
def small() -> Problem:
    """A problem of 110 + 40 images of 12 pixels."""
    return Problem(load_small, (12, 3), cross_entropy)


@pytest.fixture
def small_curves(small, monkeypatch) -> None:
    """Let the small problem take the place of curves."""
    monkeypatch.setitem(PROBLEMS, "curves", small)
