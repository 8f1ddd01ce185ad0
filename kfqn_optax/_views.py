"""What each side of a layer sees of the statistics of a batch."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kfqn_optax._capture.layers import Layer, Layers
from kfqn_optax._capture.statistics import Statistics


def view(
    layers: Layers, statistics: dict[str, Statistics], dtype_of: Callable[[Layer], Any]
) -> dict[str, Statistics]:
    """The statistics in the factors' dtype, without the homogeneous 1 of a bias that is masked."""
    views = {}
    for layer in layers:
        full, rows = statistics[layer.name], layer.rows
        moment = full.second_moment
        view = full._replace(
            inputs=full.inputs[..., :rows],
            squares=full.squares[..., :rows],
            product=full.product[..., :rows],
            second_moment=None if moment is None else moment[..., :rows, :rows],
        )
        views[layer.name] = jax.tree.map(operator.methodcaller("astype", dtype_of(layer)), view)
    return views


def of_inputs(statistics: dict[str, Statistics]) -> dict[str, Any]:
    """What an input side sees: nothing whose shape depends on the layer's outputs."""
    of_gradients = ("preactivation_grads", "grad_moment", "grad_squares", "part_grads")
    absent: Any = dict.fromkeys((*of_gradients, "preactivations", "part_preactivations"))
    return {name: value._replace(**absent) for name, value in statistics.items()}


def of_outputs(statistics: dict[str, Statistics]) -> dict[str, Any]:
    """What an output side sees: nothing whose shape depends on the layer's inputs."""
    absent: Any = dict.fromkeys(("inputs", "squares", "product", "second_moment"))
    return {name: value._replace(**absent) for name, value in statistics.items()}


def homogeneous(asking: Layers, layers: Layers, vectors: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Vectors as the capture takes them: with a 0 for the 1 of a bias that is masked."""
    full = {}
    for layer in asking:
        missing = layers[layer.name].rows - layer.rows
        pad = [(0, 0)] * len(layer.copies) + [(0, missing)]
        full[layer.name] = jnp.pad(vectors[layer.name], pad) if missing else vectors[layer.name]
    return full
