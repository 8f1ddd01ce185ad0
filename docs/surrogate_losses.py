"""Measure what surrogate_losses.md tells of: a policy, a wave function and the values of a chain of states.

    python surrogate_losses.py [policy] [wave-function] [values]

Each line is one method, with one number for each of three seeds (one for the values). A part takes minutes.
"""

import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import kfqn_optax as kfqn

Method = Callable[..., optax.GradientTransformation]
stopped = jax.lax.stop_gradient


def network(outputs: int, inputs: jax.Array, seed: int) -> tuple[nn.Module, Any, kfqn.Layers]:
    """One hidden layer of 32 tanh, its parameters and its layers."""
    model = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(outputs)])
    params = model.init(jax.random.key(seed), inputs)["params"]
    return model, params, kfqn.find_layers(model, {"params": params}, inputs)


def trained(loss_fn, layers, method, params, batch_of, carried, seed, steps):
    """The parameters and what a run carries along, after the steps; ``batch_of`` makes each batch."""
    tx = method(layers)
    value_and_grad = None if layers is None else kfqn.value_and_grad(loss_fn, layers)

    @jax.jit
    def step(params, carried, state, key):
        carried, batch = batch_of(params, carried, key)
        if value_and_grad is None:
            updates, state = tx.update(jax.grad(loss_fn)(params, *batch), state, params)
        else:
            _, grads, curvature = value_and_grad(params, *batch)
            updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), carried, state

    state = tx.init(params)
    for key in jax.random.split(jax.random.key(seed), steps):
        params, carried, state = step(params, carried, state, key)
    return params, carried


def adam(rate: float) -> Method:
    return lambda layers: optax.adam(rate)


def kfac(rate: float = 1.0, **settings: Any) -> Method:
    return lambda layers: kfqn.kfac(rate, layers, **settings)


def kbfgs(rate: float) -> Method:
    return lambda layers: kfqn.kbfgs(rate, layers)


def common(surrogate: Any, with_fisher: Any, layers: kfqn.Layers) -> list[tuple[str, Any, Any, Method]]:
    """What is tried on the policy and on the wave function: title, loss, layers (None for Adam), method."""
    return [
        ("Adam 0.01", surrogate, None, adam(0.01)),
        ("kbfgs 0.1", surrogate, layers, kbfgs(0.1)),
        ("kfac 1.0, surrogate alone, no mark", surrogate, layers, kfac()),
        ("kfac 1.0, Fisher term", with_fisher, layers, kfac()),
        ("kfac 0.3, step_rule=0.001", with_fisher, layers, kfac(0.3, damping=0.01, step_rule=0.001)),
        ("kfac 0.3, step_rule=0.01", with_fisher, layers, kfac(0.3, damping=0.01, step_rule=0.01)),
    ]


def policy() -> None:
    """512 contexts of 8 numbers, 5 arms: the regret of the policy, of its expected reward."""
    contexts = jax.random.normal(jax.random.key(0), (512, 8))
    rewards = jnp.sin(2 * contexts @ jax.random.normal(jax.random.key(1), (8, 5)))
    model, params, layers = network(5, contexts, 2)

    def surrogate(params, actions, advantages):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, contexts))
        return -(advantages * jnp.take_along_axis(log_p, actions[:, None], 1)[:, 0]).mean()

    def with_fisher(params, actions, advantages):
        logits = model.apply({"params": params}, contexts)
        now = stopped(jax.nn.log_softmax(logits))
        marked = jax.nn.log_softmax(kfqn.outputs(logits, "categorical"))
        divergence = (jnp.exp(now) * (now - marked)).sum(1).mean()
        return surrogate(params, actions, advantages) + divergence

    def batch_of(params, carried, key):
        logits = model.apply({"params": params}, contexts)
        actions = jax.random.categorical(key, logits)
        gained = jnp.take_along_axis(rewards, actions[:, None], 1)[:, 0]
        return carried, (actions, gained - (jax.nn.softmax(logits) * rewards).sum(1))

    def regret(params):
        chosen = jax.nn.softmax(model.apply({"params": params}, contexts))
        return float((rewards.max(1) - (chosen * rewards).sum(1)).mean())

    print(f"policy, regret at the start: {regret(params):.2f}", flush=True)
    tries = [("Adam 0.003", surrogate, None, adam(0.003)), *common(surrogate, with_fisher, layers)]
    tries += [("kfac 1.0, step_rule=0.1", with_fisher, layers, kfac(1.0, damping=0.01, step_rule=0.1))]
    for title, loss_fn, known, method in tries:
        ends = [trained(loss_fn, known, method, params, batch_of, (), seed, 300)[0] for seed in range(3)]
        print(f"policy | {title} |", ", ".join(f"{regret(end):.2f}" for end in ends), flush=True)


def wave_function() -> None:
    """A harmonic oscillator in three dimensions: energy (exactly 1.5) and deviation of the local energy."""
    walkers = jax.random.normal(jax.random.key(3), (512, 3))
    model, params, layers = network(1, walkers, 4)

    def log_psi(params, x):
        return model.apply({"params": params}, x)[..., 0] - 0.1 * (x**2).sum(-1)

    def local_energies(params, x):
        def one(x):
            slope = jax.grad(log_psi, 1)(params, x)
            return -0.5 * (jnp.trace(jax.hessian(log_psi, 1)(params, x)) + slope @ slope) + 0.5 * x @ x

        return jax.vmap(one)(x)

    def moved(params, x, key, moves):
        def move(x, key):
            proposal, accept = jax.random.split(key)
            new = x + 0.7 * jax.random.normal(proposal, x.shape)
            log_ratio = 2 * (log_psi(params, new) - log_psi(params, x))
            taken = jnp.log(jax.random.uniform(accept, x.shape[:1])) < log_ratio
            return jnp.where(taken[:, None], new, x), None

        return jax.lax.scan(move, x, jax.random.split(key, moves))[0]

    def batch_of(params, x, key):
        x = moved(params, x, key, 10)
        energies = local_energies(params, x)
        middle = jnp.median(energies)
        return x, (x, jnp.clip(energies, middle - 5, middle + 5))

    def surrogate(params, x, energies):
        return 2 * ((energies - energies.mean()) * log_psi(params, x)).mean()

    def with_fisher(params, x, energies):
        value = log_psi(params, x)
        centred = kfqn.outputs(value - value.mean(), "normal")
        return surrogate(params, x, energies) + ((centred - stopped(centred)) ** 2).mean()

    @jax.jit
    def energy(params, x):
        energies = local_energies(params, moved(params, x, jax.random.key(9), 100))
        return energies.mean(), energies.std()

    tries = [("Adam 0.001", surrogate, None, adam(0.001)), *common(surrogate, with_fisher, layers)]
    for title, loss_fn, known, method in tries:
        ends = [
            energy(*trained(loss_fn, known, method, params, batch_of, walkers, seed, 300))
            for seed in range(3)
        ]
        shown = ", ".join(f"{float(mean):.3f} ± {float(deviation):.2f}" for mean, deviation in ends)
        print(f"wave function | {title} | {shown}", flush=True)


def values() -> None:
    """Expected TD(0) on a chain of 20 states, the target made anew in each step: the largest error."""
    chain = jnp.float32(np.random.default_rng(0).dirichlet(np.full(20, 0.3), 20))
    rewards, states = jnp.sin(jnp.arange(20.0)) + 0.5, jnp.eye(20)
    exact = jnp.linalg.solve(jnp.eye(20) - 0.95 * chain, rewards)
    model, params, layers = network(1, states, 1)
    of = lambda params: model.apply({"params": params}, states)[:, 0]

    def loss_fn(params, targets):
        return jnp.mean((kfqn.outputs(of(params), "normal") - targets) ** 2)

    def batch_of(params, carried, key):
        return carried, (rewards + 0.95 * chain @ of(params),)

    tries: list[tuple[str, Any, int, Method]] = [
        ("Adam 0.003, 600 steps", None, 600, adam(0.003)),
        ("kbfgs 0.3", layers, 300, kbfgs(0.3)),
        ("kfac 1.0", layers, 300, kfac()),
        ("kfac 0.3, step_rule=1.0", layers, 300, kfac(0.3, damping=0.01, step_rule=1.0)),
    ]
    for title, known, steps, method in tries:
        end, _ = trained(loss_fn, known, method, params, batch_of, (), 0, steps)
        print(f"values | {title} | {float(jnp.abs(of(end) - exact).max()):.2g}", flush=True)


PARTS = {"policy": policy, "wave-function": wave_function, "values": values}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
