"""The quadratic rule: its coefficients against NumPy, its damping, and training with every kind of side."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax._steps.quadratic import minimum, shortened
from kfqn_optax.bench._quick import quick_jit


def model_value(matrix, slopes, c):
    return c @ slopes + 0.5 * c @ matrix @ c


@pytest.mark.parametrize("seed", range(5))
def test_the_coefficients_minimise_the_model(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 2)) * np.array([[1.0], [1e-3]])
    matrix = root @ root.T
    slopes = -matrix @ np.array([rng.normal(), rng.uniform(-1, 1)])
    with jax.enable_x64(True):
        got = np.asarray(minimum(jnp.asarray(matrix), jnp.asarray(slopes)))
    np.testing.assert_allclose(got, -np.linalg.solve(matrix, slopes), rtol=1e-8)


@pytest.mark.parametrize("second", [-3.0, 2.0])
def test_the_second_coefficient_is_between_minus_one_and_one(second):
    matrix = np.array([[2.0, 0.7], [0.7, 1.0]])
    slopes = -matrix @ np.array([0.5, second])
    got = np.asarray(minimum(jnp.float32(matrix), jnp.float32(slopes)))
    bound = np.sign(second)
    grid = np.stack(np.meshgrid(np.linspace(-4, 4, 801), [bound]), axis=-1).reshape(-1, 2)
    best = min(grid, key=lambda c: model_value(matrix, slopes, c))
    np.testing.assert_allclose(got, best, atol=0.011)
    assert got[1] == bound


def test_units_of_the_directions_do_not_matter():
    matrix, slopes = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([-1.0, 0.3])
    units = np.array([1e6, 1.0])
    plain = minimum(jnp.float32(matrix), jnp.float32(slopes))
    scaled = minimum(jnp.float32(matrix * np.outer(units, units)), jnp.float32(slopes * units))
    np.testing.assert_allclose(scaled * units, plain, rtol=1e-4)


def test_parallel_directions_and_a_missing_one_leave_the_first_alone():
    first = jnp.array([-0.5, 0.0])
    parallel = minimum(jnp.array([[4.0, 8.0], [8.0, 16.0]]), jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(parallel, first)
    np.testing.assert_allclose(minimum(jnp.array([[4.0, 0], [0, 0]]), jnp.array([2.0, 0])), first)
    np.testing.assert_array_equal(minimum(jnp.zeros((2, 2)), jnp.zeros(2)), 0)


@pytest.mark.parametrize("matrix", [[[-4.0, 0.3], [0.3, 1.0]], [[1.0, 3.0], [3.0, 1.0]]])
def test_an_indefinite_model_is_taken_by_the_magnitude_of_its_eigenvalues(matrix):
    matrix, slopes = np.array(matrix), np.array([-0.4, 0.2])
    scale = np.sqrt(np.abs(np.diagonal(matrix)))
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    positive = vectors @ np.diag(np.abs(values)) @ vectors.T * np.outer(scale, scale)
    got = minimum(jnp.float32(matrix), jnp.float32(slopes))
    np.testing.assert_allclose(got, -np.linalg.solve(positive, slopes), rtol=1e-4)
    assert got @ slopes < 0


def test_a_step_along_which_the_loss_rose_ends_at_the_parabolas_minimum():
    loss = lambda t: 3.0 - t + 1.5 * t**2
    share = shortened(slope=jnp.float32(1.0), change=jnp.float32(loss(1.0) - loss(0.0)))
    assert share == pytest.approx(1 / 3)
    assert shortened(jnp.float32(1.0), jnp.float32(jnp.inf)) == 0
    assert shortened(jnp.float32(-1.0), jnp.float32(1.0)) == 0
    assert shortened(jnp.float32(1.0), jnp.float32(0.0)) == 0.5


# In training

ROWS, IN = 24, 6


def batch(seed, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=(ROWS, IN))
    return jnp.asarray(x, dtype), jnp.asarray(np.abs(x[:, :3]).argmax(1))


def stepper(value_and_grad, tx):
    """A compiled step (params, state, *batch) -> (params, state, loss)."""

    @quick_jit
    def step(params, state, *batch):
        loss, grads, curvature = value_and_grad(params, *batch)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    return step


def compiled(scale, dtype):
    """A train step of kfac with the quadratic rule, the parameters and the state that it starts from."""
    model = nn.Sequential([nn.Dense(5, param_dtype=dtype), nn.tanh, nn.Dense(3, param_dtype=dtype)])
    x, _ = batch(0, dtype)
    params = quick_jit(model.init)(jax.random.key(1), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    tx = kfqn.kfac(1.0, layers)

    def loss_fn(params, x, labels):
        z = kfqn.outputs(model.apply({"params": params}, x), "categorical")
        return scale * optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    return stepper(value_and_grad, tx), params, tx.init(params)


compiled_once = functools.cache(compiled)


class Training:
    def __init__(self, start=None):
        self.train_step, self.params, self.state = start or compiled_once(1.0, "float32")

    def step(self, x, labels):
        self.params, self.state, loss = self.train_step(self.params, self.state, x, labels)
        return float(loss)

    @property
    def ours(self):
        return self.state[0]


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_a_factor_of_the_loss_changes_no_step(scale, monkeypatch):
    """Where the same labels are drawn: otherwise they depend on the bits of the outputs."""
    monkeypatch.setattr("kfqn_optax._capture.outputs.bits_of", lambda array: 0)
    with jax.enable_x64(True):
        plain, scaled = (Training(compiled(factor, "float64")) for factor in (1.0, scale))
        for k in range(8):
            before = plain.params
            loss, scaled_loss = (training.step(*batch(k, "float64")) for training in (plain, scaled))
            np.testing.assert_allclose(scaled_loss, scale * loss, rtol=1e-4)
            moved, expected = (
                jax.tree.map(jnp.subtract, after.params, before) for after in (scaled, plain)
            )
            for ours, theirs in zip(*map(jax.tree.leaves, (moved, expected)), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
        np.testing.assert_allclose(scaled.ours.rule.scale, plain.ours.rule.scale, rtol=1e-6)
        np.testing.assert_allclose(scaled.ours.damping, scale * plain.ours.damping, rtol=1e-4)
    assert plain.ours.rule.mu != 0


@pytest.mark.parametrize("when", [0, 2, 7], ids=lambda k: f"after {k}")
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_batch_that_is_not_finite_leaves_everything_but_the_counts(value, when):
    training = Training()
    for k in range(when):
        training.step(*batch(k))
    params, before = training.params, training.ours
    x, labels = batch(50)
    training.step(x.at[1, 1].set(value), labels)
    after = training.ours
    assert (after.count, after.rejected, after.share) == (when + 1, 1, 0)
    counts = dict(count=before.count, rejected=before.rejected, share=before.share)
    jax.tree.map(np.testing.assert_array_equal, after._replace(**counts), before)
    jax.tree.map(np.testing.assert_array_equal, training.params, params)
    losses = [training.step(*batch(0)) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_an_outlier_among_the_inputs_does_not_make_the_loss_explode():
    training = Training()
    for k in range(15):
        training.step(*batch(k))
    before = training.step(*batch(100))
    x, labels = batch(50)
    training.step(x.at[1, 1].set(1e6), labels)
    losses = [training.step(*batch(100 + k)) for k in range(20)]
    assert np.isfinite(losses).all()
    assert max(losses) < 2 * before


def regression():
    """A small network's parameters, its layers, and the loss of one batch."""
    model = nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(1)])
    x = jax.random.normal(jax.random.key(0), (32, 3))
    start = quick_jit(model.init)(jax.random.key(1), x)["params"]

    def loss_fn(params):
        z = kfqn.outputs(model.apply({"params": params}, x)[:, 0], "normal")
        return jnp.mean(jnp.square(z - jnp.sin(3 * x).sum(1)))

    return start, kfqn.find_layers(model, {"params": start}, x), loss_fn


@pytest.mark.parametrize(("rise", "patience", "gain"), [(0.0, 3, 1), (0.3, 3, 0.7**2), (0.3, None, 1)])
def test_steps_are_shorter_where_new_batches_have_larger_losses(rise, patience, gain):
    """Whatever the model's success: the loss of each batch is the same function, the higher the later."""
    params, layers, loss_fn = regression()
    value_and_grad = kfqn.value_and_grad(lambda params, height: loss_fn(params) + height, layers)
    tx = kfqn.kfac(1.0, layers, damping=0.1, step_rule=kfqn.quadratic(patience=patience))
    step = stepper(value_and_grad, tx)
    state = tx.init(params)
    for k in range(11):  # runs of 3, 3 and 5 batches
        params, state, _ = step(params, state, rise * k)
    rule = state[0].rule
    assert rule.scale < 1.01  # the model is right about its own batch
    assert rule.gain == pytest.approx(gain)
    whole = state[0]._replace(rule=rule._replace(gain=jnp.ones([])))
    ours, of_model = (step(params, (x, *state[1:]), 0.0)[1][0].rule.last for x in (state[0], whole))
    for made, full in zip(*map(jax.tree.leaves, (ours, of_model)), strict=True):
        np.testing.assert_allclose(made, gain * full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("wall", "rises"), [(1.0, 0), (100.0, 2)])
def test_the_damping_rises_at_once_where_little_of_a_step_is_left(wall, rises):
    """The loss is higher by a wall everywhere but where the parameters are, which no derivative tells."""
    start, layers, loss_fn = regression()

    def walled(params):
        moved = (params["layers_0"]["bias"] != start["layers_0"]["bias"]).any()
        return loss_fn(params) + wall * moved

    value_and_grad, tx = kfqn.value_and_grad(walled, layers), kfqn.kfac(1.0, layers)
    step = stepper(value_and_grad, tx)
    state = tx.init(start)
    for _ in range(2):
        _, state, _ = step(start, state)
        rule = state[0].rule
        assert rule.ratio == -1
        assert (rule.share < 0.1) == bool(rises)
    assert rule.scale == pytest.approx(10 * 0.7 ** (-5 * rises))


@pytest.mark.parametrize(
    ("rate", "scales"), [(0.5, [10, 10 / 2**5, 10 / 2**5, 10 / 2**5, 10 / 2**10]), (1.0, [1] * 5)]
)
def test_the_damping_starts_high_and_may_fall_after_the_second_step(rate, scales):
    start, layers, loss_fn = regression()
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)
    tx = kfqn.kfac(1.0, layers, step_rule=kfqn.quadratic(rate=rate, floor=1e-3))
    step = stepper(value_and_grad, tx)
    params, state, found = start, tx.init(start), []
    for _ in scales:
        params, state, _ = step(params, state)
        found.append(state[0].rule.scale)
    np.testing.assert_allclose(found, scales, rtol=1e-6)


@pytest.mark.parametrize(("height", "first", "least"), [(0.0, 1.0, 0.2), (300.0, 0.01, 2e-5)])
def test_the_damping_falls_faster_and_below_its_floor_on_a_plateau_alone(height, first, least):
    """Below a height of the loss that no parameter changes, a good step promises little of it."""
    start, layers, loss_fn = regression()
    value_and_grad = kfqn.value_and_grad(lambda params, height: loss_fn(params) + height, layers)
    tx = kfqn.kfac(1.0, layers, step_rule=kfqn.quadratic(every=1, rate=0.1, floor=0.2))
    step = stepper(value_and_grad, tx)
    params, state, _ = step(start, tx.init(start), height)
    assert state[0].rule.scale == pytest.approx(first)
    for _ in range(4):
        params, state, _ = step(params, state, height)
    rule = state[0].rule
    assert rule.scale == pytest.approx(least)
    behind = state[0]._replace(rule=rule._replace(level=jnp.ones([])))
    assert step(params, (behind, *state[1:]), 0.0)[1][0].rule.scale == pytest.approx(0.2)


@pytest.mark.parametrize(("apart", "least"), [(0.0, 0.05), (1.0, 1.0)])
def test_the_damping_falls_no_further_than_the_given_one_where_batches_are_noise(apart, least):
    """Each batch has labels of its own, ``apart`` from those of the others: a step helps no other batch."""
    model, x = nn.Dense(1), jax.random.normal(jax.random.key(0), (64, 64))
    start = quick_jit(model.init)(jax.random.key(1), x)["params"]

    def loss_fn(params, y):
        z = kfqn.outputs(model.apply({"params": params}, x)[:, 0], "normal")
        return jnp.mean(jnp.square(z - y))

    layers = kfqn.find_layers(model, {"params": start}, x)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers)
    tx = kfqn.kfac(1.0, layers)
    step = stepper(value_and_grad, tx)
    params, state = start, tx.init(start)
    for key in jax.random.split(jax.random.key(2), 40):
        params, state, _ = step(params, state, x[:, 0] + apart * jax.random.normal(key, (64,)))
    assert state[0].rule.scale == pytest.approx(least, rel=0.2)


@pytest.mark.parametrize(("mark", "kept"), [("categorical", True), (None, False)])
def test_the_damping_keeps_a_part_of_the_early_loss_where_all_marks_are_of_classes(mark, kept):
    """Of a loss that falls to a thousandth, by its damping in units of 1 / |params|^2."""
    model, (x, _) = nn.Dense(3), batch(0)
    labels = x[:, :3].argmax(1)
    params = quick_jit(model.init)(jax.random.key(1), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss_fn(params):
        z = kfqn.outputs(model.apply({"params": params}, x), mark)
        return optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()

    tx = kfqn.kfac(1.0, layers)
    step = stepper(kfqn.value_and_grad(loss_fn, layers), tx)
    state, losses, levels = tx.init(params), [], []
    for _ in range(120):
        size, scale = optax.tree.norm(params, squared=True), state[0].rule.scale
        params, state, loss = step(params, state)
        losses.append(float(loss))
        levels.append(float(kfqn.diagnostics(state)["damping"] * size / scale))
    assert losses[-1] < 1e-3 * losses[0]
    assert (levels[-1] > 1e-3 * losses[0]) == kept


@pytest.mark.parametrize(("settings", "scales"), [({"ceiling": 30.0}, [30.0]), ({"rate": 1.0}, [1.0])])
def test_the_damping_stays_within_its_bounds_where_every_step_fails(settings, scales):
    start, layers, loss_fn = regression()

    def walled(params):
        moved = (params["layers_0"]["bias"] != start["layers_0"]["bias"]).any()
        return loss_fn(params) + 100.0 * moved

    tx = kfqn.kfac(1.0, layers, step_rule=kfqn.quadratic(**settings))
    step = stepper(kfqn.value_and_grad(walled, layers), tx)
    state = tx.init(start)
    for _ in range(6):
        _, state, _ = step(start, state)
    np.testing.assert_allclose([state[0].rule.scale], scales, rtol=1e-6)


def test_no_step_is_longer_than_twice_those_before():
    training = Training()
    longest = []
    for k in range(12):
        rule = training.ours.rule
        before = max(float(rule.length), float(optax.tree.norm(rule.last)))
        x, labels = batch(k)
        training.step(x * (30.0 if k == 8 else 1.0), labels)
        length = float(optax.tree.norm(training.ours.rule.last))
        longest.append(length / before if before else 0.0)
    assert max(longest) <= 2 * (1 + 1e-5)
    assert max(longest) > 0.5


def test_steps_of_length_zero_do_not_end_the_training():
    model, x = nn.Dense(2), jnp.ones((4, 3))
    params = quick_jit(model.init)(jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, weight: (
        weight * jnp.mean(kfqn.outputs(model.apply({"params": params}, x), "normal") ** 2)
    )
    value_and_grad, tx = kfqn.value_and_grad(loss_fn, layers), kfqn.kfac(1.0, layers)
    step = stepper(value_and_grad, tx)
    state, losses = tx.init(params), []
    for weight in (0.0, 0.0, 1.0, 0.0, 1.0, 1.0):
        params, state, loss = step(params, state, weight)
        losses.append(float(loss))
    assert 0 < losses[-1] < losses[4] < losses[2]


@pytest.mark.parametrize(
    ("mark", "argnums", "expected"),
    [
        (lambda z: kfqn.outputs(z, "normal"), 1, 3),
        (lambda z: kfqn.outputs(z.reshape(-1), "normal"), 1, 3 * ROWS),
        (jax.vmap(lambda z: kfqn.outputs(z, "normal")), 1, 3),
        (lambda z: kfqn.outputs(z[:, :2]) @ jnp.ones((2, 3)) + kfqn.outputs(z), 1, 5),
        (lambda z: z, 1, 0),
        (lambda z: kfqn.outputs(z, "normal"), None, 3 * ROWS),
    ],
    ids=["batched", "flat", "vmap", "two", "none", "no argnums"],
)
def test_the_outputs_of_an_example_are_counted(mark, argnums, expected):
    model, (x, _) = nn.Dense(3), batch(0)
    params = model.init(jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    loss_fn = lambda params, x: jnp.mean(mark(model.apply({"params": params}, x)) ** 2)
    _, _, curvature = kfqn.value_and_grad(loss_fn, layers, batch_argnums=argnums)(params, x)
    assert curvature.outputs == expected
