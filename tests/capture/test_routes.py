"""Whatever a loss does with its parameters: value, gradient and statistics are right."""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.jet import jet
from jax.flatten_util import ravel_pytree

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((10, 3)), RNG.standard_normal((10, 2))
NET = nn.Sequential([nn.Dense(4, param_dtype=float), nn.tanh, nn.Dense(2, param_dtype=float)])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(like):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.standard_normal(leaf.shape)), like)


def initial(model=NET, x=X):
    return normal(jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def mse(params, x=X, y=Y):
    return jnp.mean((NET.apply({"params": params}, x) - y) ** 2)


def found(model=NET, x=X):
    return kfqn.find_layers(model, {"params": initial(model, x)}, x)


def of(function):
    """A loss of the model at other parameters."""
    return lambda params: mse(jax.tree.map(function, params))


def step(params, gradient):
    return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)


def clipped(params):
    clip = optax.clip_by_global_norm(10.0)
    gradient, _ = clip.update(jax.grad(mse)(params, X[:4], Y[:4]), optax.EmptyState())
    return mse(step(params, gradient), X[4:], Y[4:])


def sharpness_aware(params):
    gradient = jax.lax.stop_gradient(jax.grad(mse)(params))
    return mse(jax.tree.map(lambda p, g: p + 0.1 * g / optax.tree.norm(gradient), params, gradient))


def hutchinson(params):
    """<v, H v> by reverse over reverse."""
    v = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    slope = lambda p: optax.tree.vdot(jax.grad(mse)(p), v)
    return mse(params) + 0.1 * optax.tree.vdot(v, jax.grad(slope)(params))


def balanced(params):
    norms = [optax.tree.norm(jax.grad(mse)(params, x, y)) for x, y in ((X[:5], Y[:5]), (X[5:], Y[5:]))]
    return norms[0] / norms[1] * mse(params)


def flattened(params):
    flat, unravel = ravel_pytree(params)
    return mse(unravel(jnp.sin(flat))) + jnp.abs(flat).mean()


def rounded(params):
    straight_through = lambda p: p + jax.lax.stop_gradient(jnp.round(4 * p) / 4 - p)
    return mse(jax.tree.map(straight_through, params))


def over_leaves(function):
    return lambda params: mse(params) + function(jax.tree.leaves(params))


LOSSES = {
    "a gradient step": lambda params: mse(step(params, jax.grad(mse)(params, X[:4], Y[:4])), X[4:], Y[4:]),
    "a clipped gradient step": clipped,
    "two gradient steps": lambda params: mse(
        jax.lax.scan(lambda p, _: (step(p, jax.grad(mse)(p)), None), params, length=2)[0]
    ),
    "a weight made of gradients": balanced,
    "a penalty on the gradient": lambda p: mse(p) + optax.tree.norm(jax.grad(mse)(p), squared=True),
    "sharpness-aware": sharpness_aware,
    "Hutchinson": hutchinson,
    "squares": of(jnp.square),
    "relu": of(jax.nn.relu),
    "softplus": of(jax.nn.softplus),
    "halves": of(lambda p: 0.5 * p),
    "rounded": rounded,
    "flattened": flattened,
    "an average with older parameters": lambda params: mse(
        jax.tree.map(lambda p, old: 0.9 * p + 0.1 * old, params, optax.tree.ones_like(params))
    ),
    "a prior over all leaves": over_leaves(
        lambda leaves: -sum(jax.scipy.stats.norm.logpdf(p).sum() for p in leaves)
    ),
    "group lasso": over_leaves(lambda leaves: sum(jnp.linalg.norm(p.ravel()) for p in leaves)),
    "matrices alone": over_leaves(lambda leaves: sum((p**2).sum() for p in leaves if p.ndim > 1)),
    "the mean over all elements": over_leaves(
        lambda leaves: sum((p**2).sum() for p in leaves) / sum(p.size for p in leaves)
    ),
    "a model jitted on its own": lambda params: jnp.mean((JITTED({"params": params}, X) - Y) ** 2),
}
JITTED = jax.jit(NET.apply)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_jax(name):
    loss, params, layers = LOSSES[name], initial(), found()
    vector = jax.tree.map(jnp.ones_like, params)

    @quick_jit
    def run(params):
        value, grads, curvature = kfqn.value_and_grad(loss, layers)(params)
        rows = [curvature.statistics[layer.name].rows for layer in layers]
        return (value, grads, curvature.value_at(vector)), rows

    ours, rows = run(params)
    moved = jax.tree.map(jnp.add, params, vector)
    theirs = quick_jit(lambda p, q: (*jax.value_and_grad(loss)(p), loss(q)))(params, moved)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), ours, theirs)
    assert all(count > 0 for count in rows)


MAPS = {
    "squares": jnp.square,
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "halves": lambda p: 0.5 * p,
    "zeros": lambda p: 0 * p,
}


@pytest.mark.parametrize("name", MAPS)
def test_statistics_are_those_at_the_parameters_that_the_model_was_given(name):
    params, layers = initial(), found()
    given = jax.tree.map(MAPS[name], params)

    @quick_jit
    def statistics(params, given):
        _, _, there = kfqn.value_and_grad(mse, layers)(given)
        _, _, here = kfqn.value_and_grad(of(MAPS[name]), layers)(params)
        after = here.after(optax.tree.zeros_like(params))
        fields = lambda c: {
            layer.name: [getattr(c.statistics[layer.name], field) for field in FIELDS] for layer in layers
        }
        return fields(there), fields(here), fields(after)

    there, here, after = statistics(params, given)
    equal = lambda a, b: np.testing.assert_allclose(a, b, 1e-12, 1e-14)
    jax.tree.map(equal, here, there)
    jax.tree.map(equal, after, there)


FIELDS = ("rows", "inputs", "preactivation_grads", "second_moment", "grad_moment")


def captured(loss, layers, params):
    def run(params):
        value, grads, curvature = kfqn.value_and_grad(loss, layers)(params)
        return value, grads, curvature.statistics

    return quick_jit(run)(params)


def close(statistics, other):
    for field in FIELDS:
        a, b = getattr(statistics, field), getattr(other, field)
        np.testing.assert_allclose(a, b, 1e-10, 1e-12, err_msg=field)


def test_weights_that_two_trees_make():
    """A mean and a spread: the layers are those of the means."""
    params = {"mu": initial(), "rho": jax.tree.map(lambda p: 0.1 * p, initial())}
    layers = kfqn.join_layers({"mu": found()})
    drawn = lambda p: jax.tree.map(lambda m, r: m + jax.nn.softplus(r) * 0.3, p["mu"], p["rho"])
    loss = lambda p: mse(drawn(p))
    value, grads, statistics = captured(loss, layers, params)
    np.testing.assert_allclose(value, loss(params), 1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10), grads, jax.grad(loss)(params))
    _, _, there = captured(mse, found(), drawn(params))
    close(statistics["mu/layers_0"], there["layers_0"])


# ----------------------------------------------------------------------------------- which layer a call is


def jitted(params, x):
    return jax.jit(NET.apply)({"params": params}, x)


def mapped(params, x):
    return jax.vmap(lambda row: NET.apply({"params": params}, row))(x)


def squared(params, x):
    return NET.apply({"params": jax.tree.map(jnp.square, params)}, x)


def plain(params, x):
    return NET.apply({"params": params}, x)


@pytest.mark.parametrize("apply", [plain, jitted, mapped, squared])
def test_twins(apply):
    """Two models alike: each has the statistics of its own inputs."""
    params = {"a": initial(), "b": jax.tree.map(lambda p: 2 * p, initial())}
    layers = kfqn.join_layers({"a": found(), "b": found()})
    loss_of = lambda key, x: lambda p: jnp.mean((apply(p[key], x) - Y) ** 2)
    both = lambda p: loss_of("b", 2 * X)(p) + loss_of("a", X)(p)
    _, _, statistics = captured(both, layers, params)
    for key, x in (("a", X), ("b", 2 * X)):
        _, _, alone = captured(loss_of(key, x), kfqn.join_layers({key: found()}), {key: params[key]})
        for layer in found():
            close(statistics[f"{key}/{layer.name}"], alone[f"{key}/{layer.name}"])


def test_a_mixture_of_twins():
    """Half of each: both have the mixture's means, of half of its rows."""
    params = {"a": initial(), "b": jax.tree.map(jnp.sin, initial())}
    layers = kfqn.join_layers({"a": found(), "b": found()})
    mixed = lambda p: jax.tree.map(lambda a, b: 0.5 * (a + b), p["a"], p["b"])
    value, grads, statistics = captured(lambda p: mse(mixed(p)), layers, params)
    theirs = quick_jit(jax.value_and_grad(lambda p: mse(mixed(p))))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), (value, grads), theirs)
    *_, whole = captured(mse, found(), mixed(params))
    for layer in layers:
        wanted = whole[layer.path[-1]]
        close(
            statistics[layer.name]._replace(grad_moment=0),
            wanted._replace(
                rows=0.5 * wanted.rows, preactivation_grads=0.5 * wanted.preactivation_grads, grad_moment=0
            ),
        )


@pytest.mark.parametrize("apply", [plain, jitted])
def test_a_model_alike_whose_parameters_are_constants_does_not_count(apply):
    """A teacher before, beside and behind the student."""
    square = nn.Dense(3, param_dtype=float)
    run = lambda p, x: (jax.jit(square.apply) if apply is jitted else square.apply)({"params": p}, x)
    student, teacher = initial(square), jax.tree.map(lambda p: p + 1, initial(square))
    layers = found(square)
    alone = lambda p: jnp.sum((teacher_of(run(p, run(teacher, X)))) ** 2)
    teacher_of = lambda x: run(teacher, x)
    *_, statistics = captured(alone, layers, student)
    matrix = lambda x: jnp.asarray(x) @ teacher["kernel"] + teacher["bias"][None]
    by_hand = lambda p: jnp.sum(matrix(square.apply({"params": p}, matrix(X))) ** 2)
    close(statistics["."], captured(by_hand, layers, student)[2]["."])
    assert statistics["."].rows == 10


class Halves(nn.Module):
    def setup(self):
        self.first, self.second = (nn.Dense(3, param_dtype=float) for _ in range(2))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_of_a_model_that_is_applied_on_its_own(compiled):
    """Its paths are shorter than those of the layers that were found."""
    model, part = Halves(), nn.Dense(3, param_dtype=float)
    params, layers = initial(model), found(model)
    apply = jax.jit(part.apply) if compiled else part.apply
    in_parts = lambda p: jnp.sum(
        apply({"params": p["second"]}, jnp.tanh(apply({"params": p["first"]}, X))) ** 2
    )
    whole = lambda p: jnp.sum(model.apply({"params": p}, X) ** 2)
    *_, statistics = captured(in_parts, layers, params)
    *_, wanted = captured(whole, layers, params)
    for name in ("first", "second"):
        close(statistics[name], wanted[name])


def test_one_trace_for_a_student_and_its_teacher():
    """Under jit calls of the same shapes share a trace; those of the student count, after a step too."""
    apply, params, layers = jax.jit(NET.apply), initial(), found()
    teacher = jax.tree.map(lambda p: p + 1, params)

    def loss(p):
        distance = apply({"params": p}, X) - apply({"params": teacher}, X)
        return jnp.mean(distance**2)

    target = NET.apply({"params": teacher}, X)
    by_hand = lambda p: jnp.mean((NET.apply({"params": p}, X) - target) ** 2)
    move = jax.tree.map(lambda p: 0.1 * p, params)

    def run(loss):
        _, _, curvature = kfqn.value_and_grad(loss, layers)(params)
        return curvature.statistics, curvature.after(move).statistics

    for ours, wanted in zip(quick_jit(lambda: run(loss))(), quick_jit(lambda: run(by_hand))(), strict=True):
        for layer in layers:
            close(ours[layer.name], wanted[layer.name])


def test_parameters_of_another_type_than_the_layers():
    """Half precision of the loss's own: the statistics stay in float32."""
    with jax.enable_x64(False):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), initial())
        net = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])

        def half(params):
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
            z = net.apply({"params": params}, jnp.asarray(X, jnp.bfloat16))
            return jnp.mean((z.astype(jnp.float32) - jnp.asarray(Y, jnp.float32)) ** 2)

        layers = kfqn.find_layers(net, {"params": params}, jnp.asarray(X, jnp.float32))
        value, grads, statistics = captured(half, layers, params)
        theirs = quick_jit(jax.value_and_grad(half))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), (value, grads), theirs)
        assert statistics["layers_0"].second_moment.dtype == jnp.float32


# ------------------------------------------------------------------------------------------ stacked layers


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(3, param_dtype=float)(x)), None


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(2, param_dtype=float)(scanned(name="blocks")(x, None)[0])


def deep_mse(params, x=X, y=Y):
    return jnp.mean((Deep().apply({"params": params}, x) - y) ** 2)


STACKED = {
    "plain": deep_mse,
    "a gradient step": lambda p: deep_mse(step(p, jax.grad(deep_mse)(p, X[:4], Y[:4])), X[4:], Y[4:]),
    "squares": lambda p: deep_mse(jax.tree.map(jnp.square, p)),
    "group lasso": lambda p: deep_mse(p) + sum(jnp.linalg.norm(x.ravel()) for x in jax.tree.leaves(p)),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_layers(name):
    loss, params, layers = STACKED[name], initial(Deep()), found(Deep())
    value, grads, statistics = captured(loss, layers, params)
    theirs = quick_jit(jax.value_and_grad(loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), (value, grads), theirs)
    assert (statistics["blocks/Dense_0"].rows > 0).all()
    if name == "squares":
        *_, there = captured(deep_mse, layers, jax.tree.map(jnp.square, params))
        close(statistics["blocks/Dense_0"], there["blocks/Dense_0"])


def by_hand(params):
    """The loss's own scan over the stacked parameters of the model."""
    body = lambda x, p: Block().apply({"params": p}, x)
    x, _ = jax.lax.scan(body, jnp.asarray(X), params["blocks"])
    return jnp.mean((nn.Dense(2).apply({"params": params["Dense_0"]}, x) - Y) ** 2)


def test_a_scan_of_the_losss_own():
    params, layers = initial(Deep()), found(Deep())
    value, grads, statistics = captured(by_hand, layers, params)
    theirs = quick_jit(jax.value_and_grad(by_hand))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), (value, grads), theirs)
    *_, wanted = captured(deep_mse, layers, params)
    for layer in layers:
        close(statistics[layer.name], wanted[layer.name])


def test_a_gradient_step_of_a_model_that_is_a_stack():
    """No module of the model holds the stack: the loss's parameters bring the slots."""
    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model, x = nn.vmap(NET.__class__, in_axes=0, **split)(NET.layers), np.stack([X, 2 * X])
    params, layers = initial(model, x), found(model, x)
    loss = lambda p, x=x: jnp.mean(model.apply({"params": p}, x) ** 2)
    adapted = lambda p: loss(step(p, jax.grad(loss)(p, x[:, :4])), x[:, 4:])
    value, grads, statistics = captured(adapted, layers, params)
    theirs = quick_jit(jax.value_and_grad(adapted))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), (value, grads), theirs)
    np.testing.assert_array_equal(statistics["layers_0"].rows, [10, 10])


def all_mean_square(params):
    return jnp.mean(ravel_pytree(params)[0] ** 2)


def stacked_twice():
    split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.vmap(nn.Dense, in_axes=None, axis_size=3, **split)(2, param_dtype=float)
    return model, lambda params: jnp.mean((model.apply({"params": params}, X) - Y[None]) ** 2)


def twins_of_one_jit():
    apply = jax.jit(NET.apply)
    losses = lambda params: [jnp.mean((apply({"params": p}, X) - Y) ** 2) for p in params.values()]
    return lambda params: sum(losses(params))


STACKS = ["a model that is a stack", "a scan of the loss's own", "twins of one jit"]


def with_slots_of_their_own():
    model, of_stack = stacked_twice()
    twins = {"a": initial(), "b": jax.tree.map(jnp.sin, initial())}
    of_twins = kfqn.join_layers({"a": found(), "b": found()})
    made = [
        (of_stack, initial(model), found(model)),
        (by_hand, initial(Deep()), found(Deep())),
        (twins_of_one_jit(), twins, of_twins),
    ]
    return dict(zip(STACKS, made, strict=True))


@pytest.mark.parametrize(
    "name", ["a model that is a stack", "a scan of the loss's own", "twins of one jit"]
)
def test_what_a_loss_computes_with_slots_among_its_parameters_is_an_error(name):
    """A mean over all elements was another one, by 10 to 40 % of the gradient, and squares had no rows."""
    loss_of, params, layers = with_slots_of_their_own()[name]
    penalty = 0.3 * all_mean_square(params)
    wrong = [
        lambda p: loss_of(p) + 0.3 * all_mean_square(p),
        lambda p: loss_of(jax.tree.map(jnp.square, p)),
        lambda p: loss_of(jax.tree.map(jax.nn.softplus, p)),
    ]
    for loss in wrong:
        with pytest.raises(ValueError, match=r"kfqn\.without_slots"):
            captured(loss, layers, params)
    right = lambda p: loss_of(p) + 0.3 * all_mean_square(kfqn.without_slots(p))
    value, grads, statistics = captured(right, layers, params)
    theirs = quick_jit(jax.value_and_grad(lambda p: loss_of(p) + 0.3 * all_mean_square(p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), (value, grads), theirs)
    value, _, alone = captured(loss_of, layers, params)
    np.testing.assert_allclose(theirs[0] - value, penalty)
    for layer in layers:
        np.testing.assert_allclose(statistics[layer.name].rows, 10)
        close(statistics[layer.name], alone[layer.name])


def test_auxiliary_data_have_no_slots_where_the_loss_has():
    loss_of, params, layers = with_slots_of_their_own()["twins of one jit"]
    loss = lambda p: (loss_of(p), {"average": p, "more": (p["a"], [p["b"]])})
    _, aux = quick_jit(lambda p: kfqn.value_and_grad(loss, layers, has_aux=True)(p)[0])(params)
    expected = {"average": params, "more": (params["a"], [params["b"]])}
    assert jax.tree.structure(aux) == jax.tree.structure(expected)


@pytest.mark.parametrize("masked", [False, True])
def test_copies_of_weights_that_share_a_batch_count_it_once_each(masked):
    """Weights drawn many times by ``vmap``: JAX counts what does not depend on the copy once in all."""
    drawn = jax.random.split(jax.random.key(5), 7)
    weights = np.arange(10) % 2 if masked else np.ones(10)

    def of_one(params, key, x):
        noisy = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape, p.dtype), params)
        with kfqn.weights(jnp.asarray(weights)):
            return jnp.mean((NET.apply({"params": noisy}, x) - Y) ** 2)

    copies = jnp.broadcast_to(X, (7, *X.shape))
    shared = lambda params: jax.vmap(lambda key: of_one(params, key, X))(drawn).mean()
    copied = lambda params: jax.vmap(lambda key, x: of_one(params, key, x))(drawn, copies).mean()
    *_, ours = captured(shared, found(), initial())
    *_, wanted = captured(copied, found(), initial())
    for layer in found():
        np.testing.assert_allclose(ours[layer.name].rows, 7 * weights.sum())
        close(ours[layer.name], wanted[layer.name])


# --------------------------------------------------------------------------------- what slots cannot follow


def with_a_rule(forward, backward):
    function = jax.custom_vjp(lambda params: mse(params))
    function.defvjp(forward, backward)
    return function


RULES = {
    "of jax.vjp": with_a_rule(lambda params: jax.vjp(mse, params), lambda back, g: back(g)),
    "that computes it again": with_a_rule(
        lambda params: (mse(params), params), lambda params, g: jax.vjp(mse, params)[1](g)
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("asked", [False, True])
def test_a_rule_of_the_losss_own(name, asked):
    """By itself, and where the loss puts the slots there."""
    params, layers = initial(), found()
    rule = lambda p: RULES[name](kfqn.with_slots(p) if asked else p)
    wanted, ours = captured(mse, layers, params), captured(rule, layers, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-10, 1e-12), ours[:2], wanted[:2])
    for layer in layers:
        close(ours[2][layer.name], wanted[2][layer.name])


def test_a_rule_that_takes_no_slots_is_an_error():
    def backward(params, g):
        plain = kfqn.without_slots(params)
        gradient = jax.vjp(mse, plain)[1](g)[0]
        slots = jax.tree.map(jnp.zeros_like, params)
        return ({key: {**slots[key], **gradient[key]} for key in params},)

    rule = with_a_rule(lambda params: (mse(params), params), backward)
    with pytest.raises(ValueError, match=r"depends on no call.*custom_vjp.*kfqn.with_slots"):
        kfqn.value_and_grad(rule, found())(initial())


def test_parameters_that_the_loss_stops():
    """A frozen layer has no statistics."""
    params, layers = initial(), found()

    def loss(params):
        return mse({**params, "layers_0": jax.lax.stop_gradient(params["layers_0"])})

    *_, statistics = captured(loss, layers, params)
    assert statistics["layers_0"].rows == 0
    close(statistics["layers_2"], captured(mse, layers, params)[2]["layers_2"])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted"])
def test_taylor_mode_is_an_error_that_names_forward(wrap):
    u = lambda p: wrap(lambda t: NET.apply({"params": p}, t * jnp.ones((1, 3)))[0, 0])

    def loss(params):
        second = lambda t: jet(u(params), (t,), ((1.0, 0.0),))[1][1]
        return jnp.mean(jax.vmap(second)(jnp.linspace(0, 1, 5)) ** 2) + u(params)(jnp.array(0.0)) ** 2

    with pytest.raises(ValueError, match=r"Taylor mode.*forward=lambda params"):
        kfqn.value_and_grad(loss, found())(initial())


# --------------------------------------------------------------------------------------- what the loss sees


def test_the_loss_and_its_auxiliary_data_have_the_tree_of_the_parameters():
    params = initial()
    loss = lambda p: (mse(p), jax.tree.map(lambda leaf: 0.1 * leaf, p))
    (_, aux), _, _ = kfqn.value_and_grad(loss, found(), has_aux=True)(params)
    jax.tree.map(lambda a, p: np.testing.assert_allclose(a, 0.1 * p), aux, params)


class Both(flax.struct.PyTreeNode):
    net: dict
    scale: jax.Array


@dataclasses.dataclass
class Plain:
    net: dict
    scale: jax.Array


jax.tree_util.register_dataclass(Plain)


@pytest.mark.parametrize("kind", [Both, Plain])
def test_parameters_in_a_dataclass(kind):
    params = kind(net=initial(), scale=jnp.ones(()))
    layers = kfqn.join_layers({"net": found()})
    loss = lambda p: p.scale**2 * mse(p.net)
    value, grads, statistics = captured(loss, layers, params)
    assert isinstance(grads, kind)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-10),
        (value, grads),
        jax.value_and_grad(loss)(params),
    )
    close(statistics["net/layers_0"], captured(mse, found(), params.net)[2]["layers_0"])


def test_a_gradient_step_of_an_nnx_model():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
    layers = kfqn.find_layers(model, X)
    graphdef, params = nnx.split(model, nnx.Param)

    def adapted(model):
        graphdef, params = nnx.split(model, nnx.Param)
        inner = lambda p: loss(nnx.merge(graphdef, p), X[:4], Y[:4])
        moved = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(inner)(params))
        return loss(nnx.merge(graphdef, moved), X[4:], Y[4:])

    value, grads, curvature = kfqn.value_and_grad(adapted, layers)(model)
    theirs = jax.value_and_grad(lambda p: adapted(nnx.merge(graphdef, p)))(params)
    leaves = lambda tree: jax.tree.leaves(tree)
    for ours, other in zip(leaves((value, grads)), leaves(theirs), strict=True):
        np.testing.assert_allclose(ours, other, 1e-5, 1e-7)
    assert curvature.statistics["layers/0"].rows == 10


def test_nnx_twins_that_merge_makes():
    twin = lambda seed: nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
    graphdef, _ = nnx.split(twin(0), nnx.Param)
    params = {key: nnx.split(twin(seed), nnx.Param)[1] for seed, key in enumerate("ab")}
    layers = kfqn.join_layers({key: kfqn.find_layers(twin(0), X) for key in "ab"})
    model = lambda p: kfqn.merge(graphdef, p)
    loss = lambda p: jnp.mean(model(p["b"])(2 * X) ** 2) + jnp.mean(model(p["a"])(X) ** 2)
    _, _, curvature = kfqn.value_and_grad(loss, layers)(params)
    for key, x in (("a", X), ("b", 2 * X)):
        np.testing.assert_allclose(curvature.statistics[key].inputs[:-1], x.mean(0), 1e-5)
