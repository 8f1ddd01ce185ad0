"""The authors' program, step by step: recorded trajectories are followed to rounding."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kfqn_optax as kfqn
from kfqn_optax.bench._quick import quick_jit

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = ["kbfgs_logistic", "kbfgs_mse", "kbfgsl_logistic"]
ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "linear": lambda x: x}


class Autoencoder(nn.Module):
    sizes: tuple[int, ...]
    activations: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        for size, activation in zip(self.sizes[1:], self.activations, strict=True):
            x = ACTIVATIONS[activation](nn.Dense(size, param_dtype=x.dtype)(x))
        return x


def sigmoid_loss(outputs, targets):
    return optax.sigmoid_binary_cross_entropy(outputs, targets).sum(-1).mean()


def half_squared_error(outputs, targets):
    return 0.5 * ((outputs - targets) ** 2).sum(-1).mean()


LOSSES = {
    "logistic-regression-sum-loss": sigmoid_loss,
    "linear-regression-half-MSE": half_squared_error,
}


def paper_kbfgs(layers, config):
    return kfqn.kbfgs(
        config["lr"],
        layers,
        damping=config["damping"],
        step_rule=None,
        momentum=config["momentum"],
        decay=config["decay"],
        mu1=config["mu1"],
    )


def paper_kbfgs_l(layers, config):
    return kfqn.kbfgs_l(
        config["lr"],
        layers,
        memory=config["npairs"],
        damping=config["damping"],
        step_rule=None,
        momentum=config["momentum"],
        decay=config["decay"],
        mu1=config["mu1"],
    )


OPTIMIZERS = {"K-BFGS": paper_kbfgs, "K-BFGS(L)": paper_kbfgs_l}


class Run:
    """One recorded run, and the same run by kfqn_optax."""

    def __init__(self, name, dtype):
        self.record = np.load(GOLDEN / f"{name}.npz")
        self.config = config = json.loads(self.record["config"].item())
        self.dtype = dtype
        self.x = jnp.asarray(self.record["X"], dtype)
        model = Autoencoder(tuple(config["sizes"]), tuple(config["acts"]))
        loss = LOSSES[config["loss"]]
        layers = kfqn.find_layers(model, {"params": self.initial()}, self.x)

        def loss_fn(params, x):
            fit = loss(model.apply({"params": params}, x), x)
            penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
            return fit + 0.5 * config["l2"] * penalty, fit

        self.value_and_grad = kfqn.value_and_grad(loss_fn, layers, has_aux=True)
        self.tx = OPTIMIZERS[config["algorithm"]](layers, config)
        self.train_step = quick_jit(self._train_step)

    def initial(self, perturbation=lambda w: w):
        return {
            f"Dense_{i}": {
                "kernel": jnp.asarray(perturbation(self.record[f"init/ls.{i}.weight"].T), self.dtype),
                "bias": jnp.asarray(perturbation(self.record[f"init/ls.{i}.bias"]), self.dtype),
            }
            for i in range(len(self.config["acts"]))
        }

    def _train_step(self, params, opt_state, x):
        (_, fit), grads, curvature = self.value_and_grad(params, x)
        updates, opt_state = self.tx.update(grads, opt_state, params, curvature=curvature)
        return optax.apply_updates(params, updates), opt_state, fit

    def follow(self, params):
        """Yield (loss without the penalty, params, state after the step) of every recorded step."""
        warm_up = [self.x[i] for i in self.record["warm_idx"]]
        opt_state = kfqn.warm_start(self.tx.init(params), self.value_and_grad, params, warm_up)
        for index in self.record["train_idx"]:
            params, opt_state, fit = self.train_step(params, opt_state, self.x[index])
            yield float(fit), params, opt_state

    def losses(self, perturbation=lambda w: w):
        return np.array([loss for loss, _, _ in self.follow(self.initial(perturbation))])


run_of = functools.cache(Run)


def dense_factor(factor, dim):
    """The matrix that an inverse factor represents."""
    if isinstance(factor, jax.Array):
        return factor
    return kfqn.lbfgs(factor.s.shape[0]).apply(factor, jnp.eye(dim, dtype=factor.s.dtype))


@pytest.mark.parametrize("name", NAMES)
def test_the_recorded_trajectory_is_followed(name):
    with jax.enable_x64(True):
        run = run_of(name, jnp.float64)
        record = run.record
        for k, (loss, params, opt_state) in enumerate(run.follow(run.initial())):
            np.testing.assert_allclose(loss, record["losses"][k], rtol=1e-10)
            if f"step{k}/A/0" not in record:
                continue
            for i in range(len(run.config["acts"])):
                layer = f"Dense_{i}"
                inputs, outputs = opt_state[0].inputs[layer], opt_state[0].outputs[layer]
                ours = {
                    "A": inputs.second_moment,
                    "H_a": inputs.factor,
                    "H_g": dense_factor(outputs.factor, outputs.s.shape[0]),
                    "s_ema": -outputs.s,  # recorded as old minus new
                    "y_ema": -outputs.y,
                    "W": params[layer]["kernel"].T,
                    "b": params[layer]["bias"],
                }
                for key, value in ours.items():
                    recorded = record[f"step{k}/{key}/{i}"]
                    scale = np.abs(recorded).max()
                    np.testing.assert_allclose(
                        value, recorded, rtol=0, atol=1e-9 * scale, err_msg=f"{key} {layer} {k}"
                    )


@pytest.mark.parametrize("name", ["kbfgs_logistic", "kbfgs_mse"])
def test_float32_stays_as_near_as_its_rounding_allows(name):
    """Every step rounds the parameters anew. In float64, all those perturbations at once, as large as they
    can be and at the start where they have the longest time to grow, tell how far the loss may be off; to
    which the rounding in evaluating the loss is added, one product of at most ``longest`` terms a layer."""
    eps = np.finfo(np.float32).eps
    with jax.enable_x64(True):
        run = run_of(name, jnp.float64)
        exact, steps = run.record["losses"], len(run.record["losses"])
        longest, layers = max(run.config["sizes"]) + 1, len(run.config["acts"])
        reached = np.zeros(steps)
        for seed in range(2):
            rng = np.random.default_rng(seed)
            moved = run.losses(lambda w, rng=rng: w * (1 + steps * eps * rng.choice([-1, 1], w.shape)))
            reached = np.maximum(reached, np.abs(moved / exact - 1))
    with jax.enable_x64(False):
        error = np.abs(run_of(name, jnp.float32).losses() / exact - 1)
    tolerance = layers * longest * eps + np.maximum.accumulate(reached)
    assert tolerance.max() < 1e-3, "a run so unstable says nothing about float32"
    assert (error <= tolerance).all(), f"{(error / tolerance).max():.2f} times the tolerance"
