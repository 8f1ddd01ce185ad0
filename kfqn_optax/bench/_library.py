"""``kfqn.value_and_grad`` as all tasks of the bench use it."""

from collections.abc import Callable
from typing import Any

import kfqn_optax as kfqn


def value_and_grad(
    loss_fn: Callable[..., Any], layers: kfqn.Layers, forward: Callable[..., Any] | None, groups: int = 1
) -> Callable[..., Any]:
    """``kfqn.value_and_grad`` of ``loss_fn(params, batch, state) -> (loss, state)``."""
    return kfqn.value_and_grad(
        loss_fn, layers, has_aux=True, forward=forward, groups=groups, batch_argnums=1
    )
