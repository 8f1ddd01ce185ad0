"""Advice on marks that do not help, and second derivatives of losses without forward mode.

The oracle of the first is what each loss is known to be; of the second, dense Gauss-Newton matrices.
"""

import functools
import re
import warnings

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

X = jax.random.normal(jax.random.key(0), (16, 4))
Y, LABELS = jnp.sin(X[:, :3]), jnp.arange(16) % 3


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, mark=lambda h: h):
        return nn.Dense(3, name="head")(mark(jnp.tanh(nn.Dense(5, name="trunk")(x))))


MODEL = Net()
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
LAYERS = kfqn.find_layers(MODEL, {"params": PARAMS}, X)
NORMAL = functools.partial(kfqn.outputs, distribution="normal")
LOGITS = functools.partial(kfqn.outputs, distribution="categorical")


def apply(params, x, **kwargs):
    return MODEL.apply({"params": params}, x, **kwargs)


def caught(call):
    """The texts of the warnings, all of our category."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        call()
    assert {warning.category for warning in given} <= {kfqn.KfqnWarning}
    return [str(warning.message) for warning in given]


def said(loss, layers=LAYERS, params=PARAMS, **options):
    """What is said of the marks of ``loss(params, x, y)``."""

    def check(params, x, y):
        _, grads, curvature = kfqn.value_and_grad(loss, layers, **options)(params, x, y)
        curvature.check_marks(grads)

    return caught(lambda: jax.eval_shape(check, params, X, Y))


def updated(loss, tx):
    """What an update says."""

    def step(params, state, x, y):
        _, grads, curvature = kfqn.value_and_grad(loss, LAYERS)(params, x, y)
        return tx.update(grads, state, params, curvature=curvature)

    return caught(lambda: jax.eval_shape(step, PARAMS, jax.eval_shape(tx.init, PARAMS), X, Y))


# ---------------------------------------------------------------------------------------- what needs advice


def unmarked(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


def idle(params, x, y):
    z = apply(params, x)
    NORMAL(z)
    return jnp.mean((z - y) ** 2)


def stopped(params, x, y):
    z = apply(params, x)
    return jnp.mean((z - y) ** 2) + jnp.mean(jax.lax.stop_gradient(NORMAL(z)) ** 2)


def on_log_probabilities(params, x, y):
    log_p = LOGITS(jax.nn.log_softmax(apply(params, x)))
    return -jnp.take_along_axis(log_p, LABELS[:, None], 1).mean()


def one_hot_on_log_probabilities(params, x, y):
    return -(jax.nn.one_hot(LABELS, 3) * LOGITS(jax.nn.log_softmax(apply(params, x)))).sum(1).mean()


def on_losses(params, x, y):
    return NORMAL((apply(params, x) - y) ** 2).mean()


def on_the_mean(params, x, y):
    return NORMAL(unmarked(params, x, y))


def absolute(params, x, y):
    return jnp.abs(NORMAL(apply(params, x)) - y).mean()


def hinge(params, x, y):
    return jax.nn.relu(1 - y * NORMAL(apply(params, x))).mean()


def policy_gradient(params, x, y):
    log_p = jax.nn.log_softmax(apply(params, x))
    return -(y[:, 0] * LOGITS(log_p)[:, 0]).mean()


def mapped(loss):
    def of_rows(params, x, y):
        of_row = lambda x, y: loss(params, x[None], y[None])
        return jax.vmap(of_row)(x, y).mean()

    return of_rows


def scanned(loss):
    def of_rows(params, x, y):
        row = lambda total, row: (total + loss(params, row[0][None], row[1][None]), None)
        return jax.lax.scan(row, jnp.zeros([]), (x, y))[0] / len(x)

    return of_rows


def hidden(params, x, y):
    return jnp.mean((apply(params, x, mark=NORMAL) - y) ** 2)


def skipped(params, x, y):
    """The head's only way goes around; the trunk's goes through the mark too."""
    h = jnp.tanh(nn.Dense(5).apply({"params": params["trunk"]}, x))
    z = nn.Dense(3).apply({"params": params["head"]}, h)
    return jnp.mean(NORMAL(h) ** 2) + jnp.mean((z - y) ** 2)


def one_after_the_other(params, x, y):
    z = NORMAL(apply(params, x))
    return jnp.mean((NORMAL(jnp.sin(z)) - y) ** 2)


def carried(params, x, y):
    """What one step of a scan marks, the next one takes."""

    def step(carry, _):
        z = NORMAL(apply(params, carry))
        return jnp.concatenate([z, z[:, :1]], 1), jnp.mean((z - y) ** 2)

    return jax.lax.scan(step, x, None, 3)[1].mean()


UNMARKED, IDLE, STRAIGHT = "the loss has no mark", "does not reach the loss", "no second derivative"
AROUND, NESTED = r"the layers \['head'\] reach the loss on no way", "computed from that of the first"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (unmarked, UNMARKED),
        (idle, IDLE),
        (stopped, IDLE),
        (on_log_probabilities, STRAIGHT),
        (one_hot_on_log_probabilities, STRAIGHT),
        (on_losses, STRAIGHT),
        (on_the_mean, STRAIGHT),
        (absolute, STRAIGHT),
        (hinge, STRAIGHT),
        (policy_gradient, STRAIGHT),
        (jax.jit(absolute), STRAIGHT),
        (jax.checkpoint(absolute), STRAIGHT),
        (mapped(absolute), STRAIGHT),
        (scanned(absolute), STRAIGHT),
        (hidden, AROUND),
        (jax.jit(hidden), AROUND),
        (scanned(hidden), AROUND),
        (skipped, AROUND),
        (one_after_the_other, NESTED),
        (carried, NESTED),
    ],
)
def test_a_mark_that_does_not_help_is_told_of_once(loss, message):
    found = said(loss)
    assert len(found) == 1
    assert re.search(message, found[0])
    assert said(loss) == []


def test_the_message_silences_itself():
    """The line that it gives, run."""
    for loss in (unmarked, idle, absolute, hidden, one_after_the_other):
        [message] = said(loss)
        line = re.findall(r"warnings\.filterwarnings\(.*\)", message)[0]

        def silenced(line=line, message=message):
            exec(line, {"warnings": warnings, "kfqn": kfqn})
            warnings.warn(message, kfqn.KfqnWarning, stacklevel=1)

        assert caught(silenced) == []


# ------------------------------------------------------------------------------------------ what needs none


def marked(params, x, y):
    return jnp.mean((NORMAL(apply(params, x)) - y) ** 2)


def huber(params, x, y):
    return optax.huber_loss(NORMAL(apply(params, x)), y).mean()


def squared_hinge(params, x, y):
    return jnp.mean(jax.nn.relu(1 - y * NORMAL(apply(params, x))) ** 2)


def cross_entropy(params, x, y):
    z = LOGITS(apply(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(z, LABELS).mean()


def on_probabilities(params, x, y):
    return -jnp.log(kfqn.outputs(jax.nn.softmax(apply(params, x)))[:, 0]).mean()


def masked(params, x, y):
    mask = (jnp.arange(len(x)) < 5).astype(x.dtype)
    with kfqn.weights(mask):
        z = NORMAL(apply(params, x))
    return (mask[:, None] * jnp.where(mask[:, None] > 0, z - y, 0) ** 2).sum() / mask.sum()


def with_penalties(params, x, y):
    weights = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
    activity = jnp.abs(jnp.tanh(x @ params["trunk"]["kernel"])).mean()
    return marked(params, x, y) + 1e-3 * weights + 1e-3 * activity


def several(params, x, y):
    """Of one array too, once for each of its uses."""
    z = apply(params, x)
    return jnp.mean(NORMAL(z) ** 2) + jnp.mean(jnp.cosh(NORMAL(jnp.sin(z)))) + jnp.mean(NORMAL(z) ** 4)


def bilinear(params, x, y):
    z = apply(params, x)
    return jnp.mean(NORMAL(z[:, 0]) * NORMAL(z[:, 1]))


def residual(params, x, y):
    """A differential equation and its boundary."""
    u = lambda point: apply(params, point).sum()
    inside = jax.vmap(lambda point: jnp.trace(jax.hessian(u)(point)))(x)
    return jnp.mean(NORMAL(inside) ** 2) + jnp.mean(NORMAL(apply(params, x[:3])) ** 2)


def bootstrapped(params, x, y):
    """The model with its mark is called again, for a target that is stopped."""
    target = jax.lax.stop_gradient(0.9 * NORMAL(apply(params, x)) + y)
    return jnp.mean((NORMAL(apply(params, x)) - target) ** 2)


def corrected(params, x, y):
    """A marked array goes into another one, and no derivative with it."""
    z = NORMAL(apply(params, x))
    z = NORMAL(apply(params, x + jax.lax.stop_gradient(z).mean()))
    return jnp.mean((z - y) ** 2)


@pytest.mark.parametrize(
    "loss",
    [
        marked,
        huber,
        squared_hinge,
        cross_entropy,
        on_probabilities,
        masked,
        with_penalties,
        several,
        bilinear,
        bootstrapped,
        corrected,
        jax.jit(marked),
        mapped(marked),
        scanned(marked),
        scanned(jax.checkpoint(cross_entropy)),
    ],
)
def test_a_mark_that_helps_is_not(loss):
    assert said(loss) == []


def test_nor_is_a_marked_residual():
    assert said(residual, forward=lambda params, x, y: apply(params, x)) == []


def test_auxiliary_data_and_part_of_the_examples():
    assert said(lambda params, x, y: (marked(params, x, y), NORMAL(apply(params, x))), has_aux=True) == []
    assert said(lambda params, x, y: marked(params, x, y), batch_argnums=(1, 2)) == []


@pytest.mark.parametrize("method", [kfqn.kbfgs, kfqn.kbfgs_l, kfqn.kfqn])
def test_methods_that_make_no_use_of_marks_ask_for_none(method):
    tx = method(0.3, LAYERS)
    assert updated(unmarked, tx) == []
    assert updated(hidden, tx) == []


@pytest.mark.parametrize(
    "tx",
    [
        kfqn.kfac(1.0, LAYERS),
        kfqn.kfac(0.1, LAYERS, step_rule=kfqn.measured()),
        kfqn.kbfgs(1.0, LAYERS, step_rule=kfqn.quadratic(rate=1.0)),
    ],
    ids=["kfac", "its factors", "its rule"],
)
def test_methods_that_make_use_of_them_do(tx):
    [message] = updated(unmarked, tx)
    assert UNMARKED in message
    assert updated(marked, tx) == []


def test_layers_of_another_optimizer_are_its_own_business():
    groups = optax.partition(
        {"ours": kfqn.kfac(1.0, LAYERS), "frozen": optax.set_to_zero()},
        {"trunk": "ours", "head": "frozen"},
    )
    assert updated(hidden, groups) == []


def test_statistics_alone_ask_for_nothing():
    def ask(params):
        _, grads, curvature = kfqn.value_and_grad(unmarked, LAYERS)(params, X, Y)
        return curvature.after(grads).value, curvature.forms([grads]), curvature.factor_statistics()

    assert caught(lambda: jax.eval_shape(ask, PARAMS)) == []


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.trunk, self.head = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x, mark=lambda h: h):
        return self.head(mark(jnp.tanh(self.trunk(x))))


def test_nnx_models():
    model = NnxNet(nnx.Rngs(0))
    layers = kfqn.find_layers(model, X)

    graphdef, state = nnx.split(model)

    def told(loss):
        def check(state):
            _, grads, curvature = kfqn.value_and_grad(loss, layers)(nnx.merge(graphdef, state))
            curvature.check_marks(grads)

        return caught(lambda: jax.eval_shape(check, state))

    assert told(lambda model: jnp.mean(NORMAL(model(X)) ** 2)) == []
    [message] = told(lambda model: jnp.mean(model(X, mark=NORMAL) ** 2))
    assert re.search(AROUND, message)


def test_a_scanned_module_is_traced_twice_and_marked_once():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, NORMAL(nn.Dense(3, name="head")(x))

    scan = nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})()
    params = scan.init(jax.random.key(0), jnp.zeros(()), X)["params"]
    layers = kfqn.find_layers(scan, {"params": params}, jnp.zeros(()), X)
    loss = lambda params, x, y: jnp.mean((scan.apply({"params": params}, jnp.zeros(()), x)[1] - y) ** 2)
    assert said(loss, layers=layers, params=params) == []


# ------------------------------------------------------------------------------ losses without forward mode


def reverse_only(function):
    """``function`` with a rule of reverse mode, whose forward pass calls it again, as those of most do."""
    call = jax.custom_vjp(function)
    call.defvjp(lambda z: (call(z), z), lambda z, g: jax.vjp(function, z)[1](g))
    return call


def once_only(function):
    """``function`` with a derivative that a callback computes, which has none."""
    call = jax.custom_vjp(function)

    def backward(z, g):
        kernel = lambda z, g: np.asarray(jax.vjp(function, jnp.asarray(z))[1](jnp.asarray(g))[0])
        return (jax.pure_callback(kernel, z, z, g, vmap_method="sequential"),)

    call.defvjp(lambda z: (function(z), z), backward)
    return call


quartic = lambda z: jnp.mean((z - Y.astype(z.dtype)) ** 4)
penalty = lambda params: 0.3 * sum((leaf**2).sum() for leaf in jax.tree.leaves(params))


def quartic_loss(around_model=lambda f: f, around_loss=lambda f: f, mark=NORMAL):
    def loss(params, x, y):
        model = around_model(lambda params: apply(params, x.astype(params["head"]["bias"].dtype)))
        return around_loss(quartic)(mark(model(params))) + penalty(kfqn.without_slots(params))

    return loss


def dense_forms(params, directions, gauss_newton):
    """The forms of the loss above: of J^T (d^2 l / dz^2) J and the penalty, or of the whole Hessian."""
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    x = X.astype(flat.dtype)
    z_of = lambda v: apply(unflatten(v), x)
    jacobian, hessian = jax.jacobian(z_of)(flat), jax.hessian(quartic)(z_of(flat))
    matrix = jnp.einsum("abi,abcd,cdj->ij", jacobian, hessian, jacobian) + 0.6 * jnp.eye(len(flat))
    if not gauss_newton:
        matrix = jax.hessian(lambda v: quartic(z_of(v)) + penalty(unflatten(v)))(flat)
    u = jnp.stack([jax.flatten_util.ravel_pytree(tree)[0] for tree in directions])
    grads = jax.grad(lambda v: quartic(z_of(v)) + penalty(unflatten(v)))(flat)
    return u @ grads, u @ matrix @ u.T


@pytest.mark.parametrize(
    ("loss", "gauss_newton", "dtype"),
    [
        (quartic_loss(around_model=reverse_only), True, jnp.float32),
        (quartic_loss(around_model=reverse_only), True, jnp.float64),
        (quartic_loss(around_loss=lambda f: jax.jit(reverse_only(f))), True, jnp.float64),
        (quartic_loss(around_loss=lambda f: jax.checkpoint(reverse_only(f))), True, jnp.float64),
        (quartic_loss(around_loss=once_only), True, jnp.float64),
        (quartic_loss(around_model=reverse_only, mark=lambda z: z), False, jnp.float64),
        (quartic_loss(around_loss=once_only, mark=lambda z: z), False, jnp.float32),
    ],
    ids=["float32", "model", "jit", "remat", "once", "model, no mark", "once, no mark"],
)
def test_forms_without_forward_mode(loss, gauss_newton, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
        directions = [optax.tree.random_like(jax.random.key(i), params) for i in range(2)]
        said = []

        @quick_jit
        def run(params):
            _, _, curvature = kfqn.value_and_grad(loss, LAYERS)(params, X, Y)
            said.extend(caught(lambda: said.append(curvature.forms(directions))))
            return said.pop(0), dense_forms(params, directions, gauss_newton)

        ours, (slopes, matrix) = run(params)
        tolerance = 30 * jnp.finfo(dtype).eps ** 0.5
        np.testing.assert_allclose(ours.slopes, slopes, 1e-4)
        np.testing.assert_allclose(ours.matrix, matrix, atol=tolerance * jnp.abs(matrix).max())
        assert len(said) == 1
        assert "jax.custom_vjp" in said[0]


def test_a_custom_rule_that_no_parameter_goes_through_keeps_forward_mode():
    scaled = reverse_only(lambda x: 2 * x)
    loss = lambda params, x, y: jnp.mean((NORMAL(apply(params, scaled(x))) - y) ** 2)

    def forms(params):
        _, grads, curvature = kfqn.value_and_grad(loss, LAYERS)(params, X, Y)
        return curvature.forms([grads])

    assert caught(lambda: jax.eval_shape(forms, PARAMS)) == []


def test_factors_of_a_loss_that_is_differentiable_once_are_those_of_its_gradients():
    loss, plain = quartic_loss(around_loss=once_only), quartic_loss(mark=lambda z: z)

    @quick_jit
    def run(params):
        made = (kfqn.value_and_grad(f, LAYERS)(params, X, Y)[2] for f in (loss, plain))
        return [curvature.factor_statistics() for curvature in made]

    [message] = caught(lambda: run.lower(PARAMS))
    assert "can be differentiated once only" in message
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), *run(PARAMS))


def test_the_default_method_trains_such_losses():
    loss = quartic_loss(around_model=reverse_only, around_loss=once_only)
    tx = kfqn.kfac(1.0, LAYERS)

    @quick_jit
    def step(params, state):
        value, grads, curvature = kfqn.value_and_grad(loss, LAYERS)(params, X, Y)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, value

    params, state, values = PARAMS, tx.init(PARAMS), []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0]
    assert kfqn.diagnostics(state)["rejected"] == 0
