"""The gradient of a loss together with the curvature statistics of its layers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from kfqn_optax._capture.examples import check_argnums, check_rows, count_examples, take
from kfqn_optax._capture.forms import with_parts
from kfqn_optax._capture.layers import Layers, check_parameters, is_masked, put
from kfqn_optax._capture.linen import tapping
from kfqn_optax._capture.nnx import ModelCall, as_arrays, copier, is_model, is_state
from kfqn_optax._capture.nnx import tapping as nnx_tapping
from kfqn_optax._capture.outputs import Mark, as_key, bits_of, finding, gauss_newton, sampling
from kfqn_optax._capture.quadratic import Forms, forms_of, has_loop
from kfqn_optax._capture.statistics import Statistics, normalise, of_copies
from kfqn_optax._capture.tap import SLOT
from kfqn_optax._constants import check_constants
from kfqn_optax._numerics import inner

PROBES = 8
LEAST = 0.01
STRIDE = 257  # examples from the part of one step to that of the next


class Curvature:
    """The statistics of one batch at one point, and the means to take them again at another point.

    What ``update`` of a kfqn_optax transformation takes as ``curvature=``. It belongs to the traced
    train step that made it, like Optax's ``value_fn``: make it and use it inside the same ``jax.jit``.

    Attributes:
      value: the loss.
      params: the parameters at which the statistics were taken.
      statistics: for each layer name its :class:`Statistics`.
      grads: the gradient as it was returned, whatever is done to it before ``update``; None after
        :meth:`after`.
      examples: how many examples the batch has, by ``batch_argnums``; None without.
    """

    def __init__(
        self,
        value: jax.Array,
        params: chex.ArrayTree,
        statistics: dict[str, Statistics],
        batch: "_Batch",
        grads: chex.ArrayTree | None = None,
    ):
        self.value = value
        self.params = params
        self.statistics = statistics
        self.grads = grads
        self.examples = batch.examples
        self._batch = batch

    def after(self, updates: chex.ArrayTree, vectors: Mapping[str, jax.Array] | None = None) -> "Curvature":
        """The curvature of the same batch, with the same keys, at ``params + updates``.

        This is the second pass: a forward and a backward pass without weight gradients.

        Args:
          updates: shaped like the parameters; where it holds an ``optax.MaskedNode``, the parameters
            stay as they are.
          vectors: for layer names, a vector v (*copies, d_in [+ 1]) whose ``product`` A v is wanted.
        """
        moved = self._moved(updates)
        value, statistics = self._batch.statistics(moved, vectors or {})
        return Curvature(value, moved, statistics, self._batch)

    def rotated(self, count: jax.Array) -> "Curvature":
        """The same curvature, with the first and last examples counted from another one for each ``count``.

        So parts of a batch that is the same in every step are not always the same part.
        """
        examples = self.examples
        if examples is None:
            return self
        offset = count % examples * STRIDE % examples
        batch = dataclasses.replace(self._batch, offset=offset)
        return Curvature(self.value, self.params, self.statistics, batch, self.grads)

    @property
    def outputs(self) -> int:
        """How many numbers of an example the loss marks as its :func:`outputs`; 0 without a mark.

        Only an array whose leading axis counts the examples of ``batch_argnums`` is one of all of them.
        """
        shapes = [mark.shape for mark in self._batch.marks]
        return sum(math.prod(shape[shape[:1] == (self.examples,) :]) for shape in shapes)

    @property
    def distributions(self) -> tuple[str | None, ...]:
        """What the marks of the loss name."""
        return tuple(mark.distribution for mark in self._batch.marks)

    @property
    def squared_norm(self) -> jax.Array:
        """The sum of squares of all parameters, in float32 or wider.

        At least a hundredth of that of layers whose kernels have variance 1 / d_in, d_out a layer, so
        that parameters which start at zero have a length too.
        """
        wide = [p.astype(_wide(p)) for p in jax.tree.leaves(as_arrays(self.params))]
        usual = sum(math.prod(layer.copies) * layer.out_dim for layer in self._batch.layers)
        return jnp.maximum(inner(wide, wide), LEAST * usual)

    def value_at(self, updates: chex.ArrayTree, rows: int | None = None) -> jax.Array:
        """The loss at ``params + updates``, of the same batch with the same keys: one forward pass.

        Args:
          updates: as for :meth:`after`.
          rows: of the last so many examples only, where ``batch_argnums`` tells them.
        """
        check_rows(rows, "curvature.value_at")
        return self._batch.loss(rows)(self._moved(updates))

    def forms(self, directions: Sequence[chex.ArrayTree], rows: int | None = None) -> Forms:
        """The loss along K directions to second order: phi(c) = L(params + sum_i c_i u_i) around c = 0.

        The second derivatives are those of the Gauss-Newton matrix where the loss marks its
        :func:`outputs`, and the loss's own where it does not; parts of the loss that do not go through a
        mark (a penalty on the parameters) always have their own. With a mark it costs a forward pass and
        2 K products a layer (4 K where layers are scanned over).

        Args:
          directions: K trees u_i shaped like the parameters, in whose dtype they are taken; an
            ``optax.MaskedNode`` counts as zero.
          rows: of the loss on the last so many examples only, where ``batch_argnums`` tells them: those
            of which no factor's statistics were taken.

        Returns:
          :class:`Forms`: ``value``, ``slopes`` (K,) and ``matrix`` (K, K), float32 or wider, all of the
          loss on those rows.

        Raises:
          ValueError: for no directions, or ones of another shape than the parameters.
          TypeError: where the loss has a ``jax.custom_vjp``, which has no forward mode.

        Source: Martens, Grosse 2015, section 7.
        """
        check_rows(rows, "curvature.forms")
        if not isinstance(directions, (list, tuple)) or not directions:
            raise ValueError(
                f"curvature.forms: directions is a {type(directions).__name__}, or empty. Give a list of"
                " trees shaped like the parameters, one tree at least."
            )
        stacked = self._batch.looped and bool(self._batch.marks)
        try:
            with gauss_newton():
                return forms_of(self._batch.loss(rows), self.params, directions, stacked)
        except (TypeError, NotImplementedError) as error:
            if _is_forward_mode(error):
                error.add_note(_FORMS_NOTE)
            raise

    def factor_statistics(
        self, rows: int | None = None, key: int | jax.Array | None = None
    ) -> dict[str, Statistics]:
        """The statistics of which a Fisher side makes its factors, for each layer name.

        Where a mark :func:`outputs` names a distribution: those of one pass with sampled labels, forward
        and backward without weight gradients. ``second_moment`` is the mean over rows as ever;
        ``grad_moment`` is the sum over rows of the outer products of the sampled gradients at the layer's
        output, nothing divided or multiplied: its expectation is the sum over rows of the Gauss-Newton
        matrix of L with respect to that row of the output. For a loss that is a mean over examples it is
        the mean over examples, summed over positions, of outer products of the gradients of one example's
        sampled loss, as ``grad_moment`` is elsewhere. With ``forward``, ``grad_moment`` is the mean over
        8 samples of the outer product of the summed gradients, which has the same expectation.

        Elsewhere: those of the pass that was made, without another one, where ``grad_moment`` is the
        centred one, G - S S^T / T with G and S the ``grad_moment`` and ``preactivation_grads`` and T
        the layer's positions.

        Args:
          rows: sample on the first so many examples only, where ``batch_argnums`` tells them.
          key: a seed or a key for the samples; None derives it from the loss, so that it differs from step
            to step. Draws differ in examples that are mapped or scanned over as far as the marked
            arrays differ there.
        """
        return self.factors(rows, key)[0]

    def factors(
        self, rows: int | None = None, key: int | jax.Array | None = None
    ) -> tuple[dict[str, Statistics], chex.ArrayTree | None]:
        """:meth:`factor_statistics`, and the gradient that parameters of no layer make their factor of.

        Returns:
          The statistics, and the gradient of the sampled loss, shaped like the parameters, whose square has
          the diagonal of the Gauss-Newton matrix for its expectation; None where nothing is sampled, and
          with ``forward``.
        """
        check_rows(rows, "curvature.factor_statistics")
        if any(self.distributions):
            key = bits_of(self.value) if key is None else key
            return self._batch.sampled(self.params, rows, as_key(key))
        positions = {layer.name: layer.positions for layer in self._batch.layers}
        return {name: _centred(value, positions[name]) for name, value in self.statistics.items()}, None

    def slope(self, updates: chex.ArrayTree, grads: chex.ArrayTree) -> jax.Array:
        """<grads, -updates>, what the loss falls by along the updates to first order.

        With the parameters as they are, rounded to their dtype; without those masked in ``grads``.
        """
        grads = as_arrays(grads)
        moved = jax.tree.map(
            lambda g, p, q: g if is_masked(g) else jnp.asarray(p - q, g.dtype),
            grads,
            as_arrays(self.params),
            as_arrays(self._moved(updates)),
            is_leaf=is_masked,
        )
        return inner(grads, moved)

    def _moved(self, updates: chex.ArrayTree) -> chex.ArrayTree:
        moved = jax.tree.map(
            lambda u, p: p if is_masked(u) else jnp.asarray(p + u, jnp.result_type(p)),
            as_arrays(updates),
            as_arrays(self.params),
            is_leaf=is_masked,
        )
        return jax.tree.unflatten(jax.tree.structure(self.params), jax.tree.leaves(moved))


def _wide(leaf: jax.Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _centred(statistics: Statistics, positions: int) -> Statistics:
    if statistics.grad_moment is None:
        return statistics
    total = statistics.preactivation_grads
    outer = total[..., :, None] * total[..., None, :]
    return statistics._replace(grad_moment=statistics.grad_moment - outer / positions)


def value_and_grad(
    loss_fn: Callable[..., Any],
    layers: Layers,
    *,
    has_aux: bool = False,
    forward: Callable[..., Any] | None = None,
    batch_argnums: int | Sequence[int] | None = None,
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
      batch_argnums: positions of the arguments in whose leaves the leading axis counts the examples of
        the batch, as in the ``argnums`` of ``jax.grad``: 0 are the parameters, so from 1 on. The loss must
        then be a mean over those examples, of any number of them: factor statistics are taken on the
        first and forms on the last of them, so that they cost less. Without it they are of all examples.
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
        batch that ``groups`` does not divide; for ``batch_argnums`` that are no positions after the
        parameters, or, when called, arguments there whose leading axes are not all of one length.

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
    return ValueAndGrad(loss_fn, layers, has_aux, forward, check_argnums(batch_argnums))


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as a static argument of a jitted function
class ValueAndGrad:
    """What :func:`value_and_grad` returns."""

    loss_fn: Callable[..., Any]
    layers: Layers
    has_aux: bool = False
    forward: Callable[..., Any] | None = None
    batch_argnums: tuple[int, ...] = ()

    def __call__(self, params: Any, *args: Any, **kwargs: Any):
        call = self._call(params, args, kwargs)
        loss = self._tapped(self.loss_fn)
        value, grads, sums = call.value_and_grad(loss, _slots(self.layers, {}), self.has_aux)
        sums = self._with_inputs(sums, call, call.params, {})
        statistics = normalise(self.layers, call.params, sums, {})
        loss_value = value[0] if self.has_aux else value
        return value, grads, Curvature(loss_value, call.params, statistics, _Batch(self, call), grads)

    def statistics(
        self,
        params: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        vectors: Mapping[str, jax.Array],
    ) -> dict[str, Statistics]:
        """For each layer name its statistics. Under ``jax.jit``, what is not used is not computed."""
        call = self._call(params, args, kwargs)
        return _Batch(self, call).statistics(call.params, vectors)[1]

    def _call(self, params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "_Call":
        make = ModelCall if is_model(params) else _TreeCall
        call = make(self.layers, params, args, kwargs)
        check_parameters(self.layers, call.params, "kfqn.value_and_grad")
        count_examples(self.batch_argnums, args)
        return call

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
                if SLOT in str(error):
                    error.add_note(_SLOT_NOTE)
                elif _is_forward_mode(error):
                    error.add_note(_FORWARD_NOTE)
                elif "leaves" in str(error) and any(map(is_state, jax.tree.leaves(args, is_leaf=is_state))):
                    error.add_note(_MERGE_NOTE)
                raise

        return loss


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """The batch of one call, at any parameters: what a :class:`Curvature` and those after it ask."""

    owner: ValueAndGrad
    call: "_Call"
    offset: jax.Array | None = None

    @property
    def layers(self) -> Layers:
        return self.owner.layers

    @property
    def examples(self) -> int | None:
        return count_examples(self.owner.batch_argnums, self.call.args)

    @property
    def marks(self) -> list[Mark]:
        """The marks of the loss."""
        return self._traced[0]

    @property
    def looped(self) -> bool:
        """Whether there is a loop in the loss."""
        return self._traced[1]

    @functools.cached_property
    def _traced(self) -> tuple[list[Mark], bool]:
        """The loss is traced for it, and not run."""
        loss = lambda: self.call.value(self.owner.loss_fn, self.call.params, self.owner.has_aux)
        with finding() as met:
            program = jax.make_jaxpr(loss)()
        return met, has_loop(program)

    def loss(self, rows: int | None) -> Callable[[chex.ArrayTree], jax.Array]:
        """The loss of the last examples as a function of the parameters."""
        call = self._part(rows, last=True)
        return lambda params: call.value(self.owner.loss_fn, params, self.owner.has_aux)

    def statistics(
        self, params: chex.ArrayTree, vectors: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Statistics]]:
        """The loss and the statistics of the whole batch."""
        owner = self.owner
        slots = _slots(self.layers, vectors)
        value, sums = self.call.slot_grads(owner._tapped(owner.loss_fn), params, slots, owner.has_aux)
        sums = owner._with_inputs(sums, self.call, params, vectors)
        return value, normalise(self.layers, params, sums, vectors)

    def sampled(
        self, params: chex.ArrayTree, rows: int | None, key: jax.Array
    ) -> tuple[dict[str, Statistics], chex.ArrayTree | None]:
        """The statistics of sampled gradients on the first examples, and these gradients."""
        call = self._part(rows, last=False)

        def sums_of(key):
            tapped = self.owner._tapped(self._psi(key))
            return call.all_grads(tapped, params, _slots(self.layers, {}))

        if self.owner.forward is None:
            grads, sums = sums_of(key)
            return normalise(self.layers, params, sums, {}, sampled=True), grads
        _, drawn = jax.vmap(sums_of)(jax.random.split(key, PROBES))
        sums = self.owner._with_inputs(jax.tree.map(lambda leaf: leaf.mean(0), drawn), call, params, {})
        statistics = normalise(self.layers, params, sums, {})
        for layer in self.layers:
            if "grad_moment" in layer.slot_shapes:
                totals = jax.vmap(lambda grads, layer=layer: of_copies(layer, grads, layer.out_dim))(
                    drawn[layer.name]["grads"]
                )
                moment = jnp.einsum("p...i,p...j->...ij", totals, totals, precision="highest") / PROBES
                statistics[layer.name] = statistics[layer.name]._replace(grad_moment=moment)
        return statistics, None

    def _psi(self, key: jax.Array) -> Callable[..., jax.Array]:
        """The derivative of the loss along random shifts of its marked arrays."""

        def psi(*args: Any, **kwargs: Any) -> jax.Array:
            copied = copier((args, kwargs))

            def shifted(t):
                args, kwargs = copied()
                with sampling(t, key):
                    value = self.owner.loss_fn(*args, **kwargs)
                return value[0] if self.owner.has_aux else value

            return jax.grad(shifted)(jnp.zeros([]))

        return psi

    def _part(self, rows: int | None, last: bool) -> "_Call":
        args = take(self.owner.batch_argnums, self.call.args, self.examples, rows, last, self.offset)
        return self.call if args is self.call.args else self.call.with_args(args)


def _is_forward_mode(error: Exception) -> bool:
    """Whether the error is that of forward mode through a rule of reverse mode."""
    text = str(error)
    return ("forward-mode" in text and "custom_vjp" in text) or "custom_lin" in text


class _Call(Protocol):
    """One call of losses, which can be repeated at other parameters; slots and sums by layer name."""

    @property
    def params(self) -> Any: ...

    @property
    def args(self) -> tuple[Any, ...]: ...

    def with_args(self, args: tuple[Any, ...]) -> "_Call": ...

    def value(self, loss_fn: Callable[..., Any], params: Any, has_aux: bool) -> jax.Array: ...

    def value_and_grad(
        self, loss_fn: Callable[..., Any], slots: Mapping[str, Any], has_aux: bool
    ) -> tuple[Any, Any, Any]: ...

    def slot_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any], has_aux: bool
    ) -> tuple[jax.Array, Any]: ...

    def all_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any]
    ) -> tuple[Any, Any]: ...


@dataclasses.dataclass(frozen=True)
class _TreeCall:
    """A call of losses that are functions of a tree of parameters."""

    layers: Layers
    params: chex.ArrayTree
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def with_args(self, args):
        return dataclasses.replace(self, args=args)

    def value(self, loss_fn, params, has_aux):
        value = loss_fn(params, *self.args, **self.kwargs)
        return value[0] if has_aux else value

    def value_and_grad(self, loss_fn, slots, has_aux):
        function = jax.value_and_grad(self._with_slots(loss_fn), argnums=(0, 1), has_aux=has_aux)
        value, (grads, sums) = function(self.params, slots)
        return value, grads, sums

    def slot_grads(self, loss_fn, params, slots, has_aux):
        function = jax.value_and_grad(self._with_slots(loss_fn), argnums=1, has_aux=has_aux)
        value, sums = function(params, slots)
        return (value[0] if has_aux else value), sums

    def all_grads(self, loss_fn, params, slots):
        return jax.grad(self._with_slots(loss_fn), argnums=(0, 1))(params, slots)

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
_FORMS_NOTE = (
    "curvature.forms differentiates loss_fn in forward mode, which a jax.custom_vjp in it does not allow."
    " Write that function with jax.custom_jvp, or without a rule of its own."
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
