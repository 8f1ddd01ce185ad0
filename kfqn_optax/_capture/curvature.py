"""The gradient of a loss together with the curvature statistics of its layers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from kfqn_optax._capture.forms import with_parts
from kfqn_optax._capture.layers import Layers, check_parameters, is_masked, put
from kfqn_optax._capture.linen import tapping
from kfqn_optax._capture.nnx import ModelCall, as_arrays, is_model, is_state
from kfqn_optax._capture.nnx import tapping as nnx_tapping
from kfqn_optax._capture.statistics import Statistics, normalise
from kfqn_optax._capture.tap import SLOT
from kfqn_optax._constants import check_constants


class Curvature:
    """The statistics of one batch at one point, and the means to take them again at another point.

    What ``update`` of a kfqn_optax transformation takes as ``curvature=``. It belongs to the traced
    train step that made it, like Optax's ``value_fn``: make it and use it inside the same ``jax.jit``.

    Attributes:
      value: the loss.
      params: the parameters at which the statistics were taken.
      statistics: for each layer name its :class:`Statistics`.
    """

    def __init__(
        self,
        value: jax.Array,
        params: chex.ArrayTree,
        statistics: dict[str, Statistics],
        statistics_at: Callable[..., tuple[jax.Array, dict[str, Statistics]]],
    ):
        self.value = value
        self.params = params
        self.statistics = statistics
        self._statistics_at = statistics_at

    def after(self, updates: chex.ArrayTree, vectors: Mapping[str, jax.Array] | None = None) -> "Curvature":
        """The curvature of the same batch, with the same keys, at ``params + updates``.

        This is the second pass: a forward and a backward pass without weight gradients.

        Args:
          updates: shaped like the parameters; where it holds an ``optax.MaskedNode``, the parameters
            stay as they are.
          vectors: for layer names, a vector v (*copies, d_in [+ 1]) whose ``product`` A v is wanted.
        """
        moved = self._moved(updates)
        value, statistics = self._statistics_at(moved, vectors or {})
        return Curvature(value, moved, statistics, self._statistics_at)

    def slope(self, updates: chex.ArrayTree, grads: chex.ArrayTree) -> jax.Array:
        """<grads, -updates>, what the loss falls by along the updates to first order.

        With the parameters as they are, rounded to their dtype; without those masked in ``grads``.
        """
        products = jax.tree.map(
            lambda g, p, q: (
                jnp.zeros([]) if is_masked(g) else jnp.vdot(g, jnp.asarray(p - q, g.dtype)).real
            ),
            as_arrays(grads),
            as_arrays(self.params),
            as_arrays(self._moved(updates)),
            is_leaf=is_masked,
        )
        return sum(jax.tree.leaves(products), start=jnp.zeros([]))

    def _moved(self, updates: chex.ArrayTree) -> chex.ArrayTree:
        moved = jax.tree.map(
            lambda u, p: p if is_masked(u) else jnp.asarray(p + u, jnp.result_type(p)),
            as_arrays(updates),
            as_arrays(self.params),
            is_leaf=is_masked,
        )
        moved = jax.tree.unflatten(jax.tree.structure(self.params), jax.tree.leaves(moved))
        return moved


def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    forward: Callable[..., Any] | None = None,
    sampled_loss: Callable[..., Any] | None = None,
    groups: int = 1,
) -> "ValueAndGrad":
    """Like ``jax.value_and_grad``, and the curvature statistics of the same pass.

    Args:
      loss_fn: ``loss_fn(params, *args, **kwargs)``, a scalar, or a pair ``(scalar, aux)`` with
        ``has_aux``. Any loss; nothing to register. ``params`` reach it with an extra entry of zeros
        beside each layer's kernel (see :func:`without_slots`). For an NNX model either
        ``loss_fn(model, *args, **kwargs)``, or a loss of the State of its parameters that makes the
        model with :func:`merge`.
      layers: what :func:`find_layers` returned.
      has_aux: whether ``loss_fn`` returns auxiliary data too, for example new batch statistics.
      forward: ``forward(params, *args, **kwargs)``, only for a loss that differentiates the model in
        forward mode (``jax.jvp``, ``jax.hessian``, ``jax.jacfwd``): the model applied to its inputs, any
        output. The inputs' statistics are then taken there, in one more forward pass. Also for a loss in
        which a layer's output has no part itself, only its derivatives.
      sampled_loss: ``sampled_loss(params, *args, **kwargs)``, only for :func:`kfac` with the true Fisher
        matrix: the loss with labels drawn from the model's own predictions, a scalar without aux, in
        which the model is not differentiated in forward mode. Without it ``kfac`` uses the gradients of
        ``loss_fn``, the empirical Fisher matrix; with ``forward`` it cannot do without.
      groups: into how many equal parts of the examples the batch is split for optimizers that take a
        curvature pair of each (``kbfgs(..., groups=...)``). The examples are those of the first axis of
        a layer's rows, which it must divide. Not with ``forward``.

    Returns:
      A function of ``(params, *args, **kwargs)`` that returns ``(value, grads, curvature)``, with
      ``(value, aux)`` in the place of ``value`` if ``has_aux``; ``curvature`` is a
      :class:`Curvature`. For an NNX model it is a function of ``(model, *args, **kwargs)`` that works
      like ``nnx.value_and_grad``: ``grads`` is the State of the ``nnx.Param``, and what else the loss
      changes in the model (batch statistics, counts of random streams) is changed once, by the first
      pass.

    Raises:
      TypeError: if ``layers`` is something else.
      ValueError: when called with parameters that are not those ``layers`` were found on, or with a
        batch that ``groups`` does not divide.

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
    check_constants(call="kfqn.value_and_grad", groups=groups)
    if groups > 1 and forward is not None:
        raise ValueError(
            "kfqn.value_and_grad: groups= and forward= do not go together: a virtual bias has no rows to"
            " be split. Leave groups at 1."
        )
    layers = with_parts(layers, int(groups))
    return ValueAndGrad(loss_fn, layers, has_aux, forward, sampled_loss)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a static argument of a jitted function
class ValueAndGrad:
    """What :func:`value_and_grad` returns."""

    loss_fn: Callable[..., Any]
    layers: Layers
    has_aux: bool = False
    forward: Callable[..., Any] | None = None
    sampled_loss: Callable[..., Any] | None = None

    def __call__(self, params: Any, *args: Any, **kwargs: Any):
        call = self._call(params, args, kwargs)

        def statistics_at(params, vectors):
            return self._statistics(call, params, vectors)

        loss = self._tapped(self.loss_fn)
        value, grads, sums = call.value_and_grad(loss, _slots(self.layers, {}), self.has_aux)
        sums = self._with_inputs(sums, call, call.params, {})
        statistics = normalise(self.layers, call.params, sums, {})
        if self.sampled_loss is not None:
            drawn_loss = self._tapped(self.sampled_loss, bias_only=False)
            _, drawn = call.slot_grads(drawn_loss, call.params, _slots(self.layers, {}), False)
            for name, sample in normalise(self.layers, call.params, drawn, {}).items():
                statistics[name] = statistics[name]._replace(grad_moment=sample.grad_moment)
        loss_value = value[0] if self.has_aux else value
        return value, grads, Curvature(loss_value, call.params, statistics, statistics_at)

    def statistics(
        self,
        params: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        vectors: Mapping[str, jax.Array],
    ) -> dict[str, Statistics]:
        """For each layer name its statistics. Under ``jax.jit``, what is not used is not computed."""
        call = self._call(params, args, kwargs)
        return self._statistics(call, call.params, vectors)[1]

    def _call(self, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Call":
        make = ModelCall if is_model(params) else _TreeCall
        call = make(self.layers, params, args, kwargs)
        check_parameters(self.layers, call.params, "kfqn.value_and_grad")
        return call

    def _statistics(
        self, call: "_Call", params: chex.ArrayTree, vectors: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Statistics]]:
        loss = self._tapped(self.loss_fn)
        value, sums = call.slot_grads(loss, params, _slots(self.layers, vectors), self.has_aux)
        sums = self._with_inputs(sums, call, params, vectors)
        return value, normalise(self.layers, params, sums, vectors)

    def _with_inputs(self, sums, call, params, vectors):
        """The sums, those of inputs replaced by what the plain forward pass gives, if there is one."""
        if self.forward is None:
            return sums
        forward = self.forward

        def total(params, *args, **kwargs):
            return sum(leaf.sum() for leaf in jax.tree.leaves(forward(params, *args, **kwargs)))

        tapped = self._tapped(total, bias_only=False)
        _, plain = call.slot_grads(tapped, params, _slots(self.layers, vectors), False)
        for name, sum_of in plain.items():
            sum_of.pop("grad_moment", None)  # of the forward pass's own outputs, not of the loss
            sum_of["grads"] = sums[name]["grads"]
        return plain

    def _tapped(self, loss_fn: Callable[..., Any], bias_only: bool | None = None) -> Callable[..., Any]:
        bias_only = self.forward is not None if bias_only is None else bias_only

        def loss(*args, **kwargs):
            try:
                with tapping(bias_only), nnx_tapping(bias_only):
                    return loss_fn(*args, **kwargs)
            except (TypeError, ValueError, KeyError, NotImplementedError) as error:
                forward_mode = "forward-mode" in str(error) and "custom_vjp" in str(error)
                if SLOT in str(error):
                    error.add_note(_SLOT_NOTE)
                elif forward_mode or "custom_lin" in str(error):
                    error.add_note(_FORWARD_NOTE)
                elif "leaves" in str(error) and any(map(is_state, jax.tree.leaves(args, is_leaf=is_state))):
                    error.add_note(_MERGE_NOTE)
                raise

        return loss


class _Call(Protocol):
    """One call of losses, which can be repeated at other parameters; slots and sums by layer name."""

    @property
    def params(self) -> Any: ...

    def value_and_grad(
        self, loss_fn: Callable[..., Any], slots: Mapping[str, Any], has_aux: bool
    ) -> tuple[Any, Any, Any]: ...

    def slot_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any], has_aux: bool
    ) -> tuple[jax.Array, Any]: ...


@dataclasses.dataclass(frozen=True)
class _TreeCall:
    """A call of losses that are functions of a tree of parameters."""

    layers: Layers
    params: chex.ArrayTree
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def value_and_grad(self, loss_fn, slots, has_aux):
        function = jax.value_and_grad(self._with_slots(loss_fn), argnums=(0, 1), has_aux=has_aux)
        value, (grads, sums) = function(self.params, slots)
        return value, grads, sums

    def slot_grads(self, loss_fn, params, slots, has_aux):
        function = jax.value_and_grad(self._with_slots(loss_fn), argnums=1, has_aux=has_aux)
        value, sums = function(params, slots)
        return (value[0] if has_aux else value), sums

    def _with_slots(self, loss_fn):
        def loss(params, slots):
            for layer in self.layers:
                params = put(params, layer.path, SLOT, slots[layer.name])
            return loss_fn(params, *self.args, **self.kwargs)

        return loss


_MERGE_NOTE = (
    "kfqn.value_and_grad hands loss_fn the parameters with a slot beside each layer's kernel, which"
    " nnx.merge does not know. Inside loss_fn write kfqn.merge(graphdef, params, rest) in its place."
)
_FORWARD_NOTE = (
    "kfqn.value_and_grad: loss_fn differentiates the model in forward mode (jax.jvp, jax.hessian,"
    " jax.jacfwd). Tell it how to apply the model plainly, on the inputs whose statistics matter:"
    " kfqn.value_and_grad(loss_fn, layers, forward=lambda params, *args: model.apply(...))."
)
_SLOT_NOTE = (
    f"kfqn.value_and_grad hands loss_fn the parameters with an entry {SLOT!r} of zeros beside each"
    " layer's kernel, so their tree is not that of the parameters you keep. Inside loss_fn, combine"
    " parameters with another tree only after params = kfqn.without_slots(params)."
)


def without_slots(params: Any) -> Any:
    """``params`` as given to ``value_and_grad``, for use inside ``loss_fn``.

    There the parameters hold the slots of the statistics too. Most losses need not care: the slots are
    zeros, and add nothing to a sum of squares. A loss does that combines the whole tree with another one
    (the distance to older parameters, say), counts its elements, takes a norm of each leaf, or a penalty
    whose derivative is not zero at 0: that derivative would be added to the statistics.

    Example:
      >>> import kfqn_optax as kfqn
      >>> kfqn.without_slots({"dense": {"kernel": 1.0, "kfqn_slot": {"rows": 0.0}}})
      {'dense': {'kernel': 1.0}}
    """
    if not hasattr(params, "items"):
        return params
    plain = {key: without_slots(value) for key, value in params.items() if key != SLOT}
    return type(params)(plain) if is_state(params) else plain


def _slots(layers: Layers, vectors: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    slots = {}
    for layer in layers:
        slot = {key: jnp.zeros(shape, layer.dtype) for key, shape in layer.slot_shapes.items()}
        if layer.name in vectors:
            slot["vector"] = layer.slot_vector(vectors[layer.name].astype(layer.dtype))
        slots[layer.name] = slot
    return slots
