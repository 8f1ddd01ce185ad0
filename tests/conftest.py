"""Strict JAX for every test, compiled quickly, and a problem small enough to be trained in a moment."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import kfqn_optax._warnings
from kfqn_optax.bench._datasets import Dataset
from kfqn_optax.bench._models import cross_entropy
from kfqn_optax.bench._problems import PROBLEMS, Problem

# Compiling is most of the time of the tests: less optimised in them and in the processes they start, unless
# XLA_FLAGS is set. Those are flags that this XLA knows, of which another process has to find out: a JAX
# that has run reads them no more.
if "XLA_FLAGS" not in os.environ:
    found = "from kfqn_optax.bench._quick import compiler_options; print(compiler_options())"
    options = ast.literal_eval(subprocess.check_output([sys.executable, "-c", found], text=True))
    os.environ["XLA_FLAGS"] = " ".join(f"--{name}={value}".lower() for name, value in options.items())

jax.config.update("jax_numpy_rank_promotion", "raise")


def load_small(data_dir: Path | None) -> Dataset:
    images = np.random.default_rng(0).beta(0.3, 0.3, (150, 12)).astype(np.float32)
    return Dataset(images[:110], images[110:])


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    """Each test is warned as a new process is."""
    kfqn_optax._warnings._given.clear()


@pytest.fixture(scope="session")
def small() -> Problem:
    """A problem of 110 + 40 images of 12 pixels."""
    return Problem(load_small, (12, 3), cross_entropy)


@pytest.fixture
def small_curves(small, monkeypatch) -> None:
    """Let the small problem take the place of curves."""
    monkeypatch.setitem(PROBLEMS, "curves", small)
