"""K-BFGS(L), KF-QN and KFAC against what their papers define, and losses that differentiate the model."""

import functools

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import zoo

import kfqn_optax as kfqn
from kfqn_optax import _learning
from kfqn_optax.bench._quick import quick_jit


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def close(ours, reference, tolerance=1e-10):
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * max(1, np.abs(reference).max()))


def trainer(loss_fn, layers, tx, **options):
    """One compiled step of (params, opt_state, *batch); it returns the statistics before the step too."""
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, **options)

    @quick_jit
    def step(params, opt_state, *batch):
        loss, grads, curvature = value_and_grad(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, loss, grads

    return step


# -------------------------------------------------------------------------------------- limited memory


@pytest.mark.parametrize("count", [0, 2, 40])
def test_lbfgs_is_bfgs_from_the_last_pairs(float64, rng, count):
    """An empty buffer, a half-full one, and one that was filled ten times over."""
    dim, memory, gamma = 6, 4, 0.7
    taken = [(s, y if s @ y > 0 else -y) for s, y in rng.normal(size=(count, 2, dim))]
    factor = kfqn.lbfgs(memory)

    @quick_jit
    def run(pairs, x):
        state = factor.init(dim, jnp.float64, gamma)
        state, _ = jax.lax.scan(lambda state, pair: (factor.update(state, *pair), None), state, pairs)
        one_by_one = jax.lax.map(functools.partial(factor.apply, state), x.T).T
        return factor.apply(state, jnp.eye(dim)), factor.apply(state, x), one_by_one

    x = rng.normal(size=(dim, 3))
    ys = np.array([y for _, y in taken]).reshape(count, dim)
    h, hx, columns = run((np.array([s for s, _ in taken]).reshape(count, dim), ys), x)
    reference = oracles.lbfgs(taken[-memory:], dim, gamma)
    close(h, reference)
    close(h, h.T)
    close(hx, reference @ x)
    close(columns, hx, 1e-12)
    if taken:
        s, y = taken[-1]
        close(h @ y, s)


class Wide(nn.Module):
    """Sides of 41 and more, all longer than the memory and its square."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 43)(ids)
        x = nn.Conv(44, 3)(x)
        return nn.DenseGeneral((41, 2), name="out")(jnp.tanh(x))


def test_limited_inputs_store_no_square_array():
    model, ids = Wide(), jnp.zeros((2, 5), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    layers = kfqn.find_layers(model, variables, ids)
    assert [layer.rows for layer in layers] == [3 * 43 + 1, 50, 45]
    tx = kfqn.kbfgs_l(0.1, layers, memory=5, limited_inputs=True)
    state = jax.eval_shape(tx.init, variables["params"])[0]
    shapes = [leaf.shape for leaf in jax.tree.leaves((state.inputs, state.outputs))]
    assert len(shapes) > 20
    assert max(min(shape) if len(shape) > 1 else 0 for shape in shapes) == 5
    numbers = sum(leaf.size for leaf in jax.tree.leaves((state.inputs, state.outputs)))
    assert numbers < 1.1 * sum(2 * 5 * (layer.rows + layer.out_dim) for layer in layers)


# ------------------------------------------------------------------------------- KF-QN of a convolution


class PaperConvolution:
    """KF-QN of one convolution in the paper's convention, from explicit patches (n, T, d_in + 1).

    There A is a sum over the T positions, A_p = T A, and the output gradient a mean over them,
    g_p = g / T; the damping is split as l_A,p = sqrt(lambda T) and l_G,p = sqrt(lambda / T). With ours,
    l_A = sqrt(lambda / T) and l_G = sqrt(lambda T), every quantity differs by a power of T alone:

        A_p + l_A,p I = T (A + l_A I),              so  H_a,p = H_a / T  solves the paper's secant
                                                    equation when H_a solves ours,
        y_p + l_G,p s = (y + l_G s) / T,            so  H_g,p = T H_g,

    also through Powell's damping, whose two sides s^T y and y^T H y both are divided by T. The product
    H_a,p (x) H_g,p = H_a (x) H_g, and with it every update, is the same from the same start:
    H_a,p = H_a / T, H_g,p = T H_g.
    """

    def __init__(self, patches, matrix, damping, learning_rate):
        self.patches, self.matrix, self.learning_rate = patches, matrix, learning_rate
        examples, self.positions, rows = patches.shape
        self.a = np.einsum("nti,ntj->ij", patches, patches) / examples
        self.l_a, self.l_g = np.sqrt(damping * self.positions), np.sqrt(damping / self.positions)
        self.h_a = np.eye(rows) / (np.diag(self.a).mean() + self.l_a)
        self.h_g = self.positions * np.eye(matrix.shape[1])
        self.momentum = np.zeros_like(matrix)
        self.s, self.y = np.zeros((2, matrix.shape[1]))

    def forward(self):
        """Mean pre-activation and mean per-position gradient (the virtual bias's over T), and dL/dW."""
        h = self.patches @ self.matrix
        g = np.asarray(jax.grad(zoo.loss_of)(jnp.asarray(h)))
        grad = np.einsum("nti,nto->io", self.patches, g)
        return h.mean((0, 1)), g.sum((0, 1)) / self.positions, grad

    def step(self):
        h, g, grad = self.forward()
        self.momentum = 0.9 * self.momentum + 0.1 * grad
        self.matrix = self.matrix - self.learning_rate * self.h_a @ self.momentum @ self.h_g
        s = self.h_a @ self.patches.mean((0, 1))
        self.h_a = oracles.bfgs(self.h_a, s, self.a @ s + self.l_a * s)
        h_after, g_after, _ = self.forward()
        self.s = 0.9 * self.s + 0.1 * (h_after - h)
        self.y = 0.9 * self.y + 0.1 * (g_after - g)
        self.h_g = oracles.bfgs(self.h_g, *oracles.dp_dlm(self.h_g, self.s, self.y, 0.2, self.l_g))


def test_kfqn_of_a_convolution_is_the_papers(float64, rng):
    damping, learning_rate = 0.05, 0.5
    model, x = nn.Conv(2, (3, 2), padding="VALID", param_dtype=jnp.float64), rng.normal(size=(4, 5, 4, 2))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 2), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    patches = windows.reshape(4, 9, 12)
    patches = np.concatenate([patches, np.ones((4, 9, 1))], -1)
    matrix = rng.normal(size=(13, 2))
    params = {"kernel": jnp.asarray(matrix[:-1]).reshape(3, 2, 2, 2), "bias": jnp.asarray(matrix[-1])}
    layers = kfqn.find_layers(model, {"params": params}, jnp.asarray(x))
    assert layers["."].positions == 9
    tx = kfqn.kfqn(learning_rate, layers, damping=damping, step_rule=None)
    step = trainer(lambda params, x: zoo.loss_of(model.apply({"params": params}, x)), layers, tx)
    paper, state = PaperConvolution(patches, matrix, damping, learning_rate), tx.init(params)
    for _ in range(6):
        params, state, _, _ = step(params, state, x)
        paper.step()
        close(np.vstack([params["kernel"].reshape(12, 2), params["bias"]]), paper.matrix)
        close(state[0].inputs["."].factor / 9, paper.h_a)
        close(9 * state[0].outputs["."].factor, paper.h_g)
    counts = [side["."].pairs.counts for side in (state[0].inputs, state[0].outputs)]
    assert [int(count[0]) for count in counts] == [6, 6]
    assert np.abs(paper.h_g / 9 - np.eye(2)).max() > 0.1


def test_the_minibatch_action_takes_a_of_the_second_pass(float64, rng):
    """The second layer's inputs change with the step, and y = (A+ + l_A) s of the changed ones."""
    model, x = zoo.Mlp(param_dtype=jnp.float64), jnp.asarray(rng.normal(size=(6, 4)))
    params = zoo.randomise(model.init(jax.random.key(0), x))["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)
    tx = kfqn.kfqn(2.0, layers, damping=0.09, step_rule=None)
    loss = lambda params, x: zoo.loss_of(model.apply({"params": params}, x))
    moved, state, _, _ = trainer(loss, layers, tx)(params, tx.init(params), x)

    def rows(params):
        return np.hstack([np.tanh(x @ params["Dense_0"]["kernel"]), np.ones((6, 1))])

    before, after = rows(params), rows(moved)
    assert np.abs(before - after).max() > 0.01
    h = np.eye(4) / ((before**2).mean() + 0.3)
    s = h @ before.mean(0)
    close(state[0].inputs["Dense_1"].factor, oracles.bfgs(h, s, after.T @ (after @ s) / 6 + 0.3 * s))


# ------------------------------------------------------------------------------------------------- KFAC


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def fisher_of(loss_of_example, params, *examples):
    """The dense Fisher matrix, from the gradient of each example."""
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    one = lambda flat, *example: loss_of_example(unflatten(flat), *example)
    grads = np.asarray(jax.vmap(jax.grad(one), in_axes=(None,) + (0,) * len(examples))(flat, *examples))
    return grads.T @ grads / len(grads), flat, unflatten


@pytest.mark.parametrize("kind", ["gaussian", "softmax"])
def test_kfac_is_natural_gradient_where_the_fisher_matrix_is_a_kronecker_product(float64, rng, kind):
    """One linear layer: with Gaussian outputs, or at equal logits, the Fisher matrix is A (x) G exactly.

    All labels the model could draw are there for every example, so that drawing adds no noise.
    """
    model, x = nn.Dense(3, param_dtype=jnp.float64), jnp.asarray(rng.normal(size=(8, 4)))
    params = zoo.randomise(model.init(jax.random.key(0), x))["params"]
    apply = lambda params, x: model.apply({"params": params}, x)
    outcomes = 6 if kind == "gaussian" else 3
    inputs = jnp.repeat(x, outcomes, axis=0)
    if kind == "gaussian":
        noise = np.sqrt(3) * np.concatenate([np.eye(3), -np.eye(3)])
        labels = jax.lax.stop_gradient(apply(params, inputs)) + jnp.tile(noise, (8, 1))
        example_loss = lambda params, x, label: 0.5 * jnp.sum((apply(params, x) - label) ** 2)
        target = jnp.asarray(rng.normal(size=(8, 3)))
    else:
        params = {"kernel": jnp.zeros_like(params["kernel"]), "bias": jnp.zeros(3)}
        labels, target = jnp.tile(jnp.arange(3), 8), jnp.asarray(rng.integers(3, size=8))
        example_loss = lambda params, x, label: cross_entropy(apply(params, x), label)

    def mean_loss(params, x, labels):
        return jax.vmap(example_loss, in_axes=(None, 0, 0))(params, x, labels).mean()

    layers = kfqn.find_layers(model, {"params": params}, x)
    learning_rate, root = 0.5, 1e-3
    tx = kfqn.kfac(learning_rate, layers, damping=root**2, momentum=0.0, step_rule=None)
    drawn = lambda params, *batch: mean_loss(params, inputs, labels)
    step = trainer(drawn, layers, tx)
    moved, state, _, grads = step(params, tx.init(params), x, target)

    dense, flat, unflatten = fisher_of(example_loss, params, inputs, labels)
    a, g = state[0].inputs["."].second_moment, state[0].outputs["."].second_moment
    rows = np.hstack([x, np.ones((8, 1))])
    close(a, rows.T @ rows / 8)
    close(g, np.eye(3) if kind == "gaussian" else np.eye(3) / 3 - 1 / 9)

    def matrix(vector):
        tree = unflatten(vector)
        return jnp.vstack([tree["kernel"], tree["bias"]])

    to_matrix = jax.vmap(lambda vector: matrix(vector).ravel())(jnp.eye(flat.size))  # orthogonal
    close(to_matrix.T @ dense @ to_matrix, np.kron(a, g))
    l_a, l_g = oracles.split_damping(root**2, a, g)
    damped = np.kron(a + l_a * np.eye(5), g + l_g * np.eye(3))
    natural = np.linalg.solve(damped, np.vstack([grads["kernel"], grads["bias"]]).ravel())
    ours = matrix(jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, moved, params))[0])
    close(np.asarray(ours).ravel(), -learning_rate * natural)


def test_kfac_averages_the_fisher_factors_and_inverts_on_schedule(float64, rng, monkeypatch):
    """A and G of two layers by brute force over eight batches, seen at steps 1, 2, 3, then 5, 7 ...

    The loss marks nothing, so that G is the covariance of the gradients.
    """
    monkeypatch.setattr(_learning, "LEARN_AT_FIRST", 3)
    model, damping = zoo.Mlp(param_dtype=jnp.float64), 0.04
    batches = [(jnp.asarray(x), jnp.asarray(rng.integers(2, size=6))) for x in rng.normal(size=(8, 6, 4))]
    params = zoo.randomise(model.init(jax.random.key(0), batches[0][0]))["params"]
    layers = kfqn.find_layers(model, {"params": params}, batches[0][0])

    def loss(params, x, labels):
        return cross_entropy(model.apply({"params": params}, x), labels).mean()

    def output(shift, params, x, label):
        """The loss of one example, with a shift of each layer's output."""
        hidden = jnp.tanh(x @ params["Dense_0"]["kernel"] + shift[0])
        return cross_entropy(
            hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"] + shift[1], label
        )

    per_example = jax.vmap(jax.grad(output), in_axes=(None, None, 0, 0))
    tx = kfqn.kfac(0.3, layers, damping=damping, decay=0.8, inverse_every=2, step_rule=None)
    step = trainer(loss, layers, tx)
    state, moments, inverses, seen = tx.init(params), None, None, 0
    for k, (x, labels) in enumerate(batches, start=1):
        hidden = jnp.tanh(x @ params["Dense_0"]["kernel"])
        grads = per_example([jnp.zeros(zoo.WIDTH), jnp.zeros(2)], params, x, labels)
        centred = [grad - grad.mean(0, keepdims=True) for grad in grads]
        rows = [x, jnp.hstack([hidden, jnp.ones((6, 1))]), *centred]
        if k <= 3 or k % 2 == 1:
            seen += 1
            now, rate = [np.asarray(row.T @ row) / 6 for row in rows], min(0.8, 1 - 1 / seen)
            moments = moments or now
            moments = [rate * old + (1 - rate) * new for old, new in zip(moments, now, strict=True)]
            of_layers = [oracles.split_damping(damping, moments[i], moments[i + 2]) for i in range(2)]
            dampings = [of_layers[i][side] for side in range(2) for i in range(2)]
            inverses = [
                np.linalg.inv(moment + own * np.eye(len(moment)))
                for moment, own in zip(moments, dampings, strict=True)
            ]
        params, state, _, _ = step(params, state, x, labels)
        sides = [side[f"Dense_{i}"] for side in (state[0].inputs, state[0].outputs) for i in range(2)]
        for side, moment, inverse in zip(sides, moments, inverses, strict=True):
            close(side.second_moment, moment)
            close(side.factor, inverse)


# ------------------------------------------------------- losses that differentiate the model (PINNs)


class Field(nn.Module):
    """u(x) of one number, 0 at both ends."""

    width: int = 3

    @nn.compact
    def __call__(self, x):
        y = x[None]
        for _ in range(2):
            y = jnp.tanh(nn.Dense(self.width)(y))
        return x * (1 - x) * nn.Dense(1)(y)[0]


def by_jvp(u):
    derivative = lambda u: lambda x: jax.jvp(u, (x,), (jnp.ones_like(x),))[1]
    return derivative(derivative(u))


SECOND = {"grad of grad": lambda u: jax.grad(jax.grad(u)), "hessian": jax.hessian, "jvp of jvp": by_jvp}


def poisson(second, width=3):
    """u'' + pi^2 sin(pi x) = 0: the loss of (params, points), and u itself."""
    model = Field(width)

    def values(params, points):
        return jax.vmap(lambda x: model.apply({"params": params}, x))(points)

    def loss(params, points):
        residual = jax.vmap(second(lambda x: model.apply({"params": params}, x)))(points)
        return jnp.mean((residual + jnp.pi**2 * jnp.sin(jnp.pi * points)) ** 2)

    return model, loss, values


@pytest.mark.parametrize("name", SECOND)
def test_gradients_of_a_loss_with_second_derivatives_are_those_of_a_constant_shift(float64, name):
    """That is what a bias is; inputs are those of a plain forward pass."""
    model, loss, values = poisson(SECOND[name])
    points = jnp.linspace(0, 1, 5)
    params = zoo.randomise(jax.eval_shape(model.init, jax.random.key(0), points[0]), jnp.float64)["params"]
    layers = kfqn.find_layers(model, {"params": params}, points[0])

    @quick_jit
    def run(params):
        forward = None if name == "grad of grad" else values
        _, grads, curvature = kfqn.value_and_grad(loss, layers, forward=forward)(params, points)
        _, _, plain = kfqn.value_and_grad(lambda *args: zoo.loss_of(values(*args)), layers)(params, points)
        return grads, jax.grad(loss)(params, points), curvature.statistics, plain.statistics

    grads, reference, statistics, plain = run(params)
    jax.tree.map(close, grads, reference)
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        close(statistics[layer].preactivation_grads, grads[layer]["bias"], 1e-12)
        assert statistics[layer].rows == plain[layer].rows == 5
        close(statistics[layer].inputs, plain[layer].inputs, 1e-12)
        close(statistics[layer].second_moment, plain[layer].second_moment, 1e-12)


@pytest.mark.parametrize("name", ["hessian", "jvp of jvp"])
def test_forward_mode_without_forward_says_what_to_do(name):
    model, loss, _ = poisson(SECOND[name])
    variables = model.init(jax.random.key(0), jnp.zeros([]))
    layers = kfqn.find_layers(model, variables, jnp.zeros([]))
    with pytest.raises(TypeError, match="forward-mode") as caught:
        kfqn.value_and_grad(loss, layers)(variables["params"], jnp.linspace(0, 1, 5))
    assert any("forward=lambda params, *args: model.apply(...)" in note for note in caught.value.__notes__)


def test_a_layer_of_which_only_derivatives_count_needs_forward():
    """Its output itself is on no path of the gradient, which would have brought its rows."""
    model, x = nn.Sequential([nn.Dense(3), nn.tanh, nn.Dense(1)]), jnp.linspace(0, 1, 5)
    params = model.init(jax.random.key(0), x[:1])["params"]
    layers = kfqn.find_layers(model, {"params": params}, x[:1])
    values = lambda params: jax.vmap(lambda x: model.apply({"params": params}, x[None])[0])(x)

    def loss(params):
        return jnp.mean(jax.vmap(jax.grad(lambda x: model.apply({"params": params}, x[None])[0]))(x) ** 2)

    @quick_jit
    def run(params):
        captured = lambda forward: kfqn.value_and_grad(loss, layers, forward=forward)(params)[2].statistics
        return captured(None), captured(values)

    without, given = run(params)
    rows = lambda statistics: [int(statistics[layer.name].rows) for layer in layers]
    assert rows(without) == [5, 0]
    assert rows(given) == [5, 5]
    np.testing.assert_allclose(
        without["layers_0"].preactivation_grads, given["layers_0"].preactivation_grads, 1e-5, 1e-6
    )


def test_kbfgs_solves_poissons_equation():
    model, loss, values = poisson(jax.hessian, width=8)
    points = jnp.linspace(0, 1, 17)
    params = model.init(jax.random.key(0), points[0])["params"]
    layers = kfqn.find_layers(model, {"params": params}, points[0])
    tx = kfqn.kbfgs(0.3, layers)
    value_and_grad = kfqn.value_and_grad(loss, layers, forward=values)

    def step(carry, _):
        params, opt_state = carry
        value, grads, curvature = value_and_grad(params, points)
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), opt_state), value

    run = quick_jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=150))
    (params, _), losses = run(params)
    assert losses[-1] < losses[0] / 1000
    np.testing.assert_allclose(values(params, points), jnp.sin(jnp.pi * points), atol=0.02)
