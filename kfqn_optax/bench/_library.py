"""What the bench asks of the library in one place, whether or not it has marked outputs yet.

Everything here that looks at what the library has is to go once it has ``outputs`` and ``batch_argnums``.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kfqn_optax as kfqn

_HAS_OUTPUTS = hasattr(kfqn, "outputs")
_HAS_BATCH_ARGNUMS = "batch_argnums" in inspect.signature(kfqn.value_and_grad).parameters


def mark(z: jax.Array, distribution: str | None) -> jax.Array:
    """``z``, marked as what the loss is a function of: logits, or the mean of a normal distribution."""
    return getattr(kfqn, "outputs")(z, distribution) if _HAS_OUTPUTS else z  # noqa: B009


def value_and_grad(
    loss_fn: Callable[..., Any], layers: kfqn.Layers, forward: Callable[..., Any] | None
) -> Callable[..., Any]:
    """``kfqn.value_and_grad`` of ``loss_fn(params, batch, state) -> (loss, state)``."""
    options: dict[str, Any] = {"has_aux": True, "forward": forward}
    if _HAS_BATCH_ARGNUMS:
        options["batch_argnums"] = 1
    if not _HAS_OUTPUTS and forward is not None:
        options["sampled_loss"] = _distance_to_samples(forward)
    return kfqn.value_and_grad(loss_fn, layers, **options)


def _distance_to_samples(forward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """Half the squared distance of the model's outputs to normal samples around them."""

    def loss(*args: Any) -> jax.Array:
        outputs = forward(*args)
        noise = jax.random.normal(jax.random.key(0), outputs.shape)
        return jnp.mean((outputs - jax.lax.stop_gradient(outputs) - noise) ** 2) / 2

    return loss
