"""A of a convolution's patches: against patches cut out in NumPy, and in little memory on long inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import kfqn_optax as kfqn

RNG = np.random.default_rng(0)


def cut(x, window, stride, padding):
    """The patches of x (n, height, width, channels), (n, positions, d_in): zeros around it, or none."""
    if padding == "SAME":
        margins = [(0, 0)]
        for length, size in zip(x.shape[1:3], window, strict=True):
            missing = max((-(-length // stride) - 1) * stride + size - length, 0)
            margins.append((missing // 2, missing - missing // 2))
        x = np.pad(x, [*margins, (0, 0)])
    views = np.lib.stride_tricks.sliding_window_view(x, window, (1, 2))[:, ::stride, ::stride]
    views = views.transpose(0, 1, 2, 4, 5, 3)  # (n, rows, columns, *window, channels)
    return views.reshape(len(x), -1, np.prod(views.shape[3:]))


def moment_of(model, x, w=None):
    """A without the bias's row, and the layer."""
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss_fn(params, x):
        with kfqn.weights(jnp.ones(len(x)) if w is None else w):
            return jnp.mean(model.apply({"params": params}, x) ** 2)

    run = jax.jit(lambda p, x: kfqn.value_and_grad(loss_fn, layers)(p, x)[2].statistics["."])
    statistics, d = run(params, x), layers["."].in_dim
    return np.asarray(statistics.second_moment)[..., :d, :d], np.asarray(statistics.inputs)[..., :d]


@pytest.mark.parametrize("examples", [2, 7])
@pytest.mark.parametrize(("window", "stride", "padding"), [((3, 2), 1, "SAME"), ((4, 3), 2, "VALID")])
def test_all_rows_of_the_first_examples(window, stride, padding, examples, monkeypatch):
    """Their covariance, in blocks that do not divide them, around the mean of all."""
    monkeypatch.setattr("kfqn_optax._capture.sums.PATCHES", 200)
    monkeypatch.setattr("kfqn_optax._capture.sums.BLOCK", 37)
    with jax.enable_x64(True):
        x, w = RNG.normal(1, 1, (examples, 9, 8, 3)), RNG.uniform(0, 1, examples)
        model = nn.Conv(2, window, stride, padding=padding, param_dtype=jnp.float64)
        moment, mean = moment_of(model, jnp.asarray(x), jnp.asarray(w))
    rows = cut(x, window, stride, padding)
    seen = min(examples, 200 // rows.shape[1])
    assert (seen == examples) == (examples == 2 or padding == "VALID")
    share = lambda n: np.repeat(w[:n] / w[:n].sum() / rows.shape[1], rows.shape[1])
    flat = rows.reshape(-1, rows.shape[-1])
    mean_of_all, some = share(examples) @ flat, flat[: seen * rows.shape[1]]
    centred = some - share(seen) @ some
    wanted = (centred.T * share(seen)) @ centred + np.outer(mean_of_all, mean_of_all)
    np.testing.assert_allclose(mean, mean_of_all, rtol=1e-12)
    np.testing.assert_allclose(moment, wanted, rtol=1e-10, atol=1e-12)


def test_some_positions_of_a_long_input_are_like_all():
    """Of a smooth image, whose patches have two large directions: the estimate errs as 4,096 draws do."""
    with jax.enable_x64(True):
        grid = np.stack(np.meshgrid(np.linspace(0, 9, 120), np.linspace(0, 7, 110), indexing="ij"))
        image = np.stack([np.sin(grid[0] + grid[1]), np.cos(grid[0] - 2 * grid[1]), 0 * grid[0] + 1], -1)
        x = image[None] * RNG.uniform(0.5, 1.5, (3, 1, 1, 1)) + 0.1 * RNG.normal(size=(3, 120, 110, 3))
        model = nn.Conv(2, (3, 3), param_dtype=jnp.float64)
        moment, mean = moment_of(model, jnp.asarray(x))
    rows = cut(x, (3, 3), 1, "SAME").reshape(-1, 27)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-10)
    exact = rows.T @ rows / len(rows)
    assert np.linalg.eigvalsh(moment).min() > 0
    assert np.abs(moment - exact).max() < 0.05 * np.abs(exact).max()


def test_linen_and_nnx_draw_the_same_positions():
    x = jnp.asarray(RNG.normal(size=(2, 90, 80, 4)), jnp.float32)
    ours = nn.Conv(4, (3, 3), feature_group_count=2)
    theirs = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
    value_and_grad = kfqn.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2), kfqn.find_layers(theirs, x))
    moment = value_and_grad(theirs, x)[2].statistics["."].second_moment
    np.testing.assert_allclose(moment_of(ours, x)[0], moment[..., :18, :18], atol=1e-5)


# Memory


class Image(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Sound(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(32, (25,))(x))
        return nn.Dense(10)(x.mean(1))


@pytest.mark.parametrize("method", [kfqn.kfac, kfqn.kbfgs])
@pytest.mark.parametrize(("model", "shape"), [(Image(), (4, 256, 256, 64)), (Sound(), (8, 16_000, 32))])
def test_temporaries_of_a_step_on_long_inputs(model, shape, method):
    """No patches of a whole example. What kfac adds to Adam's are activations that its passes share."""
    x, y = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    layers = kfqn.find_layers(model, {"params": params}, x)

    def loss_fn(params, x, y):
        z = kfqn.outputs(model.apply({"params": params}, x), "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    ours, adam = method(1.0, layers), optax.adam(1e-3)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))

    def step(params, state, x, y):
        _, grads, curvature = value_and_grad(params, x, y)
        updates, state = ours.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    def plain(params, state, x, y):
        updates, state = adam.update(jax.grad(loss_fn)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    def temporaries(step, tx):
        state = jax.eval_shape(tx.init, params)
        return jax.jit(step).lower(params, state, x, y).compile().memory_analysis().temp_size_in_bytes

    most = 1.8 if method is kfqn.kfac else 1.25
    assert temporaries(step, ours) < most * temporaries(plain, adam)
