"""Flax's ``TrainState``, with a way through for ``curvature``."""

from collections.abc import Callable
from typing import Any, Self

import flax.training.train_state
import optax

from kfqn_optax._capture.curvature import Curvature


class TrainState(flax.training.train_state.TrainState):
    """``flax.training.train_state.TrainState`` whose ``apply_gradients`` takes ``curvature``.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Dense(2), jnp.ones((8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> layers = kfqn.find_layers(model, variables, x)
      >>> loss_fn = lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> state = kfqn.TrainState.create(
      ...     apply_fn=model.apply, params=variables["params"], tx=kfqn.kbfgs(0.3, layers)
      ... )
      >>> loss, grads, curvature = kfqn.value_and_grad(loss_fn, layers)(state.params)
      >>> state = state.apply_gradients(grads=grads, curvature=curvature)
      >>> int(state.step)
      1
    """

    @classmethod
    def create(
        cls, *, apply_fn: Callable[..., Any], params: Any, tx: optax.GradientTransformation, **kwargs: Any
    ) -> Self:
        """The state at the start, as in Flax."""
        return super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)

    def apply_gradients(self, *, grads: Any, curvature: Curvature | None = None, **kwargs: Any) -> Self:
        """One update; ``kwargs`` replace other fields of the state, as in Flax."""
        update = optax.with_extra_args_support(self.tx).update
        updates, opt_state = update(grads, self.opt_state, self.params, curvature=curvature)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
