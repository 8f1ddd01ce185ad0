"""Very many steps of a small network, and the worst that its factors came to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn
from kfqn_optax.bench._faults.run import (
    BATCH,
    EXAMPLES,
    METHODS,
    MODEL,
    data,
    factors,
    loss_fn,
    smallest_eigenvalue,
)


class Soak(NamedTuple):
    """What became of a run; the extremes are of all checks, one after each chunk of steps.

    Attributes:
      first, last: mean loss of the first and of the last chunk.
      asymmetry: the largest element of M - M^T of any factor M, over the largest of M.
      positive: the smallest eigenvalue of any factor's symmetric part over its largest.
      largest: the largest element of any leaf of the state, counts aside.
      finite: whether parameters and state were.
      rejected: how many steps were left out.
    """

    method: str
    steps: int
    first: float
    last: float
    asymmetry: float
    positive: float
    largest: float
    finite: bool
    rejected: int


def soak(method: str, steps: int, chunk: int, jit: Callable[..., Any] = jax.jit) -> Soak:
    """Train with the method's defaults and look at its factors after every ``chunk`` steps."""
    params, state, train = _trainer(method, chunk, jit)
    losses: list[float] = []
    asymmetry, positive, largest, finite = 0.0, np.inf, 0.0, True
    for key in jax.random.split(jax.random.key(1), steps // chunk):
        params, state, loss = train(params, state, key)
        losses.append(float(loss))
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((params, state))]
        numbers = [leaf for leaf in leaves if np.issubdtype(leaf.dtype, np.floating)]
        finite = all(np.isfinite(leaf).all() for leaf in numbers)
        if not finite:
            break
        largest = max(largest, *(np.abs(leaf).max(initial=0) for leaf in numbers))
        positive = min(positive, smallest_eigenvalue(state))
        asymmetry = max(asymmetry, *(np.abs(m - m.T).max() / np.abs(m).max() for m in factors(state)))
    return Soak(
        method,
        len(losses) * chunk,
        losses[0],
        losses[-1],
        float(asymmetry),
        float(positive),
        float(largest),
        finite,
        int(kfqn.diagnostics(state)["rejected"]),
    )


def _trainer(method: str, chunk: int, jit: Callable[..., Any]) -> tuple[Any, Any, Callable[..., Any]]:
    x, y = map(jnp.asarray, data())
    params = jax.jit(MODEL.init)(jax.random.key(0), x[:1])["params"]
    layers = kfqn.find_layers(MODEL, {"params": params}, x[:1])
    value_and_grad = kfqn.value_and_grad(loss_fn, layers, batch_argnums=(1, 2))
    tx = METHODS[method](1.0, layers)

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, EXAMPLES, (BATCH,), replace=False)
        loss, grads, curvature = value_and_grad(params, x[rows], y[rows], 1.0)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), state), loss

    def train(params, state, key):
        (params, state), losses = jax.lax.scan(step, (params, state), jax.random.split(key, chunk))
        return params, state, losses.mean()

    return params, tx.init(params), jit(train)
