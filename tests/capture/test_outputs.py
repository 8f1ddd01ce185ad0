"""``outputs``: forms and factor statistics against dense Gauss-Newton matrices, made of Jacobians."""

import functools
import gc

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax._capture.outputs import root
from kfqn_optax._capture.parts import Parts
from kfqn_optax.bench._quick import quick_jit

ROWS, WIDTH, CLASSES = 6, 3, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, WIDTH))
TARGET, LABELS = RNG.normal(size=(ROWS, CLASSES)), RNG.integers(CLASSES, size=ROWS)
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def squared(z):
    return 0.7 * jnp.mean((z - jnp.asarray(TARGET[: len(z)])) ** 2)


def bernoulli(z):
    """A mean over examples with weights and a mask over elements."""
    target, mask = jnp.asarray(TARGET[: len(z)] > 0, z.dtype), jnp.asarray(TARGET[: len(z)] < 1, z.dtype)
    losses = optax.sigmoid_binary_cross_entropy(z, target)
    return (losses * mask * jnp.asarray(WEIGHTS[: len(z), None])).sum() / len(z)


def categorical(z):
    losses = optax.softmax_cross_entropy_with_integer_labels(z, jnp.asarray(LABELS[: len(z)]))
    return (losses * jnp.asarray(WEIGHTS[: len(z)])).sum() / WEIGHTS[: len(z)].sum()


LOSSES = {"normal": squared, "bernoulli": bernoulli, "categorical": categorical}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, shifts=None):
        h = nn.Dense(5, name="first")(x)
        h = h if shifts is None else h + shifts["first"]
        z = nn.Dense(CLASSES, name="second")(jnp.tanh(h))
        return z if shifts is None else z + shifts["second"]


MODEL = Net()


def problem(distribution, model=MODEL, x=X):
    """The layers, parameters and loss of ``(params, x)``, and the same loss as a function of z."""
    x = jnp.asarray(x)
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    layers = kfqn.find_layers(model, {"params": params}, x)
    head = LOSSES[distribution]

    def loss(params, x):
        return head(kfqn.outputs(model.apply({"params": params}, x), distribution))

    return layers, params, loss, head, x


def through(function, z_of, params):
    """J^T (d^2 l / dz^2) J for ``function`` of z, as a matrix in the flattened parameters."""
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(lambda v: z_of(unflatten(v)).ravel())(flat)
    z = z_of(params)
    hessian = jax.hessian(lambda v: function(v.reshape(z.shape)))(z.ravel())
    return jacobian.T @ hessian @ jacobian


def directions_of(params, count=3):
    keys = jax.random.split(jax.random.key(5), count)
    return [optax.tree.random_like(key, params) for key in keys]


def flattened(trees):
    return jnp.stack([jax.flatten_util.ravel_pytree(tree)[0] for tree in trees])


def close(ours, expected, rtol=1e-11):
    np.testing.assert_allclose(ours, expected, rtol, rtol * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("distribution", [None, *LOSSES])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_an_identity_in_value_and_gradient(distribution, dtype):
    z = jnp.arange(6, dtype=dtype).reshape(2, 3)
    np.testing.assert_array_equal(kfqn.outputs(z, distribution), z)
    assert kfqn.outputs(z, distribution).dtype == dtype
    f = lambda z: (z**3).sum()
    grads = jax.grad(lambda z: f(kfqn.outputs(z, distribution)))(z)
    np.testing.assert_array_equal(grads, jax.grad(f)(z))


def test_the_main_pass_is_as_without_a_mark(float64):
    layers, params, loss, head, x = problem("categorical")
    plain = lambda params, x: head(MODEL.apply({"params": params}, x))

    def everything(function, params):
        value, grads, curvature = kfqn.value_and_grad(function, layers)(params, x)
        scaled = lambda c: function(jax.tree.map(lambda p: c * p, params), x)
        return value, grads, curvature.statistics, jax.hessian(scaled)(1.0)

    run = quick_jit(lambda params: (everything(loss, params), everything(plain, params)))
    ours, expected = run(params)
    jax.tree.map(functools.partial(close, rtol=1e-13), ours, expected)


@pytest.mark.parametrize(
    ("z", "distribution", "message"),
    [
        (jnp.ones(3), "softmax", "'softmax' is none of 'bernoulli', 'categorical', 'normal'"),
        (jnp.ones(3, int), None, "array of int32"),
        ([jnp.ones(3)], None, "a list"),
        (jnp.ones([]), "categorical", "scalar"),
    ],
)
def test_errors_name_what_was_given(z, distribution, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: kfqn.outputs(z, distribution))


# ---------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize("distribution", LOSSES)
def test_forms_are_those_of_the_dense_gauss_newton_matrix(float64, distribution):
    layers, params, loss, head, x = problem(distribution)
    directions = directions_of(params)

    @quick_jit
    def run(params):
        _, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        dense = through(head, lambda p: MODEL.apply({"params": p}, x), params)
        return curvature.forms(directions), dense, loss(params, x), grads

    ours, dense, value, grads = run(params)
    u = flattened(directions)
    close(ours.matrix, u @ dense @ u.T)
    close(ours.slopes, u @ flattened([grads])[0])
    close(ours.value, value)


def test_marks_add_up_and_a_penalty_has_its_own_second_derivatives(float64):
    layers, params, _, _, x = problem("normal")
    z_of = lambda p: MODEL.apply({"params": p}, x)
    w_of = lambda p: jnp.sin(z_of(p))[:, :2]
    penalty = lambda p: 0.3 * sum((leaf**2).sum() for leaf in jax.tree.leaves(p))

    def loss(params, x):
        first = squared(kfqn.outputs(z_of(params), "normal"))
        second = jnp.mean(jnp.cosh(kfqn.outputs(w_of(params))))
        return first + second + penalty(params)

    directions = directions_of(params)

    @quick_jit
    def run(params):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        dense = through(squared, z_of, params) + through(lambda w: jnp.mean(jnp.cosh(w)), w_of, params)
        return curvature.forms(directions).matrix, dense

    ours, dense = run(params)
    u = flattened(directions)
    close(ours, u @ (dense + 0.6 * np.eye(len(dense))) @ u.T)


def test_without_a_mark_forms_are_the_loss_s_own(float64):
    layers, params, _, head, x = problem("categorical")
    loss = lambda params, x: head(MODEL.apply({"params": params}, x))
    directions = directions_of(params)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)

    @quick_jit
    def run(params):
        _, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        return curvature.forms(directions), jax.hessian(lambda v: loss(unflatten(v), x))(flat), grads

    ours, dense, grads = run(params)
    u = flattened(directions)
    close(ours.matrix, u @ dense @ u.T)
    close(ours.slopes, u @ flattened([grads])[0])


def test_masked_leaves_of_a_direction_count_as_zero(float64):
    layers, params, loss, _, x = problem("normal")
    one, other = directions_of(params, 2)
    masked = lambda u: {"first": optax.MaskedNode(), "second": {**u["second"], "bias": optax.MaskedNode()}}
    zeroed = lambda u: {
        "first": optax.tree.zeros_like(u["first"]),
        "second": {**u["second"], "bias": jnp.zeros(CLASSES)},
    }

    @quick_jit
    def run(params):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        updates = curvature.value_at(masked(one)), curvature.value_at(zeroed(one))
        forms = [
            curvature.forms([place(one), place_other(other)])
            for place, place_other in ((masked, masked), (masked, lambda u: u))
        ]
        expected = [
            curvature.forms([zeroed(one), place_other(other)]) for place_other in (zeroed, lambda u: u)
        ]
        return updates, forms, expected

    (moved, expected_value), ours, expected = run(params)
    close(moved, expected_value)
    jax.tree.map(close, ours, expected)


def test_forms_of_bfloat16_parameters_are_float32():
    layers, params, loss, _, x = problem("normal")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    @quick_jit
    def run(params):
        _, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x.astype(jnp.bfloat16))
        return curvature.forms([jax.tree.map(lambda g: g.astype(jnp.float32), grads)])

    forms = run(params)
    assert {leaf.dtype for leaf in forms} == {jnp.dtype(jnp.float32)}
    assert forms.matrix[0, 0] > 0


def test_errors_of_forms():
    layers, params, loss, _, x = problem("normal")
    _, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x)
    with pytest.raises(ValueError, match="one tree at least"):
        curvature.forms([])
    with pytest.raises(ValueError, match="list of trees"):
        curvature.forms(grads)
    wrong = {**grads, "first": {"kernel": jnp.ones(2), "bias": jnp.ones(5)}}
    with pytest.raises(ValueError, match=r"shape \(2,\) at 'first/kernel', where .* of shape \(3, 5\)"):
        curvature.forms([wrong])
    with pytest.raises(ValueError, match="rows=0"):
        curvature.forms([grads], rows=0)


# --------------------------------------------------------------------------------------------------- a draw


@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_the_root_is_exact_for_every_label(float64, weight):
    """sum_y p_y g(y) g(y)^T = w F, whatever the probe, and for a class of two."""
    for z in (jnp.array([0.3, -1.0, 2.0, 0.0]), jnp.array([5.0, -5.0]), jnp.zeros(3)):
        p = jax.nn.softmax(z)
        fisher = jnp.diag(p) - jnp.outer(p, p)
        for probe in (jnp.eye(len(z))[0], jnp.arange(float(len(z)))):
            draws = [
                root("categorical", weight * fisher @ probe, z, probe, p - row) for row in jnp.eye(len(z))
            ]
            moment = sum(p[y] * jnp.outer(g, g) for y, g in enumerate(draws))
            np.testing.assert_allclose(moment, weight * fisher, atol=1e-14)


def test_a_row_certain_of_its_class_has_no_part():
    z, probe = jnp.array([60.0, 0.0]), jnp.array([1.0, 0.0])
    assert (root("categorical", jnp.full(2, 1e-9), z, probe, jnp.array([0.0, 1.0])) == 0).all()


@pytest.mark.parametrize("distribution", ["bernoulli", "normal"])
def test_squares_of_a_draw_are_the_diagonal(float64, distribution):
    """At the output layer itself, element by element, in every draw."""
    layers, params, loss, head, x = problem(distribution)
    z = MODEL.apply({"params": params}, x)
    diagonal = jnp.diagonal(jax.hessian(lambda v: head(v.reshape(z.shape)))(z.ravel())).reshape(z.shape)

    @quick_jit
    def draw(key):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        return curvature.factor_statistics(key=key)["second"].grad_moment

    for key in range(3):
        moment = draw(key)
        close(jnp.diagonal(moment), diagonal.sum(0))


def blocks(loss_of_shifts, z_of, head, shifts):
    """For each layer the sum over rows of J_row^T (d^2 l / dz^2) J_row for shifts (*rows, d_out)."""
    z = z_of(shifts)
    hessian = jax.hessian(lambda v: head(v.reshape(z.shape)))(z.ravel())
    found = {}
    for name, shift in shifts.items():
        jacobian = jax.jacobian(lambda s, name=name: z_of({**shifts, name: s}).ravel())(shift)
        rows = jacobian.reshape(z.size, -1, shift.shape[-1])
        found[name] = jnp.einsum("zri,zy,yrj->ij", rows, hessian, rows)
    return found


def check_average(samples, expected):
    """To five standard errors, element by element."""
    samples = np.asarray(samples)
    error = samples.std(0) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) <= 5 * error + 1e-9).all()


def moments(loss, layers, params, *args, count=600, **kwargs):
    """The sampled second moments of so many keys, (count, ...) by layer."""

    @quick_jit
    @jax.vmap
    def run(key):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, *args)
        return {n: one.grad_moment for n, one in curvature.factor_statistics(key=key, **kwargs).items()}

    return run(jax.random.split(jax.random.key(2), count))


@pytest.mark.parametrize("distribution", LOSSES)
def test_draws_have_the_dense_blocks_on_average(float64, distribution):
    layers, params, loss, head, x = problem(distribution)
    shifts = {"first": jnp.zeros((ROWS, 5)), "second": jnp.zeros((ROWS, CLASSES))}
    expected = quick_jit(
        lambda: blocks(None, lambda s: MODEL.apply({"params": params}, x, s), head, shifts)
    )()
    drawn = moments(loss, layers, params, x)
    for name, block in expected.items():
        check_average(drawn[name], block)


def test_two_marks_add_up_and_one_without_a_name_counts_as_normal(float64):
    layers, params, _, _, x = problem("normal")

    def head(z):
        return categorical(z) + jnp.mean(jnp.cosh(jnp.sin(z)))

    def loss(params, x):
        z = MODEL.apply({"params": params}, x)
        return categorical(kfqn.outputs(z, "categorical")) + jnp.mean(jnp.cosh(kfqn.outputs(jnp.sin(z))))

    z_of = lambda s: MODEL.apply({"params": params}, x, s)
    shifts = {"first": jnp.zeros((ROWS, 5)), "second": jnp.zeros((ROWS, CLASSES))}
    cosh = lambda w: jnp.mean(jnp.cosh(w))
    one = quick_jit(lambda: blocks(None, z_of, categorical, shifts))()
    other = quick_jit(lambda: blocks(None, lambda s: jnp.sin(z_of(s)), cosh, shifts))()
    drawn = moments(loss, layers, params, x)
    for name in one:
        check_average(drawn[name], one[name] + other[name])


def around(form):
    """The loss of ``problem("categorical")`` on the same numbers, with something around model and mark."""

    def loss(params, x):
        def of_rows(params, x, labels, weights):
            z = kfqn.outputs(MODEL.apply({"params": params}, x), "categorical")
            losses = optax.softmax_cross_entropy_with_integer_labels(z, labels)
            return (losses * weights).sum() / WEIGHTS.sum()

        batch = x, jnp.asarray(LABELS), jnp.asarray(WEIGHTS)
        if form == "jit":
            return jax.jit(of_rows)(params, *batch)
        if form == "remat":
            return jax.checkpoint(of_rows)(params, *batch)
        if form == "vmap":
            return jax.vmap(of_rows, (None, 0, 0, 0))(params, *batch).sum()

        def step(total, row):
            return total + of_rows(params, *row), None

        step = jax.checkpoint(step) if form == "scan of remat" else step
        return jax.lax.scan(step, jnp.zeros([], x.dtype), batch)[0]

    return loss


@pytest.mark.parametrize("form", ["jit", "remat", "vmap", "scan", "scan of remat"])
def test_marks_inside_transformations(float64, form):
    layers, params, plain, head, x = problem("categorical")
    loss = around(form)
    directions = directions_of(params, 2)

    def everything(loss):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        return curvature.forms(directions), {
            name: (one.rows, one.second_moment) for name, one in curvature.factor_statistics(key=1).items()
        }

    ours, expected = quick_jit(lambda: (everything(loss), everything(plain)))()
    jax.tree.map(close, ours, expected)
    shifts = {"first": jnp.zeros((ROWS, 5)), "second": jnp.zeros((ROWS, CLASSES))}
    dense = quick_jit(lambda: blocks(None, lambda s: MODEL.apply({"params": params}, x, s), head, shifts))()
    drawn = moments(loss, layers, params, x, count=300)
    for name, block in dense.items():
        check_average(drawn[name], block)


def test_no_tracer_leaks_through_a_function_that_is_jitted_on_its_own():
    layers, params, _, _, x = problem("categorical")
    value_and_grad = kfqn.value_and_grad(around("jit"), layers)

    def twice(params):
        for key in (1, 2):
            _, grads, curvature = value_and_grad(params, x)
            yield curvature.factor_statistics(key=key), curvature.forms([grads])

    gc.collect()
    gc.freeze()  # the check asks of every object whether it holds a tracer: those of before cannot
    try:
        with jax.checking_leaks():
            first, second = (jax.eval_shape(lambda p: list(twice(p)), params) for _ in range(2))
    finally:
        gc.unfreeze()
    assert first == second


def test_draws_differ_with_the_key_and_are_by_default_those_of_seed_0():
    layers, params, loss, _, x = problem("categorical")

    @quick_jit
    def run(x):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        typed, raw = jax.random.key(1), jax.random.key_data(jax.random.key(1))
        keys = (None, 0, 1, typed, raw, jnp.asarray(1), 2)
        return [curvature.factor_statistics(key=key)["first"].grad_moment for key in keys]

    default, zero, *same, other = map(np.asarray, run(x))
    np.testing.assert_array_equal(default, zero)
    for moment in same[1:]:
        np.testing.assert_array_equal(moment, same[0])
    assert np.abs(other - same[0]).max() > 1e-3
    np.testing.assert_array_equal(run(x)[0], default)


# ----------------------------------------------------------------------------------- without a distribution


def test_centred_moments_are_covariances(float64):
    layers, params, _, head, x = problem("normal")
    shifts = {"first": jnp.zeros((ROWS, 5)), "second": jnp.zeros((ROWS, CLASSES))}

    @quick_jit
    def run():
        loss = lambda params, x: head(kfqn.outputs(MODEL.apply({"params": params}, x)))
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        g = jax.grad(lambda s: head(MODEL.apply({"params": params}, x, s)))(shifts)
        return curvature.factor_statistics(), curvature.statistics, g

    ours, plain, grads = run()
    for name, g in grads.items():
        close(ours[name].grad_moment, np.cov(ROWS * g.T, bias=True))
        close(ours[name].second_moment, plain[name].second_moment)


def test_a_convolution_is_centred_over_its_positions(float64):
    model, x = (
        nn.Conv(2, (2,), padding="VALID", param_dtype=jnp.float64),
        jnp.asarray(RNG.normal(size=(4, 6, 3))),
    )
    params = model.init(jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss(params, x, shift=0.0):
        return jnp.mean(jnp.cos(model.apply({"params": params}, x) + shift))

    @quick_jit
    def run():
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        return curvature.factor_statistics()["."].grad_moment, jax.grad(loss, 2)(
            params, x, jnp.zeros((4, 5, 2))
        )

    ours, g = run()
    g = 4 * np.asarray(g)  # of one example's loss
    centred = (g - g.mean((0, 1))).reshape(-1, 2)
    close(ours, centred.T @ centred / 4)


# ------------------------------------------------------------------------------- some of the examples


def test_forms_and_factors_take_parts_of_the_batch(float64):
    layers, params, _, _, x = problem("normal")

    def loss(params, x, batch):
        z = kfqn.outputs(MODEL.apply({"params": params}, x), "normal")
        return jnp.mean((z - batch["target"]) ** 2)

    batch = {"target": jnp.asarray(TARGET)}
    directions = directions_of(params, 2)
    chosen = Parts().of_factors(ROWS, 2)[0], Parts().of_model(ROWS, 2)[0]
    seen, held_out = [(x[part], {"target": batch["target"][part]}) for part in chosen]

    @quick_jit
    def run():
        value_and_grad = kfqn.value_and_grad(loss, layers, batch_argnums=(1, 2))
        _, _, curvature = value_and_grad(params, x, batch)
        assert curvature.examples == ROWS
        assert curvature.after(params).examples == ROWS
        ours = (
            curvature.forms(directions, rows=2),
            curvature.value_at(directions[0], rows=2),
            curvature.factor_statistics(rows=2, key=3),
            curvature.after(directions[0]).forms(directions, rows=2),
            curvature.forms(directions, rows=100),
        )
        _, _, of_held_out = kfqn.value_and_grad(loss, layers)(params, *held_out)
        _, _, of_seen = kfqn.value_and_grad(loss, layers)(params, *seen)
        assert of_seen.examples is None
        expected = (
            of_held_out.forms(directions),
            of_held_out.value_at(directions[0], rows=1),
            of_seen.factor_statistics(key=3),
            of_held_out.after(directions[0]).forms(directions),
            curvature.forms(directions),
        )
        return ours, expected

    jax.tree.map(close, *run())


@pytest.mark.parametrize(
    ("argnums", "args", "message"),
    [
        ((1, 2), (X, TARGET[:3]), r"argument 1: \[\(6, 3\)\]; argument 2: \[\(3, 4\)\]"),
        ((1, 2), (X, 1.0), r"argument 2: \[\(\)\]"),
        ((1, 2), (X, ()), None),
        (3, (X, TARGET), "names argument 3, but loss_fn was called with 2"),
        (0, (X, TARGET), "batch_argnums=0"),
        ("x", (X, TARGET), "batch_argnums='x'"),
    ],
)
def test_arguments_that_do_not_count_examples(argnums, args, message):
    layers, params, _, _, _ = problem("normal")

    def call():
        loss = lambda p, x, y: jnp.mean(MODEL.apply({"params": p}, x) ** 2)
        return kfqn.value_and_grad(loss, layers, batch_argnums=argnums)(params, *args)

    if message is None:
        assert call()[2].examples == ROWS
        return
    with pytest.raises(ValueError, match=message):
        call()


# -------------------------------------------------------------------------------------------- other models


def test_weights_leave_padding_out(float64):
    """A mask among the arguments, cut with the batch; G of the padded batch is that of its other rows."""
    layers, params, _, _, x = problem("normal")
    mask = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    kept = jnp.asarray([0, 1, 3, 5])

    def loss(params, x, mask):
        with kfqn.weights(mask):
            z = kfqn.outputs(MODEL.apply({"params": params}, x), "normal")
        return (mask[:, None] * z**2).sum() / mask.sum()

    @quick_jit
    def run():
        value_and_grad = kfqn.value_and_grad(loss, layers, batch_argnums=(1, 2))
        _, _, curvature = value_and_grad(params, x, mask)
        _, _, short = kfqn.value_and_grad(loss, layers)(params, x[kept], jnp.ones(4))
        cut = curvature.factor_statistics(rows=3, key=0)
        return curvature.factor_statistics(key=0), short.factor_statistics(key=0), cut

    padded, short, cut = run()
    for name, ours in padded.items():
        close(ours.second_moment, short[name].second_moment)
        assert ours.rows == 4
        assert cut[name].rows == mask[Parts().of_factors(ROWS, 3)[0]].sum()
    close(jnp.diagonal(padded["second"].grad_moment), jnp.diagonal(short["second"].grad_moment))


class NnxNet(nnx.Module):
    """With an array that every call changes, and noise."""

    def __init__(self, rngs):
        options = {"rngs": rngs, "param_dtype": jnp.float64}
        self.first = nnx.Linear(WIDTH, 5, **options)
        self.seen = nnx.BatchStat(jnp.zeros(5))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(5, CLASSES, **options)

    def __call__(self, x):
        hidden = jnp.tanh(self.first(x))
        self.seen.set_value(0.9 * self.seen.get_value() + hidden.mean(0))
        return self.second(self.dropout(hidden))


def test_nnx_models_stay_as_they_are_and_keep_their_keys(float64):
    model, x, target = NnxNet(nnx.Rngs(0)), jnp.asarray(X), jnp.asarray(TARGET)
    layers = kfqn.find_layers(model, x)

    def loss(model, x, target):
        return jnp.mean((kfqn.outputs(model(x), "normal") - target) ** 2)

    value_and_grad = kfqn.value_and_grad(loss, layers, batch_argnums=(1, 2))
    count = model.dropout.rngs.count[...]

    @nnx.jit
    def run(model):
        value, grads, curvature = value_and_grad(model, x, target)
        seen = model.seen.get_value()
        at_once = curvature.value_at(jax.tree.map(jnp.zeros_like, grads))
        forms = curvature.forms([grads, nnx.state(model, nnx.Param)])
        one_row = curvature.factor_statistics(rows=2, key=1)
        sampled = curvature.factor_statistics(key=1)
        return value, at_once, grads, forms, sampled, one_row["first"].rows, seen

    value, at_once, grads, forms, sampled, rows, seen = run(model)
    close(at_once, value)
    close(forms.value, value)
    square = sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))
    close(forms.slopes[0], square)
    assert np.linalg.eigvalsh(forms.matrix).min() > 0
    assert rows == 2
    close(jnp.diagonal(sampled["second"].grad_moment), np.full(CLASSES, 2 / CLASSES))
    assert model.dropout.rngs.count[...] == count + 1
    np.testing.assert_array_equal(model.seen.get_value(), seen)


def test_nnx_forms_are_those_of_linen(float64):
    layers, params, loss, head, x = problem("categorical")
    rngs = nnx.Rngs(0)
    parts = [nnx.Linear(WIDTH, 5, rngs=rngs), jnp.tanh, nnx.Linear(5, CLASSES, rngs=rngs)]
    for linear, name in ((parts[0], "first"), (parts[2], "second")):
        linear.kernel.set_value(params[name]["kernel"])
        linear.bias.set_value(params[name]["bias"])
    model = nnx.Sequential(*parts)
    of_model = lambda model, x: head(kfqn.outputs(model(x), "categorical"))
    model_layers = kfqn.find_layers(model, x)

    @nnx.jit
    def run(model):
        _, grads, curvature = kfqn.value_and_grad(of_model, model_layers)(model, x)
        return curvature.forms([grads, nnx.state(model, nnx.Param)]), curvature.factor_statistics(key=4)

    @quick_jit
    def expected():
        _, grads, curvature = kfqn.value_and_grad(loss, layers)(params, x)
        return curvature.forms([grads, params]), curvature.factor_statistics(key=4)

    (forms, ours), (expected_forms, theirs) = run(model), expected()
    jax.tree.map(close, forms, expected_forms)
    for name, twin in (("layers/0", "first"), ("layers/2", "second")):
        close(ours[name].grad_moment, theirs[twin].grad_moment)
        close(ours[name].second_moment, theirs[twin].second_moment)


# -------------------------------------------------------------------------------- square A of convolutions


def test_a_convolution_s_moment_is_of_the_first_examples_only(monkeypatch, float64):
    """The covariance of the first two examples around the mean of all, so that A is positive."""
    monkeypatch.setattr("kfqn_optax._capture.sums.PATCHES", 10)
    options = {"padding": "VALID", "feature_group_count": 2, "param_dtype": jnp.float64}
    model, x = nn.Conv(4, (2,), **options), jnp.asarray(RNG.normal(size=(5, 5, 2)))
    params = model.init(jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    assert layers["."].has_patches_moment
    assert not layers["."].has_second_moment
    counts = jnp.asarray([1.0, 3.0, 0.0, 1.0, 2.0])

    def weighted(params, x):
        with kfqn.weights(counts):
            return jnp.mean(model.apply({"params": params}, x) ** 2)

    plain = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
    patches = np.stack([np.asarray(x)[:, t : t + 2] for t in range(4)], axis=1)  # (5, 4, 2, 2)
    for loss, w in ((plain, np.ones(5)), (weighted, np.asarray(counts))):
        capture = quick_jit(functools.partial(kfqn.value_and_grad(loss, layers).statistics, kwargs={}))
        ours = capture(params, (x,), vectors={})["."].second_moment
        for group in range(2):
            rows, repeats = patches[..., group].reshape(20, 2), w.repeat(4)
            mean = repeats @ rows / repeats.sum()
            covariance = np.cov(rows[:8].T, bias=True, aweights=repeats[:8])
            expected = np.block([[covariance + np.outer(mean, mean), mean[:, None]], [mean, 1]])
            np.testing.assert_allclose(ours[group], expected, 1e-12)


def test_a_large_patch_has_no_moment():
    model, x = nn.Conv(1, (3, 3)), jax.ShapeDtypeStruct((1, 4, 4, 228), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert not kfqn.find_layers(model, variables, x)["."].has_patches_moment
