"""One call of a loss as something that can be made again at other parameters, with slots for the sums."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.dependence import dependence
from kfqn_optax._capture.layers import Layers
from kfqn_optax._capture.program import equations
from kfqn_optax._capture.routes import (
    Found,
    NeedsSlots,
    Record,
    Routes,
    routing,
    whole_pass,
    with_slots,
    without_slots,
)


class Call(Protocol):
    """One call of losses, which can be repeated at other parameters; slots and sums by layer name."""

    @property
    def params(self) -> Any: ...

    @property
    def args(self) -> tuple[Any, ...]: ...

    def with_args(self, args: tuple[Any, ...]) -> "Call": ...

    def value(self, loss_fn: Callable[..., Any], params: Any, has_aux: bool) -> jax.Array: ...

    def value_and_grad(
        self, loss_fn: Callable[..., Any], slots: Mapping[str, Any], has_aux: bool, record: Record
    ) -> tuple[Any, Any, Any]: ...

    def slot_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any], has_aux: bool
    ) -> tuple[jax.Array, Any]: ...

    def all_grads(
        self, loss_fn: Callable[..., Any], params: Any, slots: Mapping[str, Any]
    ) -> tuple[Any, Any]: ...


@dataclasses.dataclass(frozen=True)
class TreeCall:
    """A call of losses that are functions of a tree of parameters."""

    layers: Layers
    params: ArrayTree
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    found: Found = dataclasses.field(default_factory=Found)

    def with_args(self, args):
        return dataclasses.replace(self, args=args)

    def value(self, loss_fn, params, has_aux):
        value = loss_fn(params, *self.args, **self.kwargs)
        return value[0] if has_aux else value

    def value_and_grad(self, loss_fn, slots, has_aux, record):
        def first_pass(record, beside):
            loss = self._with_slots(loss_fn, beside, record=record)
            function = jax.value_and_grad(loss, argnums=(0, 1), has_aux=has_aux)
            value, (grads, sums) = function(self.params, slots)
            return value, grads, sums

        def plain(params):
            value = loss_fn(params, *self.args, **self.kwargs)
            return value[0] if has_aux else value

        program = jax.make_jaxpr(plain)(self.params)
        if any(equation.primitive.name.startswith("custom_vjp") for equation, _ in equations(program)):
            self.found.beside = self._comes_to_life(first_pass)
        made = first_pass(record, self.found.beside)
        self.found.counts = None if record.mixed else record.counts
        return made

    def _comes_to_life(self, first_pass):
        """Whether more layers are live if the loss is given slots among its parameters; traced, not run.

        A silent layer may as well be one whose parameters the loss stops, and a loss may not take
        parameters with slots: then it is given those without.
        """
        records = {False: Record(), True: Record()}
        for beside, record in records.items():
            with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
                jax.eval_shape(lambda beside=beside, record=record: first_pass(record, beside)[2])
            if not record.silent:
                return beside
        return len(records[True].live) > len(records[False].live)

    def slot_grads(self, loss_fn, params, slots, has_aux):
        counts = self.found.counts
        # What is not known of the kernels, their derivative tells; XLA removes what is not used of it.
        moved: Any = (0, 1) if counts is None else 1
        loss = self._with_slots(loss_fn, self.found.beside, counts)
        value, sums = jax.value_and_grad(loss, argnums=moved, has_aux=has_aux)(params, slots)
        return (value[0] if has_aux else value), sums[1] if counts is None else sums

    def all_grads(self, loss_fn, params, slots):
        return jax.grad(self._with_slots(loss_fn, self.found.beside), argnums=(0, 1))(params, slots)

    def _with_slots(self, loss_fn, beside, counts=None, record=None):
        def plain(params):
            return loss_fn(params, *self.args, **self.kwargs)

        def loss(params, slots):
            slots = slots if record is None else record.watch(slots)
            routes = functools.partial(Routes, self.layers, params, slots, plain, counts, record)
            try:
                with routing(routes()):
                    if not beside:
                        return plain(params)
                    returned = plain(with_slots(params))
            except (NeedsSlots, jax.errors.UnexpectedTracerError):
                # The latter is JAX's where a custom_vjp meets slots that are not among its arguments.
                asked = False
                if record is not None:
                    record.clear()
                with routing(routes(asked=False)):
                    returned = plain(with_slots(params))
            else:
                asked = True
            if record is not None:
                self._check_apart(plain, params, slots, asked)
            return without_slots(returned)

        return loss

    def _check_apart(self, plain, params, slots, asked):
        """Raise if the loss, which is given slots among its parameters, computes more with them than sums.

        Neither its value may depend on them, nor the statistics that they bring: they would if parameters
        with slots were squared, or combined by another function that is not linear.
        """

        def loss(slots):
            with routing(Routes(self.layers, params, slots, plain, asked=asked)):
                return jax.tree.leaves(plain(with_slots(params)))[0]

        def of_slots(slots):
            with whole_pass():
                value, sums = jax.value_and_grad(loss)(slots)
            rows = sum(jnp.float32(each["rows"]).sum() for each in sums.values())
            return jnp.float32(value) + rows

        if dependence(jax.make_jaxpr(of_slots)(slots), {}).loss.around:
            raise ValueError(_COMPUTED)


def slots_of(layers: Layers, vectors: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    slots = {}
    for layer in layers:
        slot = {key: jnp.zeros(shape, layer.dtype) for key, shape in layer.slot_shapes.items()}
        if layer.name in vectors:
            slot["vector"] = layer.slot_vector(vectors[layer.name].astype(layer.dtype))
        slots[layer.name] = slot
    return slots


_COMPUTED = (
    "kfqn.value_and_grad: loss_fn computes with entries 'kfqn_slot' of zeros, which its parameters have"
    " beside the kernels since nothing else can tell which layer a call is of: the model is a lifted module"
    " (nn.vmap) itself, loss_fn scans over stacked parameters, models that are alike share one jax.jit, or"
    " a jax.custom_vjp calls layers. Put the lifted module inside a module; leave out the jax.jit, since"
    " the step is jitted; or apply the model to params as they are, and take norms, means and penalties"
    " from kfqn.without_slots(params)."
)
