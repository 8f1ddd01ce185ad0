"""What is no wrong call passes, and errors that are not ours are left as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import zoo
from flax import nnx

import kfqn_optax as kfqn

PARAMS, X = zoo.MLP.example()
MODEL = zoo.MLP.model
LAYERS = kfqn.find_layers(MODEL, {"params": PARAMS}, X)


def value_of(loss, *args):
    return jax.eval_shape(lambda params, x: kfqn.value_and_grad(loss, LAYERS)(params, x)[0], PARAMS, X)


def test_errors_of_the_loss_itself_are_left_as_they_are():
    def loss(params, x):
        raise ValueError("my own")

    with pytest.raises(ValueError, match="my own") as raised:
        value_of(loss)
    assert str(raised.value) == "my own"
    assert not any("kfqn" in note for note in getattr(raised.value, "__notes__", []))


def test_schedules_are_no_constants():
    """A schedule is only known while training; it passes, whatever it will be."""
    kfqn.kbfgs(optax.constant_schedule(-0.1), LAYERS, damping=optax.constant_schedule(0.3))
    kfqn.kbfgs(0.0, LAYERS, step_rule=None)


def test_layers_are_static_arguments():
    same = kfqn.find_layers(MODEL, {"params": PARAMS}, X)
    assert same == LAYERS
    assert hash(same) == hash(LAYERS)


def test_a_model_that_is_jitted_inside_the_loss_is_met_each_time():
    """Its trace is kept, so that its taps are run once."""
    apply = jax.jit(MODEL.apply)
    loss = lambda params, x: apply({"params": params}, x).mean()
    assert value_of(loss).shape == value_of(loss).shape == ()


def test_a_loss_of_one_of_the_layers():
    """A layer that this loss does not use has no statistics, and that is all."""
    first = lambda params, x: (
        nn.Dense(zoo.WIDTH, use_bias=False).apply({"params": params["Dense_0"]}, x).mean()
    )
    assert value_of(first).shape == ()


class Complex(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, dtype=jnp.complex64, name="inside")(x)
        return nn.Dense(2, name="last")(x.real)


def reasons(layers):
    return {"/".join(path): reason for path, _, reason in layers.others}


def test_a_layer_of_complex_numbers_is_listed_with_the_reason():
    variables = jax.eval_shape(Complex().init, jax.random.key(0), X)
    layers = kfqn.find_layers(Complex(), variables, X)
    assert [layer.name for layer in layers] == ["last"]
    assert reasons(layers)["inside/kernel"] == "Dense of complex numbers"


def test_an_nnx_layer_of_complex_numbers_is_listed_with_the_reason():
    rngs = nnx.Rngs(0)
    parts = [
        nnx.Linear(4, 3, dtype=jnp.complex64, rngs=rngs),
        jnp.real,
        nnx.Linear(3, 3, param_dtype=jnp.complex64, dtype=jnp.complex64, rngs=rngs),
        jnp.real,
        nnx.Linear(3, 2, rngs=rngs),
    ]
    layers = kfqn.find_layers(nnx.Sequential(*parts), X)
    assert [layer.name for layer in layers] == ["layers/4"]
    assert (
        reasons(layers)["layers/0/kernel"]
        == reasons(layers)["layers/2/bias"]
        == "Linear of complex numbers"
    )
