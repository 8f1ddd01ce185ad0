"""``value_and_grad``: the gradient of a loss together with the curvature statistics of its layers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

import jax
from jax.typing import ArrayLike

from kfqn_optax._capture.batch import Batch
from kfqn_optax._capture.call import TreeCall, slots_of
from kfqn_optax._capture.counted import Counted
from kfqn_optax._capture.curvature import Curvature
from kfqn_optax._capture.examples import check_argnums
from kfqn_optax._capture.found import with_parts
from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.loss import Loss
from kfqn_optax._capture.routes import Record
from kfqn_optax._capture.statistics import Statistics, normalise
from kfqn_optax._capture.tap import varying
from kfqn_optax._capture.weights import check, doubts
from kfqn_optax._constants import check_constants
from kfqn_optax._shown import shown

Args = ParamSpec("Args")
Aux = TypeVar("Aux")
Value = TypeVar("Value")


@overload
def value_and_grad(
    loss_fn: Callable[Concatenate[Any, Args], ArrayLike],
    layers: Layers,
    *,
    has_aux: Literal[False] = False,
    forward: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    groups: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> "ValueAndGrad[Args, jax.Array]": ...
@overload
def value_and_grad(
    loss_fn: Callable[Concatenate[Any, Args], tuple[ArrayLike, Aux]],
    layers: Layers,
    *,
    has_aux: Literal[True],
    forward: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    groups: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> "ValueAndGrad[Args, tuple[jax.Array, Aux]]": ...
@overload
def value_and_grad(
    loss_fn: Callable[Concatenate[Any, Args], Any],
    layers: Layers,
    *,
    has_aux: bool,
    forward: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    groups: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> "ValueAndGrad[Args, Any]": ...
def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    forward: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
    groups: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
) -> "ValueAndGrad[..., Any]":
    """Like ``jax.value_and_grad``, and the curvature statistics of the same pass.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a scalar, or a pair ``(scalar, aux)`` with
        ``has_aux``. Any loss of the parameters, which reach it as they are; nothing to register. For an
        NNX model either
        ``loss_fn(model, *args, **kwargs)``, or a loss of the State of its parameters that makes the
        model with :func:`merge`.
      layers: what :func:`find_layers` returned.
      has_aux: whether ``loss_fn`` returns auxiliary data too, for example new batch statistics.
      forward: ``forward(params, *args, **kwargs)``, only for a loss that differentiates the model in
        forward mode (``jax.jvp``, ``jax.hessian``, ``jax.jacfwd``): the model applied to its inputs, any
        output. The inputs' statistics are then taken there, in one more forward pass. Also for a loss in
        which a layer's output has no part itself, only its derivatives.
      batch_argnums: positions of the arguments in whose leaves the leading axis counts the examples of
        the batch, as in the ``argnums`` of ``jax.grad``: 0 are the parameters, so from 1 on. The loss must
        then be a mean over those examples, of any number of them: factor statistics and forms are each
        taken on some of them, so that they cost less. These are drawn across the batch, anew in each step,
        so the order of the examples does not matter. Without it they are of all examples.
      groups: into how many equal parts of the examples the batch is split for optimizers that take a
        curvature pair of each (``kbfgs(..., groups=...)``). The examples are those of the first axis of
        a layer's rows, which it must divide. Not with ``forward``.
      axis_name: the axis, or axes, of ``jax.pmap``, ``jax.vmap`` or ``jax.shard_map(check_vma=False)``
        along which the batch is split into equal parts. Value, gradient and statistics are then means over
        it, and so is all that is asked of ``curvature``: average nothing over it inside the loss. Averaging
        the gradient once more changes nothing. Auxiliary data stay each device's own. In a
        ``jax.shard_map`` with its checks, leave it out and let the loss return
        ``jax.lax.pmean(loss, axis)``, as for any gradient there.

    Returns:
      A function of ``(params, *args, **kwargs)`` that returns ``(value, grads, curvature)``, with
      ``(value, aux)`` in the place of ``value`` if ``has_aux``; ``curvature`` is a
      :class:`Curvature`. For an NNX model it is a function of ``(model, *args, **kwargs)`` that works
      like ``nnx.value_and_grad``: ``grads`` is the State of the ``nnx.Param``, and what else the loss
      changes in the model (batch statistics, counts of random streams) is changed once, by the first
      pass.

    Raises:
      TypeError: if ``layers`` is something else; when called, if ``loss_fn`` does not return one real
        number, with ``aux`` if ``has_aux``.
      ValueError: when called with parameters that are not those ``layers`` were found on, or with a
        batch that ``groups`` does not divide; when called, if the loss depends on no call of a layer; for
        ``batch_argnums`` that are no positions after the parameters, or, when called, arguments there whose
        leading axes are not all of one length, or a loss that needs this number of examples; when the
        optimizer takes some of the examples, for a loss that is seen to be a sum over them.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, kfqn_optax as kfqn
      >>> model, x = nn.Dense(2), jnp.ones((8, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> layers = kfqn.find_layers(model, variables, x)
      >>> loss_fn = lambda params, x: jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> value_and_grad = kfqn.value_and_grad(loss_fn, layers)
      >>> loss, grads, curvature = value_and_grad(variables["params"], x)
      >>> curvature.statistics["."].inputs
      Array([1., 1., 1., 1.], dtype=float32)

      With an NNX model and ``nnx.Optimizer``:

      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layers = kfqn.find_layers(model, x)
      >>> value_and_grad = kfqn.value_and_grad(lambda model, x: jnp.mean(model(x) ** 2), layers)
      >>> optimizer = nnx.Optimizer(model, kfqn.kbfgs(0.3, layers), wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     loss, grads, curvature = value_and_grad(model, x)
      ...     optimizer.update(model, grads, curvature=curvature)
      ...     return loss
      >>> losses = [train_step(model, optimizer, x) for _ in range(5)]
      >>> bool(losses[-1] < losses[0])
      True
    """
    if not isinstance(layers, Layers):
        raise TypeError(
            f"kfqn.value_and_grad: layers is a {type(layers).__name__}, not what kfqn.find_layers"
            " returns. Call value_and_grad(loss_fn, kfqn.find_layers(model, variables, inputs))."
        )
    for name, function in (("loss_fn", loss_fn), ("forward", forward)):
        if not callable(function) and not (name == "forward" and function is None):
            raise TypeError(
                f"kfqn.value_and_grad: {name}={shown(function)} is no function of (params, *args)."
            )
    check_constants(call="kfqn.value_and_grad", groups=groups)
    if groups > 1 and forward is not None:
        raise ValueError(
            "kfqn.value_and_grad: groups= and forward= do not go together: a virtual bias has no rows to"
            " be split. Leave groups at 1."
        )
    layers = with_parts(layers, int(groups))
    return ValueAndGrad(loss_fn, layers, has_aux, forward, check_argnums(batch_argnums), axis_name)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a static argument of a jitted function
class ValueAndGrad(Loss, Generic[Args, Value]):
    """What :func:`value_and_grad` returns."""

    def __call__(
        self, params: Any, *args: Args.args, **kwargs: Args.kwargs
    ) -> tuple[Value, Any, Curvature]:
        call = self.call(params, args, kwargs)
        loss, record = self.noted(self.scalar), Record()
        slots = slots_of(self.layers, {})
        with self.tapping(), doubts() as doubtful:
            value, grads, sums = call.value_and_grad(loss, slots, self.has_aux, record)
            if doubtful():
                check(jax.make_jaxpr(lambda: call.slot_grads(loss, call.params, slots, self.has_aux))())
        if record.unseen:
            raise ValueError(_unseen(record.unseen))
        if not record.depends:
            raise ValueError(
                f"kfqn.value_and_grad: the loss depends on no call of the layers {list(slots)[:8]} of"
                f" {self.layers.model}. Let loss_fn apply the model to the parameters that it is given, or"
                " call the model that it is given or that kfqn.merge(graphdef, params, rest) makes, and use"
                " what comes out. A function with a jax.custom_vjp must return the gradients of the slots"
                " too, see kfqn.with_slots."
            )
        sums = self.with_inputs(sums, call, call.params, {})
        loss_value, aux = value if self.has_aux else (value, None)
        if self.axis_name is not None and varying(loss_value):
            raise ValueError(
                f"kfqn.value_and_grad: axis_name={self.axis_name!r} inside a jax.shard_map that checks what"
                " varies: there JAX itself sums the gradients over the devices. Give it check_vma=False, or"
                " leave out axis_name and let loss_fn return jax.lax.pmean(loss, axis)."
            )
        loss_value, grads, sums = self.mean((loss_value, grads, sums))
        statistics = normalise(self.layers, call.params, sums, {})
        batch = Batch(self, call, Counted(self, call))
        batch.counted.check_number()
        curvature = Curvature(loss_value, call.params, statistics, batch, grads)
        value: Any = (loss_value, aux) if self.has_aux else loss_value
        return value, grads, curvature

    def statistics(
        self,
        params: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        vectors: Mapping[str, jax.Array],
    ) -> dict[str, Statistics]:
        """For each layer name its statistics. Under ``jax.jit``, what is not used is not computed."""
        call = self.call(params, args, kwargs)
        if isinstance(call, TreeCall):  # what a first pass finds out
            slots, loss = slots_of(self.layers, {}), self.noted(self.scalar)
            with self.tapping():
                jax.eval_shape(lambda: call.value_and_grad(loss, slots, self.has_aux, Record())[2])
        return Batch(self, call, Counted(self, call)).statistics(call.params, vectors)[1]


def _unseen(names: list[str]) -> str:
    return (
        f"kfqn.value_and_grad: the statistics of the layers {names} cannot be taken: loss_fn calls them in"
        " a function with a jax.custom_vjp, whose derivatives are those of its arguments alone. Let it take"
        " the parameters as an argument, from params = kfqn.with_slots(params), and return what jax.vjp"
        " gives for them; or write it with jax.custom_jvp."
    )
