"""Parameters, and layers joined, in dataclasses: as in a dictionary of the same names."""

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._capture.parameters import get_matrices, layers_within, leaves_by_path, set_matrices
from kfqn_optax.bench._quick import quick_jit


class Flax(flax.struct.PyTreeNode):
    first: Any
    second: Any


@chex.dataclass
class Chex:
    first: Any
    second: Any


@chex.dataclass(frozen=True, mappable_dataclass=False)
class ChexFrozen:
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    first: Any
    second: Any


class Tuple(NamedTuple):
    first: Any
    second: Any


class Arrays(flax.struct.PyTreeNode):
    kernel: Any
    bias: Any


FORMS = [Flax, Chex, ChexFrozen, Registered, Tuple]
model, x = nn.Dense(2), jnp.linspace(0, 1, 24).reshape(8, 3)
both = {
    name: quick_jit(model.init)(jax.random.key(i), x)["params"]
    for i, name in enumerate(("first", "second"))
}
layers = kfqn.find_layers(model, {"params": both["first"]}, x)


def train(params, joined, of, steps=3):
    def loss_fn(params):
        first, second = (model.apply({"params": p}, x) for p in of(params))
        return jnp.mean((kfqn.outputs(jnp.tanh(first) + second, "normal") - jnp.sin(3 * x[:, :2])) ** 2)

    value_and_grad, tx = kfqn.value_and_grad(loss_fn, joined), kfqn.kfac(1.0, joined)

    @quick_jit
    def step(params, state):
        _, grads, curvature = value_and_grad(params)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_run_is_that_of_a_dictionary(form):
    joined = kfqn.join_layers(form(first=layers, second=layers))
    assert [layer.name for layer in joined] == ["first", "second"]
    ours = train(form(**both), joined, lambda p: (p.first, p.second))
    assert isinstance(ours, form)
    expected = train(
        both, kfqn.join_layers(dict.fromkeys(both, layers)), lambda p: (p["first"], p["second"])
    )
    for name in both:
        jax.tree.map(np.testing.assert_array_equal, getattr(ours, name), expected[name])


def test_arrays_right_in_a_dataclass_are_found_by_their_fields():
    params = {"a": Arrays(**both["first"]), "b": Arrays(**both["second"])}
    assert list(leaves_by_path(params)[0]) == [
        ("a", "kernel"),
        ("a", "bias"),
        ("b", "kernel"),
        ("b", "bias"),
    ]
    joined = kfqn.join_layers({"a": layers, "b": layers})
    present = layers_within(joined, params, "test")
    assert [layer.use_bias for layer in present] == [True, True]
    matrices = get_matrices(present, params)
    np.testing.assert_array_equal(matrices["b"][:-1], params["b"].kernel)
    doubled = set_matrices(present, params, {name: 2 * matrix for name, matrix in matrices.items()})
    chex.assert_trees_all_equal(doubled, jax.tree.map(lambda p: 2 * p, params))


def test_boxes_are_still_no_place():
    boxed = {"a": {"kernel": nn.Partitioned(both["first"]["kernel"], (None, "x")), "bias": jnp.zeros(2)}}
    assert list(leaves_by_path(boxed)[0]) == [("a", "bias"), ("a", "kernel")]


def test_layers_alone_are_not_the_form_of_several():
    with pytest.raises(TypeError, match=r"kfqn\.join_layers: got a Layers"):
        kfqn.join_layers(layers)
