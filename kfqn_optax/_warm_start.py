"""The paper's start: A from one pass over the data."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfqn_optax._capture.nnx import as_arrays, assign, is_model, jit_with_models
from kfqn_optax._capture.value_and_grad import ValueAndGrad
from kfqn_optax._shown import shown
from kfqn_optax._sides.hessian_action import GIVEN, HessianActionState
from kfqn_optax._state import ScaleByKfqnState, map_states

State = TypeVar("State")


def warm_start(
    opt_state: State,
    value_and_grad: ValueAndGrad[..., Any],
    params: Any,
    batches: Iterable[Any],
) -> State:
    """Start A as its mean over batches, forward passes only; without it the first batch starts A.

    Args:
      opt_state: what ``tx.init(params)`` returned; the kfqn_optax state may be anywhere in it. For an
        ``nnx.Optimizer`` give ``optimizer.opt_state``, whose variables are then set in place.
      value_and_grad: what :func:`value_and_grad` returned.
      params: the initial parameters, or the NNX model that ``value_and_grad`` takes; it stays as it is.
      batches: what the loss takes after the parameters: for each batch one argument, or a tuple of
        them. Batches count equally, whatever their sizes.

    Returns:
      ``opt_state`` with A set, in the layers whose input side starts with one (that of K-BFGS). The first
      update then computes H_a from it and, as in the paper, leaves its own batch out of A.

    Raises:
      TypeError: if ``batches`` is no iterable of batches.
      ValueError: if there is no batch, no kfqn_optax state in ``opt_state``, or none that starts with A.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, batches = nn.Dense(2), [jnp.ones((8, 3)), jnp.zeros((8, 3))]
      >>> variables = model.init(jax.random.key(0), batches[0])
      >>> params, layers = variables["params"], kfqn.find_layers(model, variables, batches[0])
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> value_and_grad = kfqn.value_and_grad(loss_fn, layers)
      >>> opt_state = kfqn.kbfgs(0.3, layers).init(params)
      >>> opt_state = kfqn.warm_start(opt_state, value_and_grad, params, batches)
      >>> opt_state[0].inputs["."].second_moment[0]
      Array([0.5, 0.5, 0.5, 0.5], dtype=float32)

    Source: Goldfarb, Ren, Bahamou 2020, Algorithm 3, initialisation.
    """

    if not isinstance(value_and_grad, ValueAndGrad):
        raise TypeError(
            f"kfqn.warm_start: expected what kfqn.value_and_grad(loss_fn, layers) returns, got"
            f" {value_and_grad!r}."
        )

    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str, jax.Array, np.ndarray)):
        raise TypeError(
            f"kfqn.warm_start: batches is {shown(batches)}. Give an iterable of batches, [batch] for one."
        )
    if not _warmed(opt_state):
        raise ValueError(
            "kfqn.warm_start: no layer of this optimizer starts with A (those of kbfgs do, up to max_dim,"
            " and no convolutions). Leave warm_start out."
        )
    moments_of = _moments_of_model if is_model(params) else _moments_of_arrays
    total, count = None, 0
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        try:
            moments = moments_of(value_and_grad, params, args)
        except Exception as error:
            error.add_note(
                f"kfqn.warm_start was calling loss_fn(params, *batch) with the batch {shown(args)}: in"
                " batches there must be, for each batch, the one argument that loss_fn takes after the"
                " parameters, or a tuple of them."
            )
            raise
        total = moments if total is None else optax.tree.add(total, moments)
        count += 1
    if total is None:
        raise ValueError("kfqn.warm_start: batches is empty; give it at least one batch.")

    unseen = [name for name in _warmed(opt_state) if total.get(name) is None]
    if unseen:
        raise ValueError(
            f"kfqn.warm_start: value_and_grad takes no second moment of {unseen}, whose A is to start."
            " Give kfqn.value_and_grad the same layers as the optimizer."
        )

    def warm(state: ScaleByKfqnState) -> ScaleByKfqnState:
        inputs = {
            name: _warm(side, total[name] / count) if hasattr(side, "phase") else side
            for name, side in state.inputs.items()
        }
        return state._replace(inputs=inputs)

    return assign(opt_state, map_states(warm, as_arrays(opt_state), "kfqn.warm_start"))


def _moments(value_and_grad: ValueAndGrad[..., Any], params: Any, batch: tuple[Any, ...]) -> dict[str, Any]:
    statistics = value_and_grad.statistics(params, batch, {}, {})
    return {name: value.second_moment for name, value in statistics.items()}


# Made once, so that a second warm start with the same ``value_and_grad`` does not compile again.
_moments_of_arrays = jax.jit(_moments, static_argnums=0)
_moments_of_model = jit_with_models(_moments, static_argnums=0)


def _warmed(opt_state: Any) -> list[str]:
    names: list[str] = []

    def collect(state: ScaleByKfqnState) -> ScaleByKfqnState:
        names.extend(name for name, side in state.inputs.items() if hasattr(side, "phase"))
        return state

    map_states(collect, opt_state, "kfqn.warm_start")
    return names


def _warm(side: HessianActionState, moment: jax.Array) -> HessianActionState:
    old = side.second_moment
    rows = old.shape[-1]  # one less than in ``moment`` where the bias is masked
    moment = moment[..., :rows, :rows].astype(old.dtype)
    good = jnp.isfinite(moment).all((-2, -1))
    added = old.shape[-2] - rows  # where the factors are divided over devices
    moment = jnp.pad(moment, [(0, 0)] * (old.ndim - 2) + [(0, added), (0, 0)])
    new = jnp.where(good[..., None, None], moment, old)
    return side._replace(
        second_moment=jax.device_put(new, old.sharding),
        phase=jnp.where(good, GIVEN, side.phase),
    )
