"""Twenty steps of every method, kept in files, to see after a change whether all of them are the same bits.

    python tests/record_steps.py FOLDER            # records what is not there yet
    python tests/record_steps.py FOLDER --compare  # runs all again; prints what differs, and exits with 1
    python tests/record_steps.py FOLDER --only mlp  # those whose name has this

Bits are those of one machine and one JAX: record before a change, and compare after each commit of it.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import kfqn_optax as kfqn

STEPS = 20

METHODS: dict[str, Callable[..., Any]] = {
    "kbfgs": kfqn.kbfgs,
    "kbfgs_l": kfqn.kbfgs_l,
    "kfqn": kfqn.kfqn,
    "kfac": kfqn.kfac,
    "kfac measured": functools.partial(kfqn.kfac, step_rule=kfqn.measured(), damping=0.1, momentum=0.9),
    "kbfgs quadratic": functools.partial(kfqn.kbfgs, step_rule=kfqn.quadratic(), damping=1.0),
    "kbfgs papers": functools.partial(kfqn.kbfgs, step_rule=None, others_decay=None),
    "kbfgs capped": functools.partial(kfqn.kbfgs, step_rule=0.1),
    "kbfgs groups": functools.partial(kfqn.kbfgs, groups=2),
    "kbfgs refresh": functools.partial(kfqn.kbfgs, update_every=3),
    "kfqn refresh": functools.partial(kfqn.kfqn, update_every=3),
}
MAIN = ("kbfgs", "kfac")


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(9)(x))
        x = nn.LayerNorm()(x)
        return nn.Dense(3)(nn.relu(nn.Dense(9)(x)))


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return nn.Dense(11)(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))))


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(9)(x)), None


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(9)(x)
        scan = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(3)(scan()(x, None)[0])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(7, 9, rngs=rngs), nnx.Linear(9, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.first(x)))


def classes(model, params, x, y):
    logits = kfqn.outputs(model.apply({"params": params}, x), "categorical")
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def residuals(model, params, x, y):
    """u'' = -sin(pi x) on [0, 1], zero at both ends."""
    u = lambda x: x * (1 - x) * model.apply({"params": params}, x.reshape(1, 1))[0, 0]
    residual = jax.vmap(jax.grad(jax.grad(u)))(x[:, 0]) + jnp.sin(jnp.pi * x[:, 0]) + 0 * y
    return jnp.mean(kfqn.outputs(residual, "normal") ** 2)


def data(name, dtype):
    rng = np.random.default_rng(0)
    shapes = {"cnn": (30, 8, 8, 3), "pinn": (40, 1)}
    if name == "transformer":
        tokens = rng.integers(11, size=(STEPS, 20, 7))
        return tokens, np.roll(tokens, 1, -1)
    # 300 examples: the factors and the model take a part of them
    x = rng.normal(size=(STEPS, *shapes.get(name, (300, 7))))
    x = 1 / (1 + np.exp(-x)) if name == "pinn" else x
    labels = np.argmax(x.reshape(*x.shape[:2], -1)[..., :3], -1) if name != "pinn" else 0 * x[..., 0]
    return x.astype(dtype), labels if name != "pinn" else labels.astype(dtype)


MODELS = {
    "mlp": (Mlp(), classes),
    "masked": (Mlp(), classes),
    "cnn": (Cnn(), classes),
    "transformer": (Transformer(), classes),
    "scan": (Deep(), classes),
    "pinn": (nn.Sequential([nn.Dense(9), nn.tanh, nn.Dense(1)]), residuals),
}


def linen(name, method, dtype):
    """The parameters after each step, as one vector each, and the losses."""
    (model, loss_of), (x, y) = MODELS[name], data(name, dtype)
    params = model.init(jax.random.key(1), x[0][:2])["params"]
    if dtype == np.float64:
        params = jax.tree.map(jnp.float64, params)
    layers = kfqn.find_layers(model, {"params": params}, x[0][:2])
    groups = {"groups": 2} if method == "kbfgs groups" else {}
    loss_fn = functools.partial(loss_of, model)
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2), **groups)
    tx = METHODS[method](1.0, layers)
    if name == "masked":
        labels = {key: "ours" if key != "Dense_1" else "adam" for key in params}
        tx = optax.partition({"ours": tx, "adam": optax.adam(1e-3)}, labels)

    @jax.jit
    def step(params, state, x, y):
        loss, grads, curvature = value_and_grad(params, x, y)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state, loss

    state, course, losses = tx.init(params), [], []
    for rows, targets in zip(x, y, strict=True):
        params, state, loss = step(params, state, rows, targets)
        course.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]))
        losses.append(np.asarray(loss))
    return np.stack(course), np.stack(losses)


def by_nnx(name, method, dtype):
    model, (x, y) = Net(nnx.Rngs(0)), data(name, dtype)
    layers = kfqn.find_layers(model, x[0][:2])

    def loss_fn(model, x, y):
        logits = kfqn.outputs(model(x), "categorical")
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    optimizer = nnx.Optimizer(model, METHODS[method](1.0, layers), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads, curvature = value_and_grad(model, x, y)
        optimizer.update(model, grads, curvature=curvature)
        return loss

    course, losses = [], []
    for rows, targets in zip(x, y, strict=True):
        losses.append(np.asarray(step(model, optimizer, rows, targets)))
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        course.append(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    return np.stack(course), np.stack(losses)


def cases():
    for method in METHODS:
        for dtype in ("float64", "float32"):
            yield "mlp", method, dtype
    for name in ("cnn", "transformer", "scan", "pinn", "masked", "nnx"):
        for method in MAIN:
            yield name, method, "float32"
    yield "cnn", "kfqn", "float32"
    yield "pinn", "kfac", "float64"


def run(name, method, dtype):
    with jax.enable_x64(dtype == "float64"):
        return (by_nnx if name == "nnx" else linen)(name, method, np.dtype(dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    differ = 0
    for case in cases():
        title = " ".join(case)
        path = args.folder / f"{title.replace(' ', '_')}.npz"
        if args.only not in title or (path.exists() and not args.compare):
            continue
        params, losses = run(*case)
        if not args.compare:
            np.savez_compressed(path, params=params, losses=losses)
            print(f"{title}: {losses[0]:.6g} to {losses[-1]:.6g}", flush=True)
            continue
        with np.load(path) as kept:
            same = [np.array_equal(kept["params"][i], params[i]) for i in range(STEPS)]
            error = np.abs(kept["params"] - params).max(1) / np.abs(params).max()
        if all(same):
            print(f"{title}: the same", flush=True)
            continue
        differ += 1
        first = same.index(False)
        print(
            f"{title}: differs from step {first} on, by {error[first]:.1e} to {error[-1]:.1e}", flush=True
        )
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
