"""Captured statistics are those of a brute-force oracle, whatever stands around the layers and the loss."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

SOME = ["compact", "called twice", "scan, axis 1", "vmap, axis 0"]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def capture(case, params, x, loss=None):
    """What value_and_grad returns for a model of the zoo."""
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    return kfqn.value_and_grad(loss or case.loss, layers)(params, x)


def capture_essentials(case, params, x, loss=None):
    """The value and the gradients, and what the oracle knows of the statistics."""
    value, grads, curvature = capture(case, params, x, loss)
    return (value, grads), zoo.essentials(curvature.statistics)


def assert_statistics(statistics, expected, tolerance=None):
    """Within rounding: 100 units in the last place of the largest element, unless told otherwise."""
    for name, wanted in expected.items():
        for field, ours, reference in zip(
            wanted._fields, zoo.essentials(statistics)[name], wanted, strict=True
        ):
            assert ours.shape == reference.shape, f"{field} of {name}"
            atol = (tolerance or 100 * jnp.finfo(ours.dtype).eps) * np.abs(reference).max()
            np.testing.assert_allclose(ours, reference, 0, atol, err_msg=f"{field} of {name}")


def assert_equal(left, right):
    """The same tree (container types included) with the same leaves, to the last bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right, rtol=1e-12):
    """The same to rounding: two programs that compute one thing may be fused differently."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, rtol), left, right)


def factors(opt_state, name):
    return opt_state[0].inputs[name].factor, opt_state[0].outputs[name].factor


# ------------------------------------------------------------------------- every model against the oracle


@pytest.mark.parametrize("name", zoo.CASES)
def test_statistics_equal_brute_force(float64, name):
    case = zoo.CASES[name]
    params, x = case.example(jnp.float64)

    @quick_jit
    def run(params, x):
        reference = jax.value_and_grad(case.loss)(params, x)
        return zoo.probe(case.plain_loss, params, x), reference, *capture_essentials(case, params, x)

    probed, reference, ours, statistics = run(params, x)
    expected = zoo.expected_from(*probed, params)
    assert_statistics(statistics, expected)
    for other in statistics.keys() - expected.keys():  # the branch of a cond not taken
        assert statistics[other].rows == 0
    assert_close(ours, reference)


@pytest.mark.parametrize(("outer", "inner"), [(2, -1), (1, -2)])
def test_stacks_whose_axes_cross_are_right_or_left_out(float64, outer, inner):
    """Counted from both ends, the two axes come in one order in the kernel, and another in the bias."""
    model = zoo.nested_scan(outer, inner)
    case = zoo.Case(model, (6, 4), zoo.plain_nested_scan(outer, inner, True))
    params, x = case.example(jnp.float64)
    layers = kfqn.find_layers(model, {"params": params}, x)
    if any("inner" in path for path, _, _ in layers.others):
        assert [layer.name for layer in layers] == ["out"]
        return
    _, statistics = quick_jit(functools.partial(capture_essentials, case))(params, x)
    assert_statistics(statistics, zoo.brute_force(case.plain_loss, params, x))


@pytest.mark.parametrize("name", SOME)
def test_statistics_equal_brute_force_in_float32_under_jit(name):
    case = zoo.CASES[name]
    params, x = case.example()

    ours, statistics = jax.jit(functools.partial(capture_essentials, case))(params, x)
    assert_statistics(statistics, zoo.brute_force(case.plain_loss, params, x))
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype(jnp.float32)}
    assert_close(ours, quick_jit(jax.value_and_grad(case.loss))(params, x), rtol=1e-5)


def test_the_oracle_against_finite_differences(float64):
    """The last doubt: dL/dh by moving every row's pre-activation, one at a time."""
    params, x = zoo.MLP.example(jnp.float64)
    probe = zoo.Probe()
    zoo.MLP.plain_loss(probe, params, x)
    shifts = {key: [jnp.zeros_like(h) for _, h in calls] for key, calls in probe.calls.items()}

    @quick_jit
    @jax.vmap
    def loss(shift):
        moved = {**shifts, ("Dense_0", ()): [shift]}
        return zoo.MLP.plain_loss(zoo.Probe(moved), params, x)

    size, step = len(x) * zoo.WIDTH, 1e-5
    one_at_a_time = step * np.eye(size).reshape(size, len(x), zoo.WIDTH)
    slopes = np.reshape((loss(one_at_a_time) - loss(-one_at_a_time)) / (2 * step), (len(x), -1))
    expected = zoo.brute_force(zoo.MLP.plain_loss, params, x)["Dense_0"]
    np.testing.assert_allclose(slopes.sum(0), expected.preactivation_grads, atol=1e-9)


# ---------------------------------------------------------------------------------------------- data types


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_modules_have_float32_statistics(param_dtype):
    case = dataclasses.replace(zoo.MLP, model=zoo.Mlp(dtype=jnp.bfloat16, param_dtype=param_dtype))
    params, x = case.example()
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)
    (_, grads), statistics = quick_jit(functools.partial(capture_essentials, case))(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(statistics)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    # Three roundings to 8 bits on the way to the loss, and as many back.
    expected = zoo.brute_force(case.plain_loss, wide, x)
    assert_statistics(statistics, expected, tolerance=6 * 2**-8)


def test_sums_in_bfloat16_modules_are_accumulated_in_float32():
    """bfloat16 cannot count past 256, nor add 600 equal numbers."""
    model, x = nn.Dense(1, dtype=jnp.bfloat16), jnp.ones((600, 1))
    params = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss(params, x):
        return model.apply({"params": params}, x).astype(jnp.float32).sum()

    @quick_jit
    def captured(params, x):
        return zoo.essentials(kfqn.value_and_grad(loss, layers)(params, x)[2].statistics)

    statistics = captured(params, x)["."]
    assert statistics.rows == 600
    assert statistics.preactivation_grads == 600
    assert_equal(statistics.inputs, jnp.ones(2))
    assert_equal(statistics.second_moment, jnp.ones((2, 2)))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.float16])
def test_inputs_of_another_type_than_the_layer(dtype):
    case = zoo.CASES["dense"]
    params, x = case.example()
    x = (x > 0).astype(dtype)
    _, statistics = quick_jit(functools.partial(capture_essentials, case))(params, x)
    assert_statistics(statistics, zoo.brute_force(case.plain_loss, params, x.astype(jnp.float32)))


# ----------------------------------------------------------------------- transformations of the whole loss


def jitted(loss):
    return jax.jit(loss)


def checkpointed(loss):
    return jax.checkpoint(loss)


def per_example(loss):
    return lambda params, x: jax.vmap(loss, in_axes=(None, 0))(params, x).mean()


def accumulated(loss):
    """Three micro-batches in a lax.scan."""

    def total(params, x):
        def add(total, part):
            return total + loss(params, part) / 3, None

        return jax.lax.scan(add, jnp.zeros([], x.dtype), x.reshape(3, -1, x.shape[-1]))[0]

    return total


def accumulated_jitted_examples(loss):
    return accumulated(jitted(per_example(checkpointed(loss))))


@pytest.mark.parametrize(
    "transform", [jitted, checkpointed, per_example, accumulated, accumulated_jitted_examples]
)
def test_statistics_through_transformations_of_the_loss(float64, transform):
    params, x = zoo.MLP.example(jnp.float64)
    loss = transform(zoo.MLP.loss)
    loss(params, x)  # where a trace is cached, it must not be used for the tapped loss

    @quick_jit
    def run(params, x):
        return jax.value_and_grad(loss)(params, x), *capture_essentials(zoo.MLP, params, x, loss)

    reference, ours, statistics = run(params, x)
    assert_statistics(statistics, zoo.brute_force(zoo.MLP.plain_loss, params, x))
    assert_close(ours, reference)


def test_micro_batches_outside_add_up(float64):
    """Rows and gradients of micro-batches add up; means are weighted by rows."""
    params, x = zoo.MLP.example(jnp.float64)

    @quick_jit
    def run(params, x):
        return jax.lax.map(lambda part: capture_essentials(zoo.MLP, params, part)[1], x.reshape(3, 2, 4))

    parts = run(params, x)
    for name, wanted in zoo.brute_force(zoo.MLP.plain_loss, params, x).items():
        assert parts[name].rows.sum() == wanted.rows
        np.testing.assert_allclose(parts[name].second_moment.mean(0), wanted.second_moment, 1e-13)
        np.testing.assert_allclose(
            parts[name].preactivation_grads.mean(0), wanted.preactivation_grads, 1e-12
        )


def test_vmap_over_parameters_keeps_members_apart(float64):
    """An ensemble: the whole of value_and_grad under jax.vmap."""
    params, x = zoo.MLP.example(jnp.float64)
    members = [params, jax.tree.map(lambda leaf: 2 * leaf, params)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    statistics = quick_jit(jax.vmap(lambda params: capture_essentials(zoo.MLP, params, x)[1]))(stacked)
    for i, member in enumerate(members):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], statistics)
        assert_statistics(mine, zoo.brute_force(zoo.MLP.plain_loss, member, x))


def test_a_warm_trace_cache_of_nn_jit_is_not_used(float64):
    case = zoo.CASES["jit"]
    params, x = case.example(jnp.float64)
    reference = jax.value_and_grad(case.loss)
    before = reference(params, x)
    expected = zoo.brute_force(case.plain_loss, params, x)
    first = kfqn.find_layers(case.model, {"params": params}, x)
    for _ in range(2):  # cold, then warm
        assert kfqn.find_layers(case.model, {"params": params}, x) == first
        ours, statistics = quick_jit(functools.partial(capture_essentials, case))(params, x)
        assert_statistics(statistics, expected)
        assert_close(ours, before)
        assert_close(reference(params, x), before)


# -------------------------------------------------------------------------------------- the train step


def test_the_whole_train_step_in_a_scan(float64):
    case = zoo.CASES["called twice"]
    params, x = case.example(jnp.float64)
    layers = kfqn.find_layers(case.model, {"params": params}, x)
    value_and_grad = kfqn.value_and_grad(case.loss, layers)
    tx = kfqn.kbfgs(0.1, layers)
    batches = jnp.stack([x, 2 * x, x - 1])

    def step(carry, batch):
        params, opt_state = carry
        value, grads, curvature = value_and_grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        seen = (params, value, zoo.essentials(curvature.statistics))
        return (optax.apply_updates(params, updates), opt_state), seen

    carry = (params, tx.init(params))
    scanned, seen = quick_jit(lambda carry: jax.lax.scan(step, carry, batches))(carry)
    one_step = quick_jit(step)
    for i, batch in enumerate(batches):
        at_step, value, statistics = jax.tree.map(lambda leaf, i=i: leaf[i], seen)
        assert_statistics(statistics, zoo.brute_force(case.plain_loss, at_step, batch))
        carry, looped = one_step(carry, batch)
        assert_close((at_step, value, statistics), looped)
    assert_close(scanned, carry)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(nn.Dense(zoo.WIDTH)(x)))
        return nn.Dense(2)(x)


def test_dropout_draws_the_same_in_both_passes():
    """Op by op, without jit: nothing is fused, so the numbers are the same to the last bit."""
    model, (_, x) = Dropping(), zoo.MLP.example()
    params = zoo.randomise(jax.eval_shape(model.init, jax.random.key(0), x))["params"]
    key = jax.random.key(1)
    layers = kfqn.find_layers(model, {"params": params}, x, train=True, rngs={"dropout": key})

    def loss(params, x, key, train):
        return zoo.loss_of(model.apply({"params": params}, x, train=train, rngs={"dropout": key}))

    value_and_grad = kfqn.value_and_grad(loss, layers)
    value, grads, curvature = value_and_grad(params, x, key, train=True)
    assert_equal((value, grads), jax.value_and_grad(loss)(params, x, key, train=True))
    assert_equal(curvature.after(optax.tree.zeros_like(params)).statistics, curvature.statistics)
    _, _, other = value_and_grad(params, x, jax.random.key(2), train=True)
    assert np.any(other.statistics["Dense_1"].inputs != curvature.statistics["Dense_1"].inputs)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(nn.Dense(zoo.WIDTH, use_bias=False)(x))
        x = nn.BatchNorm(use_running_average=not train, epsilon=1e-5)(x)
        return nn.Dense(2)(x)


def plain_normalised(probe, params, x):
    h = jnp.tanh(probe.dense("Dense_0", params["Dense_0"], x))
    scale, bias = params["BatchNorm_0"]["scale"], params["BatchNorm_0"]["bias"]
    mean, variance = h.mean(0, keepdims=True), h.var(0, keepdims=True)
    h = (h - mean) / jnp.sqrt(variance + 1e-5) * scale[None] + bias[None]
    return zoo.loss_of(probe.dense("Dense_1", params["Dense_1"], h))


def test_batch_norm_with_mutable_statistics(float64):
    _, x = zoo.MLP.example(jnp.float64)
    model = Normalised()
    variables = zoo.randomise(model.init(jax.random.key(0), x, train=False), jnp.float64)
    params, batch_stats = variables["params"], variables["batch_stats"]
    layers = kfqn.find_layers(model, variables, x, train=True, mutable=["batch_stats"])
    assert [layer.name for layer in layers] == ["Dense_0", "Dense_1"]

    def loss(params, batch_stats, x):
        outputs, updates = model.apply(
            {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        return zoo.loss_of(outputs), updates["batch_stats"]

    @quick_jit
    def run(params, batch_stats, x):
        reference = jax.value_and_grad(loss, has_aux=True)(params, batch_stats, x)
        value_and_grad = kfqn.value_and_grad(loss, layers, has_aux=True)
        (value, aux), grads, curvature = value_and_grad(params, batch_stats, x)
        moved = optax.apply_updates(params, grads)
        statistics = zoo.essentials(curvature.statistics), zoo.essentials(curvature.after(grads).statistics)
        return reference, ((value, aux), grads), moved, statistics

    reference, ours, moved, (before, after) = run(params, batch_stats, x)
    assert_close(ours, reference)
    assert_statistics(before, zoo.brute_force(plain_normalised, params, x))
    assert_statistics(after, zoo.brute_force(plain_normalised, moved, x))


def test_a_layer_off_the_gradient_path_is_left_alone():
    class Branched(nn.Module):
        @nn.compact
        def __call__(self, x):
            dead = jax.lax.stop_gradient(nn.Dense(2, name="dead")(x))
            return nn.Dense(2, name="live")(x) + dead

    model, (_, x) = Branched(), zoo.MLP.example()
    params = zoo.randomise(model.init(jax.random.key(0), x))["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss = zoo.Case(model, x.shape, None).loss
    value_and_grad, tx = kfqn.value_and_grad(loss, layers), kfqn.kbfgs(0.1, layers)

    @quick_jit
    def step(params, opt_state):
        _, grads, curvature = value_and_grad(params, x)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, curvature.statistics

    before, opt_state, new = params, tx.init(params), params
    start = {name: factors(opt_state, name) for name in ("dead", "live")}
    for _ in range(3):
        new, opt_state, statistics = step(new, opt_state)
        assert statistics["dead"].rows == 0
        assert statistics["live"].rows == len(x)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, opt_state, statistics)))
    assert_equal((factors(opt_state, "dead"), new["dead"]), (start["dead"], before["dead"]))
    moved = zip(jax.tree.leaves(factors(opt_state, "live")), jax.tree.leaves(start["live"]), strict=True)
    assert all(np.any(ours != theirs) for ours, theirs in moved)
    report = kfqn.diagnostics(opt_state)["layers"]
    assert report["dead"]["input"]["taken"] == report["dead"]["output"]["taken"] == 0
    assert report["live"]["input"]["taken"] > 0


# ------------------------------------------------------------------------- forms of the parameter tree


class BoxedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        bias = nn.with_partitioning(nn.initializers.ones, ("out",))
        layer = nn.Dense(x.shape[-1], kernel_init=kernel, bias_init=bias, name="fc")
        return jnp.tanh(layer(x)), None


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            BoxedBlock,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "blocks"},
        )
        x, _ = body(name="blocks")(x, None)
        kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(2, kernel_init=kernel)(x)


def test_partitioned_parameters_stay_in_their_boxes():
    model, (_, x) = Boxed(), zoo.MLP.example()
    params = model.init(jax.random.key(0), x)["params"]
    assert params["blocks"]["fc"]["kernel"].names == ("in", "blocks", "out")
    plain = nn.meta.unbox(params)
    loss = zoo.Case(model, x.shape, None).loss
    layers = kfqn.find_layers(model, {"params": params}, x)
    assert layers == kfqn.find_layers(model, {"params": plain}, x)
    assert not layers.others
    tx = kfqn.kbfgs(0.1, layers)

    @quick_jit
    def run(params):
        def step(params):
            value, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x)
            updates, _ = tx.update(grads, tx.init(params), params, curvature=curvature)
            return value, grads, updates, zoo.essentials(curvature.statistics)

        return step(params), step(nn.meta.unbox(params))

    boxed, unboxed = run(params)
    for tree in boxed[1:3]:
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert_close(nn.meta.unbox(boxed), unboxed, rtol=1e-5)


def test_frozen_parameters_stay_frozen():
    params, x = zoo.MLP.example()

    @quick_jit
    def run(params):
        _, grads, curvature = capture(zoo.MLP, params, x)
        return (
            grads,
            zoo.essentials(curvature.statistics),
            zoo.essentials(curvature.after(grads).statistics),
        )

    grads, *statistics = run(flax.core.freeze(params))
    assert isinstance(grads, flax.core.FrozenDict)
    assert_equal((flax.core.unfreeze(grads), *statistics), run(params))


def squares(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) + optax.tree.norm(params)


def distance(params):
    """From a tree that is the user's."""
    ones = optax.tree.ones_like(zoo.MLP.example()[0])
    return sum(jax.tree.leaves(jax.tree.map(lambda leaf, one: jnp.sum((leaf - one) ** 2), params, ones)))


@pytest.mark.parametrize("penalty", [squares, distance])
def test_a_penalty_over_all_parameters_changes_no_statistic(penalty):
    params, x = zoo.MLP.example()

    def loss(params, x):
        return zoo.MLP.loss(params, x) + penalty(params)

    @quick_jit
    def run(params, x):
        reference = jax.value_and_grad(loss)(params, x), capture_essentials(zoo.MLP, params, x)[1]
        return reference, capture_essentials(zoo.MLP, params, x, loss)

    reference, ours = run(params, x)
    assert_close(ours, reference, rtol=1e-6)


# -------------------------------------------------------------------------------------------- two models


def dictionary(encoder, decoder):
    return {"encoder": encoder, "decoder": decoder}


def pair(encoder, decoder):
    return (encoder, decoder)


def sequence(encoder, decoder):
    return [encoder, decoder]


def numbered(encoder, decoder):
    return {0: encoder, 1: decoder}


class Named(NamedTuple):
    encoder: Any
    decoder: Any


class TwoModels:
    """An encoder and a decoder with the same paths, in parameters of a given form."""

    def __init__(self, form, dtype):
        encoder, decoder = zoo.Mlp(), zoo.Mlp()
        params_e, self.x = zoo.MLP.example(dtype)
        codes = jax.eval_shape(encoder.apply, {"params": params_e}, self.x)
        params_d = zoo.randomise(jax.eval_shape(decoder.init, jax.random.key(1), codes), dtype, 8)["params"]
        self.params = form(params_e, params_d)
        self.plain_params = {"0": params_e, "1": params_d}
        self.layers = kfqn.join_layers(
            form(
                kfqn.find_layers(encoder, {"params": params_e}, self.x),
                kfqn.find_layers(decoder, {"params": params_d}, codes),
            )
        )
        self.keys = ("encoder", "decoder") if form in (dictionary, Named) else (0, 1)
        self.models = (encoder, decoder)

    def loss(self, params, x):
        for model, key in zip(self.models, self.keys, strict=True):
            part = getattr(params, key) if isinstance(params, Named) else params[key]
            x = jnp.tanh(model.apply({"params": part}, x))
        return zoo.loss_of(x)

    def plain_loss(self, probe, params, x):
        for key in ("0", "1"):
            x = jnp.tanh(probe.dense(f"{key}/Dense_0", params[key]["Dense_0"], x))
            x = jnp.tanh(probe.dense(f"{key}/Dense_1", params[key]["Dense_1"], x))
        return zoo.loss_of(x)

    def name(self, plain_name):
        number, layer = plain_name.split("/")
        return f"{self.keys[int(number)]}/{layer}"


@pytest.mark.parametrize("form", [dictionary, pair, sequence, numbered, Named])
def test_two_models_with_the_same_paths_in_one_loss(float64, form):
    two = TwoModels(form, jnp.float64)

    @quick_jit
    def run(params, x):
        value, grads, curvature = kfqn.value_and_grad(two.loss, two.layers)(params, x)
        reference = jax.value_and_grad(two.loss)(params, x)
        return reference, (value, grads), zoo.essentials(curvature.statistics)

    reference, ours, statistics = run(two.params, two.x)
    expected = zoo.brute_force(two.plain_loss, two.plain_params, two.x)
    named = {two.name(plain_name): wanted for plain_name, wanted in expected.items()}
    assert statistics.keys() == named.keys()
    assert_statistics(statistics, named)
    assert_close(ours, reference)


def test_training_moves_both_models():
    two = TwoModels(pair, jnp.float32)
    tx = kfqn.kbfgs(0.1, two.layers)

    @quick_jit
    def step(params, opt_state):
        value, grads, curvature = kfqn.value_and_grad(two.loss, two.layers)(params, two.x)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, value

    params, opt_state, values = two.params, tx.init(two.params), []
    for _ in range(5):
        params, opt_state, value = step(params, opt_state)
        values.append(value)
    assert jax.tree.structure(params) == jax.tree.structure(two.params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(two.params), strict=True)
    assert all(np.all(new != old) for new, old in pairs)
    assert values == sorted(values, reverse=True)
    report = kfqn.diagnostics(opt_state)["layers"]
    assert report.keys() == {layer.name for layer in two.layers}
    assert all(layer["output"]["taken"] > 0 for layer in report.values())


def test_a_second_model_that_is_not_differentiated_is_left_alone(float64):
    """A teacher with the same paths, and the student's own frozen copy."""
    params, x = zoo.MLP.example(jnp.float64)
    teacher = zoo.randomise({"params": params}, seed=9)["params"]

    def apply(params, x):
        return zoo.MLP.model.apply({"params": params}, x)

    def loss(params, x):
        frozen = apply(jax.lax.stop_gradient(params), 2 * x)
        return zoo.loss_of(apply(params, x) - apply(teacher, 3 * x) - frozen)

    def plain(probe, params, x):
        own, other = zoo.plain_mlp(probe, params, x), zoo.plain_mlp(zoo.Probe(), teacher, 3 * x)
        frozen = zoo.plain_mlp(zoo.Probe(), jax.lax.stop_gradient(params), 2 * x)
        return zoo.loss_of(own - other - frozen)

    @quick_jit
    def run(params, x):
        return jax.value_and_grad(loss)(params, x), *capture_essentials(zoo.MLP, params, x, loss)

    reference, ours, statistics = run(params, x)
    assert_statistics(statistics, zoo.brute_force(plain, params, x))
    assert_close(ours, reference)


# --------------------------------------------------------------------------------------- the second pass


@pytest.mark.parametrize("name", ["compact", "scan, axis 1"])
def test_after_gives_the_statistics_at_the_moved_parameters(float64, name):
    case = zoo.CASES[name]
    params, x = case.example(jnp.float64)

    @quick_jit
    def run(params, x):
        _, grads, curvature = capture(case, params, x)
        updates = jax.tree.map(lambda grad: -0.3 * grad, grads)
        moved = optax.apply_updates(params, updates)
        return (
            moved,
            zoo.essentials(curvature.after(updates).statistics),
            capture_essentials(case, moved, x)[1],
        )

    moved, after, there = run(params, x)
    assert_close(after, there)
    assert_statistics(after, zoo.brute_force(case.plain_loss, moved, x))


def test_after_keeps_masked_parameters_where_they_are():
    """Masked leaf by leaf, as optax.masked does it, or a whole branch at once."""
    params, x = zoo.MLP.example()
    masked, zeros = optax.MaskedNode(), jnp.zeros((4, zoo.WIDTH))

    @quick_jit
    def run(params, x):
        _, grads, curvature = capture(zoo.MLP, params, x)
        branches = {"kernel": zeros}, {"kernel": masked}, masked
        return [
            zoo.essentials(curvature.after({**grads, "Dense_0": branch}).statistics) for branch in branches
        ]

    wanted, leaf, branch = run(params, x)
    assert_close(leaf, wanted, rtol=1e-6)
    assert_close(branch, wanted, rtol=1e-6)


def test_after_moves_parameters_in_their_own_type():
    """Updates are often wider than the parameters; the model must not see another dtype."""
    case = dataclasses.replace(zoo.MLP, model=zoo.Mlp(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    params, x = case.example(jnp.bfloat16)
    seen = []

    def loss(params, x):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return case.loss(params, x)

    def run(params, x):
        _, grads, curvature = capture(case, params, x, loss)
        return curvature.after(optax.tree.cast(grads, jnp.float32)).statistics

    jax.eval_shape(run, params, x)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_train_state_passes_curvature_on():
    params, x = zoo.MLP.example()
    received = []

    def update(updates, state, params=None, *, curvature=None, **extra_args):
        received.append(curvature)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    state = kfqn.TrainState.create(apply_fn=zoo.MLP.model.apply, params=params, tx=tx)

    def step(state):
        _, grads, curvature = capture(zoo.MLP, state.params, x)
        state = state.apply_gradients(grads=grads, curvature=curvature)
        assert received[-1] is curvature
        return state

    assert jax.eval_shape(step, state).step.dtype == jnp.int32
