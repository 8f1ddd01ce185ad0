"""Wrong calls get an error that names the call, shows the value it got, and says what to do."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import kfqn_optax as kfqn

PARAMS, X = zoo.MLP.example()
MODEL = zoo.MLP.model
LAYERS = kfqn.find_layers(MODEL, {"params": PARAMS}, X)
VALUE_AND_GRAD = kfqn.value_and_grad(zoo.MLP.loss, LAYERS)


class Other(nn.Module):
    """Has other paths than ``MODEL``."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x)


class Wider(nn.Module):
    """Has the same paths as ``MODEL``, and other shapes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(9, use_bias=False)(x)
        return nn.Dense(2)(x)


def init(model):
    return jax.tree.map(jnp.zeros_like, jax.eval_shape(model.init, jax.random.key(0), X))["params"]


@contextlib.contextmanager
def says(error, *parts):
    """Expect an error whose message, or a note on it, has every one of these parts."""
    with pytest.raises(error) as raised:
        yield
    told = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    for part in parts:
        assert part in told


def traced(function, *args):
    """Wrong calls are told while tracing: no number is needed."""
    return jax.eval_shape(function, *args)


# ---------------------------------------------------------------------------------------------- find_layers


@pytest.mark.parametrize(("model", "shown"), [(zoo.Mlp, "Mlp"), (PARAMS, "dict"), (MODEL.apply, "method")])
def test_find_layers_takes_a_model(model, shown):
    with says(TypeError, "kfqn.find_layers", "flax.linen.Module", shown, "Pass the model itself"):
        kfqn.find_layers(model, {"params": PARAMS}, X)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [(PARAMS, "Dense_0"), ({"batch_stats": {}}, "batch_stats"), (None, "None"), ({}, "[]")],
)
def test_find_layers_takes_variables_with_params(variables, shown):
    with says(ValueError, "kfqn.find_layers", '"params"', shown, '{"params": params}'):
        kfqn.find_layers(MODEL, variables, X)


def test_find_layers_needs_a_supported_layer():
    model = nn.LayerNorm()
    with says(ValueError, "kfqn.find_layers", "LayerNorm", "no layer that can be preconditioned", "scale"):
        kfqn.find_layers(model, {"params": init(model)}, X)


@pytest.mark.parametrize("max_dim", [0, -1, 2.5])
def test_find_layers_takes_a_positive_max_dim(max_dim):
    with says(ValueError, "find_layers", f"max_dim={max_dim}", "at least 1"):
        kfqn.find_layers(MODEL, {"params": PARAMS}, X, max_dim=max_dim)


@pytest.mark.parametrize(
    ("parts", "shown"), [({"encoder": PARAMS}, "'encoder'"), ([LAYERS, MODEL], "1"), (LAYERS, "Layer")]
)
def test_join_layers_takes_layers(parts, shown):
    with says(TypeError, "kfqn.join_layers", shown, "kfqn.find_layers"):
        kfqn.join_layers(parts)


def test_join_layers_refuses_two_layers_of_one_name():
    """Statistics and states are kept by name: two layers of one name would be mixed silently."""
    params, x = zoo.CASES["jit"].example()
    lifted = kfqn.find_layers(zoo.CASES["jit"].model, {"params": params}, x)  # blocks/fc and out
    block = kfqn.find_layers(zoo.Block(), {"params": params["blocks"]}, x)  # fc
    with says(ValueError, "kfqn.join_layers", "'a/blocks'", "'a/blocks/fc'"):
        kfqn.join_layers({"a": lifted, "a/blocks": block})


# ------------------------------------------------------------------------------------------- value_and_grad


@pytest.mark.parametrize(("layers", "shown"), [(MODEL, "Mlp"), (PARAMS, "dict"), (None, "NoneType")])
def test_value_and_grad_takes_layers(layers, shown):
    with says(TypeError, "kfqn.value_and_grad", shown, "kfqn.find_layers(model, variables"):
        kfqn.value_and_grad(zoo.MLP.loss, layers)


def test_layers_of_a_model_with_other_paths():
    with says(ValueError, "kfqn.value_and_grad", "Dense_0/kernel", "head/kernel", "Call find_layers"):
        traced(VALUE_AND_GRAD.__call__, init(Other()), X)


def test_layers_of_a_model_with_other_shapes():
    with says(ValueError, "kfqn.value_and_grad", "Dense_0/kernel", "(4, 9)", "(4, 3)", "find_layers"):
        traced(VALUE_AND_GRAD.__call__, init(Wider()), X)


@pytest.mark.parametrize(
    ("nest", "key"),
    [
        (lambda params: {"encoder": params, "decoder": init(Other())}, "'encoder'"),
        (lambda params: (init(Other()), params), "'1'"),
        (lambda params: {"autoencoder": params}, "'autoencoder'"),
    ],
)
def test_layers_of_one_model_for_parameters_of_several(nest, key):
    with says(ValueError, "kfqn.value_and_grad", "Dense_0/kernel", "kfqn.join_layers", key):
        traced(VALUE_AND_GRAD.__call__, nest(PARAMS), X)


def test_layers_of_one_model_for_an_optimizer_of_several():
    both = {"encoder": PARAMS, "decoder": init(Other())}
    with says(ValueError, "init", "Dense_0/kernel", "kfqn.join_layers"):
        kfqn.kbfgs(0.1, LAYERS).init(both)


def test_parameters_cast_inside_the_loss():
    def loss(params, x):
        return zoo.MLP.loss(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), x)

    with says(ValueError, "kfqn.value_and_grad", "bfloat16", "dtype=bfloat16", "param_dtype at float32"):
        traced(kfqn.value_and_grad(loss, LAYERS).__call__, PARAMS, X)


def test_parameters_combined_with_another_tree_inside_the_loss():
    def loss(params, x):
        distance = jax.tree.map(lambda leaf, old: jnp.sum((leaf - old) ** 2), params, PARAMS)
        return zoo.MLP.loss(params, x) + sum(jax.tree.leaves(distance))

    with says(ValueError, "kfqn.value_and_grad", "kfqn_slot", "params = kfqn.without_slots(params)"):
        traced(kfqn.value_and_grad(loss, LAYERS).__call__, PARAMS, X)


def test_parameters_combined_the_other_way_round_inside_the_loss():
    def loss(params, x):
        distance = jax.tree.map(lambda old, leaf: jnp.sum((leaf - old) ** 2), PARAMS, params)
        return zoo.MLP.loss(params, x) + sum(jax.tree.leaves(distance))

    with says(ValueError, "kfqn.value_and_grad", "params = kfqn.without_slots(params)"):
        traced(kfqn.value_and_grad(loss, LAYERS).__call__, PARAMS, X)


def test_errors_of_the_loss_itself_are_left_as_they_are():
    def loss(params, x):
        raise ValueError("my own")

    with pytest.raises(ValueError, match="my own") as raised:
        traced(kfqn.value_and_grad(loss, LAYERS).__call__, PARAMS, X)
    assert str(raised.value) == "my own"
    assert str(raised.value) == "my own"
    assert not any("kfqn" in note for note in getattr(raised.value, "__notes__", []))


# -------------------------------------------------------------------------------------------------- update

OPTIMIZERS = [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn, kfqn.kfac]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_update_without_curvature_shows_the_lines_to_write(make):
    tx = make(0.1, LAYERS)

    def step(params):
        return tx.update(params, tx.init(params), params)

    with says(
        ValueError,
        "update was called without curvature",
        "value_and_grad = kfqn.value_and_grad(loss_fn, layers)",
        "loss, grads, curvature = value_and_grad(params, batch)",
        "tx.update(grads, opt_state, params, curvature=curvature)",
    ):
        traced(step, PARAMS)


def test_a_wrapper_that_drops_curvature():
    inner = kfqn.kbfgs(0.1, LAYERS)
    plain = optax.GradientTransformation(inner.init, lambda g, s, p=None: inner.update(g, s, p))
    tx = optax.chain(plain)

    def step(params):
        _, grads, curvature = VALUE_AND_GRAD(params, X)
        return tx.update(grads, tx.init(params), params, curvature=curvature)

    with says(ValueError, "a wrapper drops it", "optax.GradientTransformationExtraArgs"):
        traced(step, PARAMS)


def test_train_state_without_curvature():
    def step(params):
        tx = kfqn.kbfgs(0.1, LAYERS)
        state = kfqn.TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
        return state.apply_gradients(grads=params)

    with says(ValueError, "without curvature", "kfqn.value_and_grad"):
        traced(step, PARAMS)


@pytest.mark.parametrize(
    ("pick", "shown"),
    [
        (lambda loss, grads, curvature: curvature.statistics, "dict"),
        (lambda loss, grads, curvature: (loss, grads, curvature), "tuple"),
        (lambda loss, grads, curvature: True, "bool"),
    ],
)
def test_update_with_a_curvature_of_another_type(pick, shown):
    tx = kfqn.kbfgs(0.1, LAYERS)

    def step(params):
        loss, grads, curvature = VALUE_AND_GRAD(params, X)
        return tx.update(grads, tx.init(params), params, curvature=pick(loss, grads, curvature))

    with says(
        (TypeError, ValueError), "update", f"curvature={shown}", "kfqn.value_and_grad(loss_fn, layers)"
    ):
        traced(step, PARAMS)


def test_update_with_the_curvature_of_fewer_layers():
    """Found by another method of the model."""
    case = zoo.CASES["setup"]
    params, x = case.example()
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    fewer = kfqn.find_layers(case.model, {"params": params}, x, method="features")
    tx = kfqn.kbfgs(0.1, layers)

    def step(params):
        _, grads, curvature = kfqn.value_and_grad(case.loss, fewer)(params, x)
        return tx.update(grads, tx.init(params), params, curvature=curvature)

    with says(ValueError, "blocks_1", "['blocks_0']", "same layers"):
        traced(step, params)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_init_with_the_parameters_of_another_model(make):
    tx = make(0.1, LAYERS)
    with says(ValueError, "init", "Dense_0/kernel", "head/kernel", "find_layers"):
        tx.init(init(Other()))
    with says(ValueError, "init", "Dense_0/kernel", "(4, 9)", "(4, 3)", "find_layers"):
        tx.init(init(Wider()))


def test_update_with_the_gradients_of_another_model():
    tx = kfqn.kbfgs(0.1, LAYERS)

    def step(params):
        _, _, curvature = VALUE_AND_GRAD(params, X)
        return tx.update(init(Other()), tx.init(params), params, curvature=curvature)

    with says(ValueError, "update", "Dense_0/kernel", "head/kernel", "find_layers"):
        traced(step, PARAMS)


def test_flattened_parameters():
    with says(ValueError, "init", "optax.flatten", "(20,)", "inside the chain"):
        optax.flatten(kfqn.kbfgs(0.1, LAYERS)).init(PARAMS)


# ---------------------------------------------------------------------------------------------- constants

BAD = {
    "learning_rate": ([-0.1, float("nan"), float("inf")], "at least 0"),
    "damping": ([0, 0.0, -0.3, float("nan"), float("inf"), np.float32(0), jnp.zeros(())], "positive"),
    "weight_decay": ([-0.1, float("nan"), float("inf")], "at least 0"),
    "step_rule": ([0, -1.0, float("nan")], "None for the papers' step"),
    "momentum": ([1, 1.5, -0.1], "in [0, 1)"),
    "decay": ([1, -0.1], "in [0, 1)"),
    "mu1": ([0, 1, -0.5], "in (0, 1)"),
    "update_every": ([0, -1, 1.5, float("inf")], "a whole number of at least 1"),
    "max_dim": ([0, 1.5], "a whole number of at least 1"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name][0]])
def test_a_constant_out_of_its_range(name, value):
    with says(ValueError, "kfqn", f"{name}={value!r}", BAD[name][1]):
        kfqn.kbfgs(**{"learning_rate": 0.1, "layers": LAYERS, name: value})


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(kfqn.kfac, "inverse_every", 0), (kfqn.kbfgs_l, "memory", 0), (kfqn.kfqn, "damping", -1.0)],
)
def test_a_constant_of_another_optimizer_out_of_its_range(make, name, value):
    with says(ValueError, "kfqn", f"{name}={value!r}"):
        make(0.1, LAYERS, **{name: value})


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, "float16", bool])
def test_a_factor_dtype_that_holds_no_factor(dtype):
    with says(ValueError, "kfqn", f"factor_dtype={dtype!r}", "float32"):
        kfqn.kfac(1.0, LAYERS, factor_dtype=dtype)


@pytest.mark.parametrize("name", ["learning_rate", "damping", "weight_decay"])
@pytest.mark.parametrize("value", [None, "0.3"])
def test_a_constant_that_is_no_number(name, value):
    with says((TypeError, ValueError), "kfqn", f"{name}={value!r}"):
        kfqn.kbfgs(**{"learning_rate": 0.1, "layers": LAYERS, name: value})


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_optimizers_take_layers(make):
    with says(TypeError, "kfqn", "Mlp", "kfqn.find_layers"):
        make(0.1, MODEL)


def test_arguments_in_the_wrong_order():
    with says(TypeError, "kfqn", "float", "kfqn.find_layers"):
        kfqn.kbfgs(LAYERS, 0.1)


def test_schedules_are_no_constants():
    """A schedule is only known while training; it passes, whatever it will be."""
    kfqn.kbfgs(optax.constant_schedule(-0.1), LAYERS, damping=optax.constant_schedule(0.3))
    kfqn.kbfgs(0.0, LAYERS, step_rule=None)


# --------------------------------------------------------------------------------- warm_start, diagnostics


def test_warm_start_needs_a_batch():
    opt_state = kfqn.kbfgs(0.1, LAYERS).init(PARAMS)
    with says(ValueError, "kfqn.warm_start", "batches is empty", "at least one batch"):
        kfqn.warm_start(opt_state, VALUE_AND_GRAD, PARAMS, [])
    with says(ValueError, "kfqn.warm_start", "batches is empty"):
        kfqn.warm_start(opt_state, VALUE_AND_GRAD, PARAMS, iter(()))


def test_warm_start_takes_what_value_and_grad_returned():
    opt_state = kfqn.kbfgs(0.1, LAYERS).init(PARAMS)
    with says(TypeError, "kfqn.warm_start", "method", "kfqn.value_and_grad(loss_fn, layers)"):
        kfqn.warm_start(opt_state, zoo.MLP.loss, PARAMS, [X])


@pytest.mark.parametrize("call", ["warm_start", "diagnostics"])
def test_a_state_of_another_optimizer(call):
    opt_state = optax.adam(0.1).init(PARAMS)
    with says(ValueError, f"kfqn.{call}", "no kfqn_optax state", "tx.init(params)"):
        if call == "warm_start":
            kfqn.warm_start(opt_state, VALUE_AND_GRAD, PARAMS, [X])
        else:
            kfqn.diagnostics(opt_state)


def test_warm_start_with_the_parameters_of_another_model():
    opt_state = kfqn.kbfgs(0.1, LAYERS).init(PARAMS)
    with says(ValueError, "Dense_0/kernel", "head/kernel", "find_layers"):
        kfqn.warm_start(opt_state, VALUE_AND_GRAD, init(Other()), [X])


def test_warm_start_with_fewer_layers_than_the_optimizer():
    case = zoo.CASES["setup"]
    params, x = case.example()
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    fewer = kfqn.find_layers(case.model, {"params": params}, x, method="features")
    opt_state = kfqn.kbfgs(0.1, layers).init(params)
    with says(ValueError, "kfqn.warm_start", "blocks_1", "same layers"):
        kfqn.warm_start(opt_state, kfqn.value_and_grad(case.loss, fewer), params, [x])


# -------------------------------------------------------------------------------------------- another state

WIDE = init(Wider())


def updated_with(tx, state):
    def update(params):
        _, grads, curvature = VALUE_AND_GRAD(params, X)
        return tx.update(grads, state, params, curvature=curvature)

    return traced(update, PARAMS)


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        (lambda: kfqn.kfac(1.0, LAYERS), ("step rule", "QuadraticState")),
        (lambda: kfqn.kbfgs_l(0.1, LAYERS, memory=3), ("output side of", "(3,")),
        (lambda: kfqn.kbfgs(0.1, LAYERS, momentum=0.0), ("momentum", "empty")),
        (lambda: kfqn.kbfgs(0.1, LAYERS, step_rule=None), ("step rule",)),
    ],
    ids=["method", "memory", "momentum", "rule"],
)
def test_the_state_of_another_method(other, parts):
    with says(ValueError, "kfqn: update was given a state", *parts, "init(params)"):
        updated_with(kfqn.kbfgs(0.1, LAYERS), other().init(PARAMS))


def test_the_state_of_another_memory():
    state = kfqn.kbfgs_l(0.1, LAYERS, memory=4).init(PARAMS)
    with says(ValueError, "kfqn: update was given a state", "(4,", "(5,"):
        updated_with(kfqn.kbfgs_l(0.1, LAYERS, memory=5), state)


def test_the_state_of_a_model_of_another_width():
    layers = kfqn.find_layers(Wider(), {"params": WIDE}, X)
    with says(ValueError, "kfqn: update was given a state", "(9, 2)", "(3, 2)"):
        updated_with(kfqn.kfac(0.1, LAYERS), kfqn.kfac(0.1, layers).init(WIDE))


def test_what_is_no_state_of_ours():
    tx = kfqn.kbfgs(0.1, LAYERS)
    with says(ValueError, "kfqn: update was given a state of type", "init(params)"):
        updated_with(tx, (optax.EmptyState(), *tx.init(PARAMS)[1:]))


# ------------------------------------------------------------------------------------------- further calls


@pytest.mark.parametrize("name", ["momentum", "decay", "mu1", "update_every", "weight_decay"])
def test_a_schedule_for_what_has_none(name):
    with says(TypeError, f"kfqn: {name} is the function", "Schedules are for damping, learning_rate"):
        kfqn.kbfgs(0.1, LAYERS, **{name: lambda count: 0.5})


@pytest.mark.parametrize("rule", [kfqn.measured, kfqn.quadratic, kfqn.StepRule])
def test_a_step_rule_that_was_not_called(rule):
    with says(TypeError, f"step_rule is the function {rule.__name__}", "kfqn.quadratic()"):
        kfqn.kfac(1.0, LAYERS, step_rule=rule)


def test_a_floor_above_the_ceiling():
    with says(ValueError, "kfqn.quadratic: floor=2 is above ceiling=1"):
        kfqn.quadratic(floor=2, ceiling=1)


@pytest.mark.parametrize("call", [lambda p: VALUE_AND_GRAD(p, X), kfqn.kfac(1.0, LAYERS).init])
def test_variables_in_the_place_of_parameters(call):
    with says(ValueError, "kfqn", "variables['params']"):
        traced(call, {"params": PARAMS})


def test_layers_are_static_arguments():
    same = kfqn.find_layers(MODEL, {"params": PARAMS}, X)
    assert same == LAYERS
    assert hash(same) == hash(LAYERS)
