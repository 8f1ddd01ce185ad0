"""The batch of one call, which can be asked for more at any parameters."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from optax import Params as ArrayTree

from kfqn_optax._capture.call import Call, slots_of
from kfqn_optax._capture.counted import Counted
from kfqn_optax._capture.examples import take
from kfqn_optax._capture.layers import Layer, Layers
from kfqn_optax._capture.loss import Loss
from kfqn_optax._capture.marks import Program, advice, straight, trace
from kfqn_optax._capture.nnx_call import copier
from kfqn_optax._capture.outputs import Mark, sampling
from kfqn_optax._capture.parts import Parts
from kfqn_optax._capture.statistics import Statistics, normalise, of_copies, signed

PROBES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The batch of one call, at any parameters: what a :class:`Curvature` and those after it ask.

    Where what is minimised is not the loss, ``sign`` is 1 or -1, by which the loss counts in it, and
    ``objective(loss, params)`` is what is minimised.
    """

    owner: Loss
    call: Call
    counted: Counted
    parts: Parts = dataclasses.field(default_factory=Parts)
    sign: jax.Array | None = None
    objective: Callable[[jax.Array, ArrayTree], jax.Array] = lambda value, params: value

    @property
    def layers(self) -> Layers:
        return self.owner.layers

    @property
    def examples(self) -> int | None:
        return self.counted.examples

    @functools.cached_property
    def program(self) -> Program:
        """What tracing the loss tells of it."""
        return trace(self.loss(None), self.call.params)

    @functools.cached_property
    def straight(self) -> list[Mark] | None:
        """The marks in which the loss does not bend; None for a loss that can be differentiated once."""
        return straight(lambda: self.loss(None)(self.call.params)) if self.program.marks else []

    def advice(self, layers: Sequence[Layer]) -> list[str]:
        """What to say of the marks of the loss to one who trains these of its layers."""
        return advice(self.program, self.straight or [], layers)

    def loss(self, rows: int | None) -> Callable[[ArrayTree], jax.Array]:
        """The loss of the model's examples, or what is minimised instead, as a function of parameters."""
        call = self._part(rows, of_model=True)

        def loss(params):
            with self._errors(call, rows):
                value = call.value(self.owner.loss_fn, params, self.owner.has_aux)
            return self.objective(value, params)

        return loss

    def statistics(
        self, params: ArrayTree, vectors: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, Statistics]]:
        """The loss and the statistics of the whole batch."""
        owner = self.owner
        slots = slots_of(self.layers, vectors)
        with owner.tapping():
            value, sums = self.call.slot_grads(owner.noted(owner.loss_fn), params, slots, owner.has_aux)
        sums = owner.with_inputs(sums, self.call, params, vectors)
        value, sums = owner.mean((value, sums))
        statistics = normalise(self.layers, params, sums, vectors)
        if self.sign is not None:
            statistics = {name: signed(one, self.sign) for name, one in statistics.items()}
        return self.objective(value, params), statistics

    def sampled(
        self, params: ArrayTree, rows: int | None, key: jax.Array
    ) -> tuple[dict[str, Statistics], ArrayTree | None]:
        """The statistics of sampled gradients on the factors' examples, and these gradients."""
        call = self._part(rows, of_model=False)

        def sums_of(key):
            with self.owner.tapping(), self._errors(call, rows):
                return call.all_grads(self.owner.noted(self._psi(key)), params, slots_of(self.layers, {}))

        if self.owner.forward is None:
            grads, sums = self.owner.mean(sums_of(key))
            # Drawn apart on each device: their mean has the variance of one part in so many.
            grads = jax.tree.map(lambda g: math.sqrt(self.owner.devices) * g, grads)
            return normalise(self.layers, params, sums, {}, sampled=True), grads
        drawn = jax.vmap(sums_of)(jax.random.split(key, PROBES))[1]
        sums = self.owner.with_inputs(jax.tree.map(lambda leaf: leaf.mean(0), drawn), call, params, {})
        sums = self.owner.mean(sums)
        statistics = normalise(self.layers, params, sums, {})
        for layer in self.layers:
            totals = jax.vmap(lambda grads, layer=layer: of_copies(layer, grads, layer.out_dim))(
                drawn[layer.name]["grads"]
            )
            found = {"grad_squares": jnp.square(totals).mean(0)}
            if "grad_moment" in layer.slot_shapes:
                moment = jnp.einsum("p...i,p...j->...ij", totals, totals, precision="highest") / PROBES
                found["grad_moment"] = moment
            statistics[layer.name] = statistics[layer.name]._replace(**self.owner.mean(found))
        return statistics, None

    def _psi(self, key: jax.Array) -> Callable[..., jax.Array]:
        """The derivative of the loss along random shifts of its marked arrays."""

        def psi(*args: Any, **kwargs: Any) -> jax.Array:
            copied = copier((args, kwargs))

            def shifted(t):
                args, kwargs = copied()
                with sampling(t, key):
                    value = self.owner.loss_fn(*args, **kwargs)
                value = value[0] if self.owner.has_aux else value
                return value if self.sign is None else self.sign * value

            return jax.grad(shifted)(jnp.zeros([]))

        return psi

    def _part(self, rows: int | None, of_model: bool) -> Call:
        """The call with some of the examples; with all if there are not more, or nothing counts them."""
        examples = self.examples
        if examples is None or rows is None or rows >= examples:
            return self.call
        self.counted.check_part()
        draw = self.parts.of_model if of_model else self.parts.of_factors
        return self.call.with_args(take(self.owner.batch_argnums, self.call.args, *draw(examples, rows)))

    def _errors(self, call: Call, rows: int | None) -> contextlib.AbstractContextManager[None]:
        if call is self.call or rows is None:
            return contextlib.nullcontext()
        return self.counted.of_other_number(rows)
